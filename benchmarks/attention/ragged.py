"""Sequences of different lengths: packed one after another, padded with a mask, and one by one."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from peers import ITERATIONS
from torch import Tensor

from setformer_ext import set_attention, set_attention_varlen
from setformer_ext.cli.timing import milliseconds, step

Way = tuple[Callable[..., Tensor], tuple[Tensor, ...]]  # the attention and what it is given

SEQUENCES, SHORTEST, LONGEST = 32, 16, 512
HEADS, DEPTH, REFERENCES = 12, 64, 64
OPTIONS = {"iterations": ITERATIONS, "normalize": False}  # the keys are of unit length


def ragged(threads: int, rounds: int = 9) -> str:
    """A table in Markdown: medians of interleaved rounds."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    # As many sequences between 16 and 32 tokens as between 256 and 512.
    lengths = (SHORTEST * (LONGEST / SHORTEST) ** torch.rand(SEQUENCES)).long()
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    tokens, longest = int(cu_seqlens[-1]), int(lengths.max())
    key, value = (torch.randn(tokens, HEADS, DEPTH) for _ in range(2))
    key = torch.nn.functional.normalize(key, dim=-1)
    reference = torch.nn.functional.normalize(torch.randn(HEADS, REFERENCES, DEPTH), dim=-1)
    mask = torch.arange(longest) < lengths.unsqueeze(1)  # [S, N]

    def padded(x: Tensor) -> Tensor:  # [N, H, D] -> [S, H, longest, D]
        rows = x.new_zeros(SEQUENCES, longest, HEADS, DEPTH)
        rows[mask] = x
        return rows.transpose(1, 2)

    def one_by_one(key: Tensor, value: Tensor, reference: Tensor) -> Tensor:  # [1, H, N, D]
        outputs = []
        for rows in zip(*(x.split(lengths.tolist()) for x in (key, value)), strict=True):
            heads_first = (x.transpose(0, 1).unsqueeze(0) for x in rows)
            outputs.append(set_attention(None, *heads_first, reference, **OPTIONS))
        return torch.cat(outputs, dim=2)

    ways: dict[str, Way] = {
        "packed": (
            lambda k, v, y: set_attention_varlen(None, k, v, y, cu_seqlens, **OPTIONS),
            (key, value, reference),
        ),
        "padded, with a mask": (
            lambda k, v, y: set_attention(None, k, v, y, mask=mask, **OPTIONS),
            (padded(key), padded(value), reference),
        ),
        "one by one": (one_by_one, (key, value, reference)),
    }
    lines = [
        f"{SEQUENCES} sequences of {lengths.min()} to {longest} tokens, {tokens} in all; H="
        f"{HEADS}, D={DEPTH}, M={REFERENCES}, {threads} threads\n",
        "| | forward, ms | times packed | forward + backward, ms | times packed |",
        "| --- | --: | --: | --: | --: |",
    ]
    times = [_times(ways, gradient, rounds) for gradient in (False, True)]
    for name in ways:
        cells = [f"{t[name]:.2f} | {t[name] / t['packed']:.2f}" for t in times]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _times(ways: dict[str, Way], gradient: bool, rounds: int) -> dict[str, float]:
    steps = {
        name: step(attention, tuple(x.clone().requires_grad_(gradient) for x in tensors), gradient)
        for name, (attention, tensors) in ways.items()
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, run in steps.items():
            time = milliseconds(run, torch.device("cpu"), 1)
            taken[name] += time if turn > 0 else []
    return {name: statistics.median(times) for name, times in taken.items()}
