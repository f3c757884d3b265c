"""The parts of the backbone: token embedding, downsampling, and blocks of attention and MLP.

Images of tokens are [B, C, H, W] in the channels-last memory format, whose other view [B, H, W, C]
is contiguous: convolutions take the one and norms, attention and MLP the other, without a copy.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.layers import DropPath, LayerScale
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


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
        self.norm1 = nn.LayerNorm(dim // 2)
        self.activation = nn.GELU()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[2] < 1 or x.shape[3] < 1:
            expected = f"[B, {self.conv1.in_channels}, H, W] with H, W >= 1"
            raise ValueError(f"Setformer: images must be {expected}, got {list(x.shape)}")
        x = self.conv1(x.contiguous(memory_format=torch.channels_last))
        x = self.conv2(self.activation(_over_channels(self.norm1, x)))
        return _over_channels(self.norm2, x)


class Downsample(nn.Module):
    """Norm, then a 3 x 3 convolution of stride 2.

    Shape:
        [B, dim, H, W] to [B, out_dim, ceil(H / 2), ceil(W / 2)].
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(_over_channels(self.norm, x))


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
            x = x + self.drop_path(self.attention_scale(self._attend(self.attention_norm(x))))
        return x + self.drop_path(self.mlp_scale(self.mlp(self.mlp_norm(x))))

    def _attend(self, x: Tensor) -> Tensor:
        grid = (x.shape[1], x.shape[2])
        return self.attention(x.flatten(1, 2), grid=grid).unflatten(1, grid)


class Stage(nn.Module):
    """Downsampling, in all stages but the first, and then the blocks at that stride.

    Args:
        in_dim: width of the incoming tokens.
        dim: width C of this stage.
        downsample: halve the grid first.
        drop_path: one rate for each block.
        make_attention: gives the attention of one block.
        mlp_ratio, layer_scale: see :class:`Block`.

    Shape:
        [B, in_dim, H, W] to [B, C, H, W], or to [B, C, ceil(H / 2), ceil(W / 2)].
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        *,
        downsample: bool,
        drop_path: list[float],
        make_attention: Callable[[], nn.Module | None],
        mlp_ratio: float,
        layer_scale: float | None,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = Downsample(in_dim, dim) if downsample else nn.Identity()
        self.blocks = nn.Sequential(
            *(Block(dim, make_attention(), mlp_ratio, rate, layer_scale) for rate in drop_path)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x).permute(0, 2, 3, 1)
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x.permute(0, 3, 1, 2)


def _over_channels(norm: nn.LayerNorm, x: Tensor) -> Tensor:  # [B, C, H, W]
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _layer_scale(dim: int, initial: float | None) -> nn.Module:
    return nn.Identity() if initial is None else LayerScale(dim, initial)
