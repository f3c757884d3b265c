"""ListOps: the value of a nested expression, a digit.

Drawn as by Nangia and Bowman (ListOps, 2018) and, with as many arguments and levels, by the Long
Range Arena (Tay et al., ICLR 2021), whose expressions are of 500 to 2,000 tokens; these are
shorter.
"""

from __future__ import annotations

import random
from pathlib import Path
from statistics import median

import torch

from .task import Data, Samples, Task
from .texts import Words

OPERATORS = {
    "MIN": min,
    "MAX": max,
    "MED": lambda values: int(median(values)),
    "SM": lambda values: sum(values) % 10,
}
END = 1 + 10 + len(OPERATORS)  # 0 is padding, then digits, then operators
LEVELS, ARGUMENTS = 10, 10
OPERATOR_SHARE = 0.25  # of the places that may hold one
SHORTEST, LONGEST = 10, 96
TRAINING, HELD_OUT = 60000, 2000

Tree = int | tuple[int, list["Tree"]]  # a digit, or an operator's number and its arguments


def draw(generator: random.Random, level: int = 1) -> Tree:
    """A random expression."""
    if level >= LEVELS or (level > 1 and generator.random() > OPERATOR_SHARE):
        return generator.randrange(10)
    count = generator.randint(2, ARGUMENTS)
    operator = generator.randrange(len(OPERATORS))
    return operator, [draw(generator, level + 1) for _ in range(count)]


def write(tree: Tree) -> list[int]:
    """Its tokens."""
    if isinstance(tree, int):
        return [1 + tree]
    operator, arguments = tree
    return [11 + operator, *(token for each in arguments for token in write(each)), END]


def value(tree: Tree) -> int:
    """What it is worth, 0 to 9."""
    if isinstance(tree, int):
        return tree
    operator, arguments = tree
    return list(OPERATORS.values())[operator]([value(each) for each in arguments])


def load(folder: Path) -> Data:
    """[K, LONGEST], all different; drawn once and kept in the folder."""
    sizes = (LEVELS, ARGUMENTS, OPERATOR_SHARE, SHORTEST, LONGEST, TRAINING, HELD_OUT)
    kept = folder / f"listops-{'-'.join(map(str, sizes))}.pt"
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = kept.with_suffix(f".{random.randrange(2**32)}")
        torch.save(_draw_all(random.Random(0)), unfinished)
        unfinished.replace(kept)
    tokens, labels = torch.load(kept)
    tokens, labels = tokens.long(), labels.long()

    def part(rows: slice) -> Samples:
        return Samples(tokens[rows], labels[rows], tokens[rows] != 0)

    return Data(
        part(slice(TRAINING)),
        part(slice(TRAINING, TRAINING + HELD_OUT)),
        part(slice(TRAINING + HELD_OUT, None)),
    )


def _draw_all(generator: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    count = TRAINING + 2 * HELD_OUT
    tokens = torch.zeros(count, LONGEST, dtype=torch.uint8)
    labels = torch.zeros(count, dtype=torch.uint8)
    seen: set[tuple[int, ...]] = set()
    while len(seen) < count:
        tree = draw(generator)
        written = tuple(write(tree))
        if SHORTEST <= len(written) <= LONGEST and written not in seen:
            tokens[len(seen), : len(written)] = torch.tensor(written, dtype=torch.uint8)
            labels[len(seen)] = value(tree)
            seen.add(written)
    return tokens, labels


LISTOPS = Task(
    name="listops",
    about=f"ListOps, {SHORTEST} to {LONGEST} tokens",
    load=load,
    make_embedding=lambda dim: Words(END + 1, LONGEST, dim),
    classes=10,
    steps=1000,
    batch_size=64,
)
