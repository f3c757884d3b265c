"""A small vision classifier whose attention is a choice: SeT or softmax."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ...modules import SetAttention

GRID = (8, 8)  # of tokens, whatever the image's size
NUM_HEADS = 3


make_set_attention = partial(SetAttention, num_references=16, position_bandwidth=0.5)


class Block(nn.Module):
    """A pre-norm transformer block around either attention, on a square grid of tokens."""

    def __init__(self, dim: int, attention: nn.Module) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = attention
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:  # [B, 64, C] -> [B, 64, C]
        x = x + self.attention(self.attention_norm(x), grid=GRID)
        return x + self.mlp(self.mlp_norm(x))


class Classifier(nn.Module):
    """Images [B, channels, S, S] in [0, 1] to logits [B, classes], by an 8 x 8 grid of tokens.

    Args:
        channels: channels of the images.
        image_size: S, a multiple of 8.
        classes: how many classes.
        make_attention: called with (dim, num_heads) for each block.
        dim: width of the tokens.
        depth: number of blocks.
    """

    def __init__(
        self,
        channels: int,
        image_size: int,
        classes: int,
        make_attention: Callable[[int, int], nn.Module],
        dim: int = 48,
        depth: int = 3,
    ) -> None:
        super().__init__()
        patch = image_size // GRID[0]
        self.embedding = nn.Conv2d(channels, dim, patch + 2, stride=patch, padding=1)
        self.position = nn.Parameter(torch.zeros(math.prod(GRID), dim))
        self.blocks = nn.Sequential(
            *(Block(dim, make_attention(dim, NUM_HEADS)) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)
        nn.init.trunc_normal_(self.position, std=0.02)

    def forward(self, images: Tensor) -> Tensor:  # [B, channels, S, S] -> [B, classes]
        tokens = self.tokens(images, len(self.blocks))
        return self.head(self.norm(tokens).mean(1))

    def tokens(self, images: Tensor, depth: int) -> Tensor:  # [B, 64, dim]
        """The tokens after the first ``depth`` blocks."""
        x = self.embedding(2 * images - 1).flatten(2).mT + self.position
        return self.blocks[:depth](x)

    def transport_plan(self, images: Tensor, depth: int) -> Tensor:  # [B, H, 64, M]
        """The transport plan of block ``depth``, whose attention must be SetAttention."""
        block = self.blocks[depth]
        assert isinstance(block, Block)
        if not isinstance(block.attention, SetAttention):
            raise TypeError(f"only SetAttention has a plan, got {type(block.attention).__name__}")
        x = block.attention_norm(self.tokens(images, depth))
        return block.attention.transport_plan(x, grid=GRID)
