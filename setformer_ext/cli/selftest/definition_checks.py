"""Outputs and all gradients against the definition in float64, over sizes, options and types.

Before that, within seconds, one small problem for each kernel family, type and direction.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

import setformer_ext

from .outcome import SMOKE, Kernels, Task, short
from .problems import random_problem
from .tolerance import Comparison, compare_with_definition

FUNCTIONS = ("set_attention", "set_pooling", "transport_plan")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# One problem per kernel family, which every GPU solves with kernels of this family only.
# (Exceptions: forward of half types always streams before sm_80, and before sm_90 shares out what a
# cluster could hold.) 49 tokens of 32 dimensions fit one block on every GPU; the keys alone of 1100
# tokens, 64 dimensions of 2 bytes in tiles of 64 tokens, fit one on none. More than 3,072 tokens
# with 65 references fit no cluster; with more than 128 references heads are not shared out.
FAMILIES: dict[str, dict[str, Any]] = {
    "resident": {"B": 2, "H": 2, "N": 49, "M": 17, "D": 32, "Dv": 32},
    "streaming": {"B": 1, "H": 1, "N": 1100, "M": 130, "D": 64, "Dv": 9},
    "cluster": {"B": 1, "H": 2, "N": 1100, "M": 17, "D": 64, "Dv": 9},
    "shares": {"B": 1, "H": 1, "N": 3100, "M": 65, "D": 8, "Dv": 8},
}

EVERY_OPTION: dict[str, Any] = {
    "masked": True,
    "token_mass": True,
    "reference_mass": "learned",
    "bandwidth": "learned",
    "epsilon": "learned",
    "P": 2,
}
# Small enough for an emulated GPU.
SMALL: dict[str, dict[str, Any]] = {
    "one of each": {"B": 1, "H": 1, "N": 1, "M": 1, "D": 1, "Dv": 1},
    "odd sizes": {"B": 1, "H": 2, "N": 37, "M": 7, "D": 9, "Dv": 5, "iterations": 2},
    "every option": {"B": 2, "H": 1, "N": 19, "M": 5, "iterations": 2, **EVERY_OPTION},
    "linear cross attention": {
        "B": 1, "H": 1, "N": 17, "Nq": 21, "M": 5, "iterations": 2, "kernel": "linear",
    },
    "scaled to unit length": {
        "B": 1, "H": 2, "N": 21, "Nq": 11, "M": 5, "D": 40, "iterations": 2, "normalize": True,
    },
    "more than a block holds": {"B": 1, "H": 1, "N": 705, "M": 3, "D": 64, "iterations": 1},
}  # fmt: skip
# Heads that fit the shared memory of one block, and heads that do not; every size with a tail.
FULL: dict[str, dict[str, Any]] = {
    **SMALL,
    "one token": {"N": 1, "M": 257},
    "one reference": {"N": 257, "M": 1},
    "one key": {"N": 1, "Nq": 129, "M": 9},
    "no iterations": {"N": 129, "M": 33, "iterations": 0},
    "twenty iterations": {"N": 129, "M": 33, "iterations": 20},
    "sizes beyond the tiles": {"N": 129, "M": 97, "D": 33, "Dv": 65},
    "7 x 7 tokens": {"B": 4, "N": 49, "M": 49, "D": 32, "Dv": 32},
    "14 x 14 tokens": {"N": 196, "M": 49, "D": 32, "Dv": 32},
    "28 x 28 tokens": {"N": 784, "M": 49, "D": 32, "Dv": 32},
    "56 x 56 tokens": {"B": 1, "N": 3136, "M": 49, "D": 32, "Dv": 32},
    "eight blocks of a cluster": {"B": 1, "H": 2, "N": 1537, "M": 100, "epsilon": 0.01},
    "sentences": {"N": 512, "M": 64, "D": 64, "Dv": 64, "masked": True},
    "linear kernel": {"N": 257, "M": 64, "D": 64, "Dv": 64, "kernel": "linear"},
    "references per sample": {"N": 257, "M": 17, "per_sample": True, "kernel": "linear", "P": 3},
    "every option, few tokens": {"N": 129, "M": 33, **EVERY_OPTION},
    "every option, many tokens": {"B": 1, "N": 2050, "M": 33, "D": 24, **EVERY_OPTION},
    "every option, cross attention": {
        "N": 97, "Nq": 1030, "M": 33, "per_sample": True, **EVERY_OPTION,
        "reference_mass": "per-sample", "P": 3,
    },
    "16411 tokens": {"B": 1, "H": 1, "N": 16411, "M": 17, "D": 16, "Dv": 16, "masked": True},
    "512 references": {"B": 1, "H": 2, "N": 300, "M": 512, "D": 64, "Dv": 64},
    "256 dimensions": {"B": 1, "H": 2, "N": 300, "M": 64, "D": 256, "Dv": 256},
    "512 references of 256": {"B": 1, "H": 1, "N": 1100, "M": 512, "D": 256, "Dv": 256},
}  # fmt: skip
SMALL_EPSILON = {"N": 129, "M": 17, "epsilon": 0.01, "token_mass": True, "masked": True}


def smoke_kernels() -> list[Kernels]:
    """All kernels to check, forward of all first.

    Neighbours differ in type and family: so the first few show whether anything works at all.
    """
    families = list(FAMILIES)
    return [
        Kernels(family, dtype, direction)
        for direction in ("forward", "backward")
        for turn in range(len(families))
        for i, dtype in enumerate(DTYPES)
        if _exist(family := families[(i + turn) % len(families)], dtype, direction)
    ]


def _exist(family: str, dtype: torch.dtype, direction: str) -> bool:
    if family in ("cluster", "shares"):
        return dtype.itemsize == 2 and direction == "forward"
    return family != "resident" or dtype != torch.float64


def smoke_tasks() -> list[Task]:
    """One task for each of `smoke_kernels`."""
    return [Task(f"smoke: {x}", partial(_smoke, x), SMOKE, smoke=x) for x in smoke_kernels()]


def _smoke(kernels: Kernels, device: torch.device) -> list[Comparison]:
    options = FAMILIES[kernels.family] | {"iterations": 2, "masked": True}
    arguments = random_problem(9, **options, dtype=kernels.dtype, device=device)
    backward = kernels.direction == "backward"
    return compare_with_definition(setformer_ext.set_attention, arguments, backward=backward)


def tasks(quick: bool) -> list[Task]:
    """One task a problem and type."""
    problems = [
        (name, x, dtype) for name, x in (SMALL if quick else FULL).items() for dtype in DTYPES
    ]
    if not quick:
        problems += [("epsilon of 0.01", SMALL_EPSILON, x) for x in (torch.float32, torch.float64)]
    return [
        Task(
            f"{name}, {short(dtype)}",
            partial(_check, options, dtype, True),
            needs=(dtype,),
            forward_only=partial(_check, options, dtype, False),
        )
        for name, options, dtype in problems
    ]


def _check(
    options: dict[str, Any], dtype: torch.dtype, backward: bool, device: torch.device
) -> Iterator[Comparison]:
    arguments = random_problem(7, **options, dtype=dtype, device=device)
    for name in FUNCTIONS:
        function = getattr(setformer_ext, name)
        for x in compare_with_definition(function, arguments, backward=backward):
            yield replace(x, name=f"{name}, {x.name}")
