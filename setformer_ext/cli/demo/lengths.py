"""The time of attention alone, forward and backward, as sequences grow."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ...functional import set_attention

LENGTHS = (1024, 4096, 16384)
REFERENCES, DEPTH = 64, 32  # of one head of one sequence
ENOUGH = 0.5  # seconds after which no further call is timed
LONGEST = 6.0  # seconds that a call may take
MOST_CALLS = 20


def measure(lengths: tuple[int, ...] = LENGTHS) -> dict[str, list[float]]:
    """Seconds of each attention at each length, the quickest of some calls. A length that would
    take too long on this machine is left out: times grow with the square of the length at most."""
    reference = torch.randn(1, REFERENCES, DEPTH)
    attentions: dict[str, Callable[..., Tensor]] = {
        "SeT": lambda query, key, value: set_attention(query, key, value, reference),
        "softmax": F.scaled_dot_product_attention,
    }
    found: dict[str, list[float]] = {}
    for name, attention in attentions.items():
        _seconds(attention, lengths[0])  # a first call sets things up
        seconds: list[float] = []
        for before, length in zip((lengths[0], *lengths), lengths, strict=False):
            if seconds and seconds[-1] * (length / before) ** 2 > LONGEST:
                break
            seconds.append(_seconds(attention, length))
        found[name] = seconds
    return found


def table(seconds: dict[str, list[float]], lengths: tuple[int, ...] = LENGTHS) -> str:
    """A row for each attention, milliseconds."""
    lines = [f"{'tokens':<10}" + "".join(f"{length:>12,}" for length in lengths)]
    for name, of_name in seconds.items():
        cells = [f"{1e3 * each:.1f} ms" for each in of_name]
        cells += ["not timed"] * (len(lengths) - len(cells))
        lines.append(f"{name:<10}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def _seconds(attention: Callable[..., Tensor], length: int) -> float:
    tokens = [torch.randn(1, 1, length, DEPTH, requires_grad=True) for _ in range(3)]
    taken: list[float] = []
    while sum(taken) < ENOUGH and len(taken) < MOST_CALLS:
        start = time.perf_counter()
        attention(*tokens).sum().backward()
        taken.append(time.perf_counter() - start)
    return min(taken)
