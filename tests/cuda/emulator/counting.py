"""What instructions of PTX ask of a multiprocessor. Mode count tells how often warps execute each
stretch of a kernel; with `kinds_of` that makes the work of a launch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from .ptx import SIZES, Function, Instruction, Label

SPECIAL = {"ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh", "div"}
SHUFFLE = {"shfl", "movmatrix", "redux"}
MEMORY = {"ld", "st", "atom", "red", "ldmatrix", "stmatrix"}
# ptxas makes nothing of these: names of registers, and addresses that are the same everywhere.
FREE = {"mov", "cvta"}
JUMPS = {"bra", "brx", "ret", "exit", "trap"}


def stretches(function: Function) -> list[list[Instruction]]:
    """Its instructions in pieces, none of which is jumped into or out of."""
    pieces: list[list[Instruction]] = [[]]
    for statement in function.body:
        if isinstance(statement, Label):
            pieces.append([])
        elif isinstance(statement, Instruction):
            pieces[-1].append(statement)
            if statement.name in JUMPS:
                pieces.append([])
    return [piece for piece in pieces if piece]


def kinds_of(instruction: Instruction) -> dict[str, int]:
    """1 for "all" instructions, and for those of the "tensor" cores, of the "special"-function unit
    and that "shuffle" registers between lanes; in "shared" and "global" memory how often 128 bytes
    move for a warp, no two lanes of which want the same bank or sector."""
    name, modifiers = instruction.name, instruction.modifiers
    if name in FREE or "param" in modifiers:
        return {}
    kinds = {"all": 1}
    if name == "mma":
        kinds["tensor"] = 1
    elif name in SPECIAL and "f64" not in modifiers:
        kinds["special"] = 1
    elif name in SHUFFLE:
        kinds["shuffle"] = 1
    elif name == "cp" and "shared" in modifiers:  # cp.async.ca.shared.global [to], [from], bytes
        kinds["shared"] = kinds["global"] = int(instruction.operands[2]) // 4
    elif name in MEMORY:
        shared = "matrix" in name or any(each.startswith("shared") for each in modifiers)
        kinds["shared" if shared else "global"] = passes(instruction)
    return kinds


def passes(instruction: Instruction) -> int:
    """Of 128 bytes, by 32 lanes."""
    modifiers = instruction.modifiers
    if "matrix" in instruction.name:
        return next((n for n in (2, 4) if f"x{n}" in modifiers), 1)
    vector = next((n for n in (2, 4, 8) if f"v{n}" in modifiers), 1)
    return max(1, vector * SIZES.get(modifiers[-1], 4) // 4)


def work(function: Function, times: Mapping[int, int]) -> Counter[str]:
    """Of all kinds, where the stretches of a kernel have been executed so many times."""
    total: Counter[str] = Counter()
    for i, stretch in enumerate(stretches(function)):
        for instruction in stretch:
            for kind, count in kinds_of(instruction).items():
                total[kind] += count * times.get(i, 0)
    return total
