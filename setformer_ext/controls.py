"""The attentions that SetAttention is compared with, with the same interface."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .layout import Grid
from .modules import SetAttention, mean_of_valid, zero_padding

ATTENTIONS = ("set", "softmax", "mean", "none")


class SoftmaxAttention(nn.Module):
    """Multi-head dot-product attention, a drop-in for :class:`setformer_ext.SetAttention`.

    Args:
        dim: channels C of input and output, a multiple of ``num_heads``.
        num_heads: heads H.

    Shape:
        x [B, N, C] (and mask [B, N]) to [B, N, C]; ``grid`` is taken and not used.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.projection = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        for weight in (*self.query_key_value.weight.chunk(3), self.projection.weight):
            nn.init.xavier_uniform_(weight)  # each by itself, as SetAttention's
        for linear in (self.query_key_value, self.projection):
            nn.init.zeros_(linear.bias)

    def forward(
        self,
        x: Tensor,  # [B, N, C]
        mask: Tensor | None = None,  # [B, N] bool
        grid: Grid | None = None,
    ) -> Tensor:  # [B, N, C]
        """Let the valid tokens (mask True) attend to one another; the others come out as 0."""
        projected = self.query_key_value(zero_padding(x, mask)).unflatten(
            -1, (3, self.num_heads, -1)
        )
        query, key, value = projected.permute(2, 0, 3, 1, 4)  # each [B, H, N, D]
        output = self.attend(query, key, value, mask)
        return zero_padding(self.projection(output.transpose(1, 2).flatten(2)), mask)

    def attend(
        self,
        query: Tensor,  # [B, H, N, D]
        key: Tensor,  # [B, H, N, D]
        value: Tensor,  # [B, H, N, D]
        mask: Tensor | None,  # [B, N] bool
    ) -> Tensor:  # [B, H, N, D]
        """What the queries get of the valid tokens' values."""
        allowed = None
        if mask is not None:
            # A sequence without a valid token may look anywhere: a softmax of nothing is NaN.
            allowed = (mask | ~mask.any(1, keepdim=True))[:, None, None]
        return F.scaled_dot_product_attention(query, key, value, allowed)


class MeanAttention(nn.Module):
    """Gives each token the projected mean of all tokens: an attention with equal weights.

    Args:
        dim: channels C of input and output.

    Shape:
        x [B, N, C] (and mask [B, N]) to [B, N, C]; ``grid`` is taken and not used.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.projection = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        nn.init.xavier_uniform_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def forward(
        self,
        x: Tensor,  # [B, N, C]
        mask: Tensor | None = None,  # [B, N] bool
        grid: Grid | None = None,
    ) -> Tensor:  # [B, N, C]
        """Give the valid tokens (mask True) the mean of all valid tokens; the others come out as
        0."""
        x = zero_padding(x, mask)
        mean = self.projection(mean_of_valid(x, mask)).unsqueeze(1)  # [B, 1, C]
        return zero_padding(mean.expand_as(x), mask)


def make_attention(
    kind: str, dim: int, num_heads: int, num_references: int, options: dict[str, Any]
) -> nn.Module | None:
    """The attention of a network's block, None for a block without.

    Args:
        kind: of ``ATTENTIONS``.
        dim, num_heads: sizes that all kinds take.
        num_references, options: of :class:`setformer_ext.SetAttention`.
    """
    if kind == "set":
        return SetAttention(dim, num_heads, num_references, **options)
    if kind == "softmax":
        return SoftmaxAttention(dim, num_heads)
    return MeanAttention(dim) if kind == "mean" else None
