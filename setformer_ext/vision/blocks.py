"""The parts of the backbone: token embedding, downsampling, and blocks of attention and MLP.

Images of tokens are [B, C, H, W] in the channels-last memory format, whose other view [B, H, W, C]
is contiguous: convolutions and batch norms take the one, linear layers and attention the other,
without a copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import ClassVar

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


class Downsampling(nn.Module):
    """A 3 x 3 convolution of stride 2 and the norm of its outputs.

    Args:
        in_dim: channels of the images.
        dim: channels C of the result.

    Shape:
        [B, in_dim, H, W] to [B, C, ceil(H / 2), ceil(W / 2)].
    """

    normed: ClassVar = {"conv": "norm"}  # layers and the norms after them, for fuse_norms

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class TokenEmbedding(nn.Module):
    """Overlapping convolutional token embedding at stride 4: two downsamplings.

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
        self.channels = channels
        self.first = Downsampling(channels, dim // 2)
        self.second = Downsampling(dim // 2, dim)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[2] < 1 or x.shape[3] < 1:
            expected = f"[B, {self.channels}, H, W] with H, W >= 1"
            raise ValueError(f"Setformer: images must be {expected}, got {list(x.shape)}")
        return self.second(F.gelu(self.first(x.contiguous(memory_format=torch.channels_last))))


class MLP(nn.Module):
    """Two linear layers around a depthwise 3 x 3 convolution, which tells tokens their positions.

    Our reading: the inverted residual of MobileNetV2 (Sandler et al., 2018) with GELU, and without
    a norm of the last layer. It was chosen on real data.

    Args:
        dim: width C of the tokens.
        hidden: channels of the convolution.

    Shape:
        [B, C, H, W] to the same.
    """

    normed: ClassVar = {"expand": "expand_norm", "conv": "conv_norm"}

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Linear(dim, hidden, bias=False)
        self.expand_norm = nn.BatchNorm2d(hidden)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False)
        self.conv_norm = nn.BatchNorm2d(hidden)
        self.reduce = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.expand_norm(_of_channels(self.expand, x)))
        return _of_channels(self.reduce, F.gelu(self.conv_norm(self.conv(x))))


class Block(nn.Module):
    """Attention, whose input is normed, and an MLP, whose layers are; both added.

    Args:
        dim: width C of the tokens.
        attention: of tokens [B, N, C], called with ``grid=(H, W)``; None for a block without.
        mlp_ratio: hidden width of the MLP / C.
        drop_path: probability that a sample skips a branch (stochastic depth).

    Shape:
        [B, C, H, W] to the same.
    """

    def __init__(
        self, dim: int, attention: nn.Module | None, mlp_ratio: float, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.attends = attention is not None
        if attention is not None:
            self.attention_norm = nn.BatchNorm2d(dim)
            self.attention = attention
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        if self.attends:
            grid = (x.shape[2], x.shape[3])
            tokens = self.attention_norm(x).flatten(2).mT  # [B, N, C]
            attended = self.attention(tokens, grid=grid).mT.unflatten(2, grid)
            x = x + self.drop_path(attended)
        return x + self.drop_path(self.mlp(x))


class Stage(nn.Module):
    """Downsampling, in all stages but the first, and then the blocks at that stride.

    Args:
        in_dim: width of the incoming tokens, whose grid the downsampling halves; None for no
            downsampling.
        dim: width C of this stage.
        blocks: of images of tokens [B, C, H, W], made after the downsampling.

    Shape:
        [B, in_dim, H, W] to [B, C, ceil(H / 2), ceil(W / 2)], or [B, C, H, W] to the same.
    """

    def __init__(self, in_dim: int | None, dim: int, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = nn.Identity() if in_dim is None else Downsampling(in_dim, dim)
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if not (self.grad_checkpointing and torch.is_grad_enabled()):
            return self.blocks(x)
        for block in self.blocks:
            x = _recomputed(block, x)
        return x


def _of_channels(linear: nn.Module, x: Tensor) -> Tensor:  # [B, C, H, W]
    """A linear layer at every place of an image."""
    return linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _recomputed(block: nn.Module, x: Tensor) -> Tensor:
    """The block's output; backward computes again what is inside."""
    if torch.compiler.is_compiling():  # counts a batch once, whatever it recomputes
        return checkpoint(block, x, use_reentrant=False)
    return checkpoint(
        block,
        x,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _statistics_kept(block)),
    )


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Running statistics stay as they are: the second pass over a batch must not count."""
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm)]
    known = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, known, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
