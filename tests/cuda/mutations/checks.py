"""The problems that faults are looked for with, and what objects to a result.

    cd tests/cuda && python -m mutations.checks LIBRARY PROBLEM [ORDER ...]

runs the threads in those orders (by default in all), then under the race detector, and prints each
objection as a line of JSON. Without arguments it reads them, as a list in JSON a line, and prints
after a check's objections the exit status of the child that has run it: a process of its own, for a
fault may write anywhere, but one that need not load torch again.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

import setformer_ext
from emulator.build import load
from emulator.device import Emulator, Mode, Order
from setformer_ext import ops
from setformer_ext.cli.selftest.problems import random_problem
from setformer_ext.cli.selftest.tolerance import compare_with_definition

sys.path.insert(0, str(Path(__file__).parents[2]))

from lengths import what_depends_on_lengths

LONGEST = 300  # seconds of a check

# Which kernels a problem is for: forward of a half type is on chip, on a cluster, on shares or
# streams, never resident; beside backward on shares it streams.
Regime = Literal["on chip", "cluster", "shares", "backward on shares", "resident", "streaming"]


@dataclass(frozen=True)
class Problem:
    storage: str
    regime: Regime
    backward: bool
    options: dict[str, Any]  # of random_problem
    arranged: Callable[[Tensor], Tensor] | None = None  # the same key, elsewhere in memory
    packed: bool = False  # the valid tokens alone, as packed sequences
    in_group: bool = False  # by the launches of a group of ranks, here of one
    hidden: int = 0  # tokens from the first on that the mask leaves out
    architecture: int = 80  # that faults are compiled for
    device: int = 0  # the device's compute capability, as 90 for 9.0, where it is another one


def transposed(key: Tensor) -> Tensor:
    """Its last dimension is not the innermost."""
    return key.transpose(-1, -2).contiguous().transpose(-1, -2)


def far(key: Tensor) -> Tensor:
    """Its heads are 2^31 elements apart. Pages that nobody touches take no memory."""
    B, H, N, D = key.shape
    room = key.new_empty((H - 1) * 2**31 + B * N * D)
    return room.as_strided((B, H, N, D), (N * D, 2**31, D, 1)).copy_(key)


def packed(
    query: Tensor | None,  # [B, H, Nq, D]
    key: Tensor,  # [B, H, N, D]
    value: Tensor,  # [B, H, N, Dv]
    reference: Tensor,  # [H, M, D] or [B, H, M, D]
    *,
    mask: Tensor,  # [B, N]
    query_mask: Tensor | None = None,  # [B, Nq]
    token_mass: Tensor | None = None,  # [B, H, N]
    token_positions: Tensor | None = None,  # [N, P]
    query_positions: Tensor | None = None,  # [Nq, P]
    **options: Any,
) -> Tensor:  # [B, H, Nq or N, Dv]
    """set_attention by set_attention_varlen."""
    B = mask.shape[0]

    def rows(x: Tensor, valid: Tensor) -> Tensor:  # [B, H, N, ...] to [tokens, H, ...]
        return x.transpose(1, 2)[valid]

    def positions(x: Tensor | None, valid: Tensor) -> Tensor | None:
        return None if x is None else x.expand(B, *x.shape)[valid]

    def ends(valid: Tensor) -> Tensor:
        return torch.cat([torch.zeros(1, dtype=torch.long), valid.sum(1).cumsum(0)])

    if query is not None:
        assert query_mask is not None
        options["cu_seqlens_query"] = ends(query_mask)
        options["query_positions"] = positions(query_positions, query_mask)
    output = setformer_ext.set_attention_varlen(
        None if query is None else rows(query, query_mask),
        rows(key, mask),
        rows(value, mask),
        reference,
        ends(mask),
        token_mass=None if token_mass is None else rows(token_mass, mask),
        token_positions=positions(token_positions, mask),
        **options,
    )
    valid = mask if query_mask is None else query_mask
    padded = output.new_zeros(*valid.shape, *output.shape[1:])
    return padded.masked_scatter(valid[:, :, None, None], output).transpose(1, 2)


packed.__name__ = "set_attention"  # whose definition it is compared with

# Small, but with a tail in every dimension: tiles are of 64 tokens and 64 references, and of 64
# columns (float32: 32); more than four tiles of tokens are split over blocks.
LEARNED = {"epsilon": "learned", "bandwidth": "learned"}
RESIDENT = {
    "B": 1, "H": 2, "N": 75, "M": 19, "D": 24, "Dv": 21, "iterations": 2, "Nq": 41, "P": 2,
    "masked": True, "token_mass": True, "reference_mass": "learned", **LEARNED,
}  # fmt: skip
STREAMING = {"B": 1, "H": 1, "N": 403, "M": 19, "D": 72, "Dv": 9, "iterations": 2, **LEARNED}
TWO_TILES = {"N": 275, "M": 70, "D": 136}
# Queries are keys, as most often.
SELF = {key: value for key, value in RESIDENT.items() if key != "Nq"}
DEEP_AND_WIDE = {"D": 72, "Dv": 72}  # more than a warp's room has of a row
DEEP = {"D": 40}  # two depth tiles of float32
SMALL = {"N": 45}  # fits the 64 KiB of a block on sm_75
SHALLOW = {"N": 2100, "D": 16}
MANY_QUERIES = {"N": 5, "Nq": 301, "M": 70}  # and more references than a tile
SAMPLES = {"B": 3, "masked": True, "token_mass": True}
SHARED = {"N": 365}  # of which some samples have 4 tiles left, for one block, and some have more
SCALED = {"normalize": True}
IN_LOGARITHMS = {"epsilon": 0.01, "masked": True}

PROBLEMS = {
    "bfloat16 on-chip forward": Problem("bfloat16", "on chip", False, RESIDENT),
    "bfloat16 on-chip forward, transposed": Problem(
        "bfloat16", "on chip", False, RESIDENT, transposed
    ),
    "bfloat16 on-chip forward, deep": Problem(
        "bfloat16", "on chip", False, RESIDENT | DEEP_AND_WIDE
    ),
    "bfloat16 on-chip forward, alone": Problem(
        "bfloat16", "on chip", False, SELF | {"N": 45, "M": 43, "iterations": 0}
    ),
    "bfloat16 on-chip forward, then backward": Problem("bfloat16", "on chip", True, SELF),
    "bfloat16 on-chip forward, of an older architecture": Problem(
        "bfloat16", "on chip", False, SELF | {"N": 45}, architecture=75, device=80
    ),
    "float16 on-chip forward": Problem("float16", "on chip", False, SELF),
    "bfloat16 on-chip forward, in logarithms": Problem(
        "bfloat16", "on chip", False, SELF | IN_LOGARITHMS
    ),
    "bfloat16 forward on a cluster": Problem(
        "bfloat16", "cluster", False, RESIDENT | {"N": 300}, device=90
    ),
    "bfloat16 forward on a cluster, deep": Problem(
        "bfloat16", "cluster", False, SELF | DEEP_AND_WIDE, device=90
    ),
    "bfloat16 forward on a cluster, in logarithms": Problem(
        "bfloat16", "cluster", False, SELF | IN_LOGARITHMS, device=90
    ),
    "bfloat16 forward on a cluster, packed": Problem(
        "bfloat16", "cluster", False, RESIDENT | SAMPLES | {"N": 110}, packed=True, device=90
    ),
    "bfloat16 forward on a cluster, then backward": Problem(
        "bfloat16", "cluster", True, SELF, device=90
    ),
    "float16 forward on a cluster": Problem(
        "float16", "cluster", False, SELF | {"iterations": 3}, device=90
    ),
    "bfloat16 forward on shares": Problem("bfloat16", "shares", False, RESIDENT | {"N": 1000}),
    "bfloat16 forward on shares, in parts": Problem(
        "bfloat16", "shares", False, SELF | DEEP_AND_WIDE | {"N": 1000}, device=86
    ),
    "bfloat16 forward on shares, in parts, in logarithms": Problem(
        "bfloat16", "shares", False, SELF | DEEP_AND_WIDE | IN_LOGARITHMS | {"N": 1000}, device=86
    ),
    "bfloat16 forward on shares, packed": Problem(
        "bfloat16", "shares", False, RESIDENT | SAMPLES | {"N": 1300}, packed=True
    ),
    "bfloat16 forward on one share, then backward": Problem("bfloat16", "shares", True, SELF),
    "float16 forward on shares": Problem("float16", "shares", False, SELF | {"N": 1000}),
    "bfloat16 backward on shares": Problem(
        "bfloat16", "backward on shares", True, SELF | {"N": 520, "iterations": 3}
    ),
    "bfloat16 backward on shares, packed": Problem(
        "bfloat16", "backward on shares", True, RESIDENT | SAMPLES | SHARED, packed=True
    ),
    "bfloat16 backward on shares, scaled": Problem(
        "bfloat16", "backward on shares", True, SELF | SCALED | {"N": 520}
    ),
    "bfloat16 backward on shares, in logarithms": Problem(
        "bfloat16", "backward on shares", True, SELF | IN_LOGARITHMS
    ),
    "bfloat16 backward on one share, two ranges": Problem(
        "bfloat16", "backward on shares", True, RESIDENT | {"M": 90}
    ),
    "float16 backward on shares, two ranges": Problem(
        "float16", "backward on shares", True, SELF | {"N": 520, "M": 90}
    ),
    "bfloat16 on-chip backward": Problem("bfloat16", "on chip", True, RESIDENT),
    "bfloat16 on-chip backward, transposed": Problem(
        "bfloat16", "on chip", True, RESIDENT, transposed
    ),
    "float16 on-chip backward": Problem("float16", "on chip", True, RESIDENT),
    "float16 on-chip backward, alone": Problem(
        "float16", "on chip", True, SELF | {"N": 45, "M": 43, "iterations": 0}
    ),
    "bfloat16 on-chip, scaled": Problem("bfloat16", "on chip", True, SELF | SCALED),
    "bfloat16 on-chip backward, scaled": Problem("bfloat16", "on chip", True, RESIDENT | SCALED),
    "bfloat16 on-chip backward, scaled, long rows": Problem(
        "bfloat16", "on chip", True, RESIDENT | SCALED | {"D": 60}
    ),
    "bfloat16 forward on a cluster, scaled": Problem(
        "bfloat16", "cluster", False, RESIDENT | SCALED | {"N": 300}, device=90
    ),
    "float32 streaming backward, scaled": Problem("float32", "streaming", True, STREAMING | SCALED),
    "float32 streaming backward, scaled, many tokens": Problem(
        "float32", "streaming", True, STREAMING | SCALED | {"N": 515}
    ),
    "float32 on-chip forward": Problem("float32", "on chip", False, RESIDENT),
    "float32 on-chip forward, transposed": Problem(
        "float32", "on chip", False, RESIDENT, transposed
    ),
    "float32 on-chip forward, deep": Problem("float32", "on chip", False, RESIDENT | DEEP_AND_WIDE),
    "float32 on-chip forward, scaled": Problem("float32", "on chip", False, RESIDENT | SCALED),
    "float32 forward on shares": Problem(
        "float32", "shares", False, RESIDENT | {"N": 900, "Nq": 800}
    ),
    "bfloat16 small forward": Problem("bfloat16", "streaming", False, RESIDENT),
    "bfloat16 small forward, transposed": Problem(
        "bfloat16", "streaming", False, RESIDENT, transposed
    ),
    "bfloat16 small forward, far": Problem("bfloat16", "streaming", False, RESIDENT, far),
    "bfloat16 small forward, wide": Problem("bfloat16", "streaming", False, RESIDENT | {"Dv": 72}),
    "float16 small forward": Problem("float16", "streaming", False, RESIDENT),
    "float32 resident forward": Problem("float32", "resident", False, RESIDENT),
    "bfloat16 streaming forward": Problem("bfloat16", "streaming", False, STREAMING),
    "float32 streaming forward": Problem("float32", "streaming", False, STREAMING),
    "float32 streaming forward, shallow": Problem(
        "float32", "streaming", False, STREAMING | SHALLOW
    ),
    "bfloat16 resident backward": Problem("bfloat16", "resident", True, RESIDENT),
    "bfloat16 resident backward, in logarithms": Problem(
        "bfloat16", "resident", True, SELF | IN_LOGARITHMS
    ),
    "bfloat16 resident backward, small": Problem("bfloat16", "resident", True, RESIDENT | SMALL),
    "float32 resident backward": Problem("float32", "resident", True, RESIDENT),
    "float32 resident backward, deep": Problem("float32", "resident", True, RESIDENT | DEEP),
    "bfloat16 resident backward, many queries": Problem(
        "bfloat16", "resident", True, RESIDENT | MANY_QUERIES
    ),
    "float32 resident backward, many queries": Problem(
        "float32", "resident", True, RESIDENT | MANY_QUERIES
    ),
    "bfloat16 streaming backward": Problem("bfloat16", "streaming", True, STREAMING),
    "float32 streaming backward, first spans hidden": Problem(
        "float32", "streaming", True, STREAMING | IN_LOGARITHMS, hidden=280
    ),
    "bfloat16 streaming backward, two tiles": Problem(
        "bfloat16", "streaming", True, STREAMING | TWO_TILES
    ),
    "float32 streaming backward": Problem("float32", "streaming", True, STREAMING | TWO_TILES),
    "bfloat16 on-chip backward, packed": Problem(
        "bfloat16", "on chip", True, RESIDENT | SAMPLES | {"N": 110}, packed=True
    ),
    "float32 resident backward, packed": Problem(
        "float32", "resident", True, RESIDENT | SAMPLES, packed=True
    ),
    "float32 streaming backward, packed": Problem(
        "float32", "streaming", True, STREAMING | SAMPLES | SHARED, packed=True
    ),
    "float32 streaming backward, in a group": Problem(
        "float32", "streaming", True, STREAMING, in_group=True
    ),
}


@dataclass(frozen=True)
class Objection:
    """What found a fault, in which order of threads, and its own words."""

    by: str  # numbers, race, address, barrier, ...
    order: Order
    words: str


MODES: list[tuple[Order, Mode]] = [
    ("forward", "plain"),
    ("reverse", "plain"),
    ("random", "plain"),
    ("forward", "race"),
]
ADDRESS_MODES: list[tuple[Order, Mode]] = [("forward", "address")]


def sanitizer_is_loaded() -> bool:
    """AddressSanitizer's runtime, which knows where allocations end."""
    return "libasan" in os.environ.get("LD_PRELOAD", "")


