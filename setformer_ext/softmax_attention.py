"""Softmax attention with the interface of SetAttention: what networks are compared with."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .layout import Grid


class SoftmaxAttention(nn.Module):
    """Multi-head dot-product attention, a drop-in for :class:`setformer_ext.SetAttention`.

    Args:
        dim: channels C of input and output, a multiple of ``num_heads``.
        num_heads: heads H.

    Shape:
        x [B, N, C] to [B, N, C]; ``grid`` is taken and not used.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.projection = nn.Linear(dim, dim)
        for linear in (self.query_key_value, self.projection):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:  # [B, N, C] -> [B, N, C]
        projected = self.query_key_value(x).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = projected.permute(2, 0, 3, 1, 4)  # each [B, H, N, D]
        output = F.scaled_dot_product_attention(query, key, value)
        return self.projection(output.transpose(1, 2).flatten(2))
