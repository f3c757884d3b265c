"""The parts of the backbone: token embedding, downsampling, and blocks of attention and MLP.

Images of tokens are [B, C, H, W] in the channels-last memory format, whose other view [B, H, W, C]
is contiguous: convolutions take the one and norms, attention and MLP the other, without a copy.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import torch
from timm.layers import DropPath, LayerNorm2d, LayerScale
from timm.models import checkpoint_seq
from torch import Tensor, nn

EPSILON = 1e-5  # of all norms: torch's default, while LayerNorm2d has another


class TokenEmbedding(nn.Module):
    """Overlapping convolutional token embedding at stride 4: two 3 x 3 convolutions of stride 2.

    Args:
        channels: channels of the images.
        dim: width of the tokens, even.

    Shape:
        [B, channels, H, W] to [B, dim, ceil(H / 4), ceil(W / 4)].

    Raises:
        ValueError: for images that have not four dimensions, or no pixels.
    """

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, dim // 2, 3, stride=2, padding=1)
        self.norm1 = LayerNorm2d(dim // 2, EPSILON)
        self.activation = nn.GELU()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)
        self.norm2 = LayerNorm2d(dim, EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[2] < 1 or x.shape[3] < 1:
            expected = f"[B, {self.conv1.in_channels}, H, W] with H, W >= 1"
            raise ValueError(f"Setformer: images must be {expected}, got {list(x.shape)}")
        x = self.conv1(x.contiguous(memory_format=torch.channels_last))
        return self.norm2(self.conv2(self.activation(self.norm1(x))))


class Block(nn.Module):
    """Positions by a depthwise convolution, then pre-norm attention and pre-norm MLP, all added.

    Args:
        dim: width C of the tokens.
        attention: of tokens [B, N, C], called with ``grid=(H, W)``; None for a block without.
        mlp_ratio: hidden width of the MLP / C.
        drop_path: probability that a sample skips a branch (stochastic depth).
        layer_scale: initial scale of each branch's channels; None for branches without a scale.

    Shape:
        [B, H, W, C] to the same.
    """

    def __init__(
        self,
        dim: int,
        attention: nn.Module | None,
        mlp_ratio: float,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.position = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.attends = attention is not None
        if attention is not None:
            self.attention_norm = nn.LayerNorm(dim)
            self.attention = attention
            self.attention_scale = _layer_scale(dim, layer_scale)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.mlp_scale = _layer_scale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if self.attends:
            grid = (x.shape[1], x.shape[2])
            tokens = self.attention_norm(x).flatten(1, 2)
            attended = self.attention(tokens, grid=grid).unflatten(1, grid)
            x = x + self.drop_path(self.attention_scale(attended))
        return x + self.drop_path(self.mlp_scale(self.mlp(self.mlp_norm(x))))


class Stage(nn.Module):
    """Downsampling, in all stages but the first, and then the blocks at that stride.

    Args:
        in_dim: width of the incoming tokens; the downsampling norms them and halves their grid.
            None for no downsampling.
        dim: width C of this stage.
        blocks: of images of tokens [B, H, W, C], made after the downsampling.

    Shape:
        [B, in_dim, H, W] to [B, C, ceil(H / 2), ceil(W / 2)], or [B, C, H, W] to the same.
    """

    def __init__(self, in_dim: int | None, dim: int, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample: nn.Module = nn.Identity()
        if in_dim is not None:
            norm = LayerNorm2d(in_dim, EPSILON)
            conv = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1)
            self.downsample = nn.Sequential(OrderedDict(norm=norm, conv=conv))
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x).permute(0, 2, 3, 1)
        if self.grad_checkpointing and torch.is_grad_enabled():
            x = checkpoint_seq(self.blocks, x, use_reentrant=False)
        else:
            x = self.blocks(x)
        return x.permute(0, 3, 1, 2)


def _layer_scale(dim: int, initial: float | None) -> nn.Module:
    return nn.Identity() if initial is None else LayerScale(dim, initial)
