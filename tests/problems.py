"""The problems and the tolerance that the package's selftest has too, and their assertion."""

import os
from collections.abc import Callable

from torch import Tensor

from setformer_ext.cli.selftest.problems import (
    Arguments,
    call,
    differentiable,
    generator,
    move,
    output_gradient,
    random_problem,
    run,
    used,
)
from setformer_ext.cli.selftest.tolerance import compare_with_definition, largest

__all__ = [
    "Arguments",
    "assert_as_exact_as_definition",
    "call",
    "differentiable",
    "generator",
    "largest",
    "move",
    "output_gradient",
    "random_problem",
    "run",
    "used",
]


def assert_as_exact_as_definition(
    function: Callable[..., Tensor],
    arguments: Arguments,
    *,
    backward: bool = True,
    seed: int = 0,
    more_noise: dict[str, float] | None = None,
    approximate: bool | None = None,
) -> None:
    """Every comparison of `compare_with_definition` holds."""
    if approximate is None and os.environ.get("EMULATOR_ARITHMETIC") == "perturbed":
        approximate = True
    for comparison in compare_with_definition(
        function,
        arguments,
        backward=backward,
        seed=seed,
        more_noise=more_noise,
        approximate=approximate,
    ):
        assert comparison.passed, str(comparison)
