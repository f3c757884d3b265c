"""The assertion that results are as exact as the definition is in their type."""

import os
from collections.abc import Callable

import torch
from torch import Tensor

from setformer_ext import reference as definition
from setformer_ext.cli.selftest.problems import Arguments, move, output_gradient, run
from setformer_ext.cli.selftest.tolerance import compare_with_definition, largest
from setformer_ext.problem import accumulate_dtype


def assert_as_exact_as_definition(
    function: Callable[..., Tensor],
    arguments: Arguments,
    *,
    backward: bool = True,
    more_noise: dict[str, float] | None = None,
    approximate: bool | None = None,
) -> None:
    """Every comparison of `compare_with_definition` holds."""
    if approximate is None and os.environ.get("EMULATOR_ARITHMETIC") == "perturbed":
        approximate = True
    for comparison in compare_with_definition(
        function, arguments, backward=backward, more_noise=more_noise, approximate=approximate
    ):
        assert comparison.passed, str(comparison)


def noise_of_masses_of_zero(
    function: Callable[..., Tensor], arguments: Arguments, *, approximate: bool = False
) -> dict[str, float]:
    """More noise for problems in which tokens have no mass.

    The derivative by such a mass is a sum over steps of terms that may all but cancel: with fewer
    steps they show. Each of the sums that make one up is rounded some ten times.
    """
    plain, wide = getattr(definition, function.__name__), move(arguments, dtype=torch.float64)
    upstream = output_gradient(function, arguments).double()
    terms = [
        largest(run(plain, wide | {"iterations": steps}, upstream)["token_mass"])
        for steps in range(1, arguments["iterations"] + 1)
    ]
    # An approximate similarity, of up to 1, errs by 2 units of itself. The exponent of a term is
    # its quotient with epsilon less two logarithms of sums over such: three times as much.
    epsilon = torch.as_tensor(arguments["epsilon"]).min().item()
    roundings = 10 + (3 * 2 / epsilon if approximate else 0)
    unit = torch.finfo(accumulate_dtype(arguments["key"].dtype)).eps
    return {"token_mass": roundings * unit * max(terms, default=0.0)}
