"""Recall of pairs: keys and values in a sequence, then keys alone, whose values are asked for.

As in Arora et al., Zoology, ICLR 2024, but that all tokens see one another. A short convolution
lets a value see the key before it; to find a key's value at another place is left to the mixer.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import nn

from .task import IGNORED, Data, Samples, Task

KEYS = 128
VALUES = 64
PAIRS = (8, 16, 64)
TRAINING, HELD_OUT = 40000, 1000


def load(pairs: int, _folder: Path) -> Data:
    """[K, 3 pairs]: key, value, key, value, ..., and then every key in another order."""
    generator = torch.Generator().manual_seed(pairs)

    def draw(count: int) -> Samples:
        keys = torch.rand(count, KEYS, generator=generator).topk(pairs)[1]
        values = torch.randint(VALUES, (count, pairs), generator=generator)
        order = torch.rand(count, pairs, generator=generator).argsort()
        told = torch.stack([keys, KEYS + values], -1).flatten(1)
        labels = torch.full((count, 3 * pairs), IGNORED)
        labels[:, 2 * pairs :] = values.gather(1, order)
        return Samples(torch.cat([told, keys.gather(1, order)], 1), labels)

    return Data(draw(TRAINING), draw(HELD_OUT), draw(HELD_OUT))


def _task(pairs: int) -> Task:
    return Task(
        name=f"recall-{pairs}",
        about=f"recall of {pairs} pairs, {VALUES} values",
        load=partial(load, pairs),
        make_embedding=lambda dim: nn.Embedding(KEYS + VALUES, dim),
        classes=VALUES,
        steps=1000,
        batch_size=64,
        of_tokens=True,
        convolution=3,
        depth=2,
    )


RECALL = tuple(_task(pairs) for pairs in PAIRS)
