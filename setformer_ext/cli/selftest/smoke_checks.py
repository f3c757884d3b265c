"""One small problem for each kernel family, type and direction: seconds that tell what works."""

from functools import partial
from typing import Any

import torch

from ... import set_attention
from .outcome import SMOKE, Kernels, Task
from .problems import random_problem
from .tolerance import Comparison, compare_with_definition

# A problem that the kernels, not those of another family, are for on every GPU (but that forward of
# half types streams before sm_80): 49 tokens of 32 dimensions fit one block on all of them, and the
# keys of 1100 tokens alone, 64 dimensions of 2 bytes in tiles of 64 tokens, on none.
FAMILIES: dict[str, dict[str, Any]] = {
    "resident": {"B": 2, "H": 2, "N": 49, "M": 17, "D": 32, "Dv": 32},
    "streaming": {"B": 1, "H": 1, "N": 1100, "M": 17, "D": 64, "Dv": 9},
}
OPTIONS: dict[str, Any] = {"iterations": 2, "masked": True}
DIRECTIONS = ("forward", "backward")
# Neighbours differ in type and family: the first few tell whether anything works at all.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def kernels() -> list[Kernels]:
    """What there is, the forward of all first; float64 has no resident kernels."""
    families = list(FAMILIES)
    return [
        Kernels(family, dtype, direction)
        for direction in DIRECTIONS
        for turn in range(len(families))
        for i, dtype in enumerate(DTYPES)
        if (family := families[(i + turn) % len(families)]) != "resident" or dtype != torch.float64
    ]


def tasks() -> list[Task]:
    """One task for each of `kernels`."""
    return [Task(f"smoke: {x}", partial(_check, x), SMOKE, smoke=x) for x in kernels()]


def _check(kernels: Kernels, device: torch.device) -> list[Comparison]:
    sizes = FAMILIES[kernels.family]
    arguments = random_problem(9, **sizes, **OPTIONS, dtype=kernels.dtype, device=device)
    backward = kernels.direction == "backward"
    return compare_with_definition(set_attention, arguments, backward=backward)