# What the emulator says, and what that is.
KINDS = {
    "race:": "race",
    "cp.async has not delivered": "copy under way",
    "nobody has written": "unwritten memory",
    "misaligned": "alignment",
    "beyond": "address",
    "access of": "address",
    "deadlock": "barrier",
    "divergent": "barrier",
}


def kind(message: str) -> str:
    return next((name for words, name in KINDS.items() if words in message), "launch")


def objections(library: Path, problem: Problem, orders: Sequence[str]) -> Iterator[Objection]:
    """What is wrong, in each of the orders and in the other modes."""
    torch.set_num_threads(1)
    ops._C = load(library)
    if problem.in_group:
        ops.run = partial(_run_in_group, ops.run)
    emulator = Emulator(library)
    if problem.device:
        emulator.set_capability(problem.device)
    arguments = random_problem(dtype=getattr(torch, problem.storage), **problem.options)
    if problem.arranged is not None:
        arguments["key"] = problem.arranged(arguments["key"])
    if problem.hidden:
        arguments["mask"][:, : problem.hidden] = False
    function = packed if problem.packed else setformer_ext.set_attention
    modes = [(order, mode) for order, mode in MODES if mode != "plain" or order in orders]
    for order, mode in modes + ADDRESS_MODES * sanitizer_is_loaded():
        emulator.clear_errors()
        failed: list[str] = []
        with emulator.configured(order=order, mode=mode):
            try:
                comparisons = compare_with_definition(
                    function, arguments, backward=problem.backward
                )
                failed = [str(comparison) for comparison in comparisons if not comparison.passed]
                if arguments["normalize"] and problem.backward:
                    failed += what_depends_on_lengths(function, arguments)
            except RuntimeError as error:  # a launch failed
                failed = [str(error)]
        if emulator.errors:
            yield Objection(kind(emulator.last_message), order, emulator.last_message)
        elif failed:
            yield Objection("numbers", order, failed[0])


def _run_in_group(
    run: Callable[..., None], function: str, arrays: dict[str, Any], _: object = None
) -> None:
    run(function, arrays, lambda numbers, how: None)


def tell(library: str, name: str, *orders: str) -> None:
    for objection in objections(Path(library), PROBLEMS[name], orders or get_args(Order)):
        print(json.dumps(asdict(objection)), flush=True)


def main() -> None:
    if sys.argv[1:]:
        return tell(*sys.argv[1:])
    gc.freeze()  # no child's collections look through what is loaded
    for line in sys.stdin:
        child = os.fork()
        if not child:
            signal.alarm(LONGEST)
            return tell(*json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


if __name__ == "__main__":
    main()
