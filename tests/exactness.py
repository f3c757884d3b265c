"""The assertion that results are as exact as the definition is in their type."""

import os
from collections.abc import Callable

from torch import Tensor

from setformer_ext.cli.selftest.problems import Arguments
from setformer_ext.cli.selftest.tolerance import compare_with_definition


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
