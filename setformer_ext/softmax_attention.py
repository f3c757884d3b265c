"""Softmax attention with the interface of SetAttention: what networks are compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layout import Grid


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
        for linear in (self.query_key_value, self.projection):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self,
        x: Tensor,  # [B, N, C]
        mask: Tensor | None = None,  # [B, N] bool
        grid: Grid | None = None,
    ) -> Tensor:  # [B, N, C]
        """Let the valid tokens (mask True) attend to one another; the others come out as 0."""
        projected = self.query_key_value(x).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = projected.permute(2, 0, 3, 1, 4)  # each [B, H, N, D]
        allowed = None
        if mask is not None:
            # A sequence without a valid token may look anywhere: a softmax of nothing is NaN.
            allowed = (mask | ~mask.any(1, keepdim=True))[:, None, None]
        output = F.scaled_dot_product_attention(query, key, value, allowed)
        output = self.projection(output.transpose(1, 2).flatten(2))
        return output if mask is None else torch.where(mask.unsqueeze(-1), output, 0)
