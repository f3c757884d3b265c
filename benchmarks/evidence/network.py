"""One network for all tasks: an embedding, blocks of a mixer and an MLP, and a classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from setformer_ext.modules import mean_of_valid, zero_padding

from .mixers import make_mixer
from .tasks.task import Task

MLP_RATIO = 2  # of the network with softmax attention; the others' makes up for their mixers


class Convolution(nn.Module):
    """Each token and its neighbours, channel by channel."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(dim, dim, width, padding=width // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:  # [B, N, C] -> [B, N, C]
        return self.conv(x.mT).mT


class Block(nn.Module):
    """Pre-norm mixer and pre-norm MLP, added; before them the task's convolution, if it has one."""

    def __init__(self, task: Task, mixer: nn.Module | None, hidden: int) -> None:
        super().__init__()
        dim = task.dim
        self.grid = task.grid
        self.convolution = Convolution(dim, task.convolution) if task.convolution else None
        self.mixer_norm = None if mixer is None else nn.LayerNorm(dim)
        self.mixer = mixer
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:  # [B, N, C], [B, N] -> [B, N, C]
        if self.convolution is not None:
            x = x + self.convolution(x if mask is None else x * mask.unsqueeze(-1))
        if self.mixer is not None and self.mixer_norm is not None:
            x = x + self.mixer(self.mixer_norm(x), mask, self.grid)
        return x + self.mlp(self.mlp_norm(x))


class Network(nn.Module):
    """Logits of a sequence, [B, classes], or of each of its tokens, [B, N, classes], as the task
    asks for."""

    def __init__(self, task: Task, mixer: str, options: Mapping[str, Any], hidden: int) -> None:
        super().__init__()
        dim = task.dim
        self.of_tokens = task.of_tokens
        self.embedding = task.make_embedding(dim)
        self.blocks = nn.ModuleList(
            Block(task, make_mixer(mixer, dim, task.num_heads, options), hidden)
            for _ in range(task.depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, task.classes)

    def forward(self, inputs: Tensor, mask: Tensor | None) -> Tensor:  # [B, N] or [B, N, F]
        x = self.embedding(inputs)
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm(x)
        if not self.of_tokens:
            x = mean_of_valid(zero_padding(x, mask), mask)
        return self.head(x)


def make_network(task: Task, mixer: str, options: Mapping[str, Any]) -> Network:
    """The network with a mixer, its MLPs as wide as gives it the parameters of the one with softmax
    attention."""
    with torch.random.fork_rng():
        aim = _parameters(Network(task, "softmax", {}, MLP_RATIO * task.dim))
        narrowest, wider = (_parameters(Network(task, mixer, options, hidden)) for hidden in (1, 2))
    hidden = 1 + round((aim - narrowest) / (wider - narrowest))
    if hidden < 1:
        raise ValueError(f"{task.name}: {mixer} alone has more parameters than softmax's network")
    return Network(task, mixer, options, hidden)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
