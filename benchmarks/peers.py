"""The operation in plain torch, two ways: what the compiled kernels are measured against."""

import torch
from torch import Tensor

from setformer_ext import reference


def definition(key: Tensor, value: Tensor, references: Tensor) -> Tensor:
    """The definition, in the log domain: [B, H, N, D], [B, H, N, Dv], [H, M, D] -> [B, H, N, Dv]."""
    return reference.set_attention(None, key, value, references)


def scaling(
    key: Tensor,  # [B, H, N, D]
    value: Tensor,  # [B, H, N, Dv]
    references: Tensor,  # [H, M, D]
    epsilon: float = 0.1,
    iterations: int = 5,
) -> Tensor:  # [B, H, N, Dv]
    """The same in scaling form: K = exp(S / epsilon) is formed once, the steps are products."""
    tokens, count = key.shape[-2], references.shape[-2]
    norms = key.square().sum(-1, keepdim=True) + references.square().sum(-1).unsqueeze(-2)
    similarity = torch.exp((key @ references.mT) - norms / 2)
    kernel = torch.exp(similarity / epsilon)  # [B, H, N, M]
    w = torch.ones_like(kernel[..., :1, :]).mT  # [B, H, M, 1]
    for _ in range(iterations):
        u = 1 / (tokens * (kernel @ w))  # [B, H, N, 1]
        columns = kernel.mT @ u
        w = 1 / (count * columns)
    pooled = (kernel.mT @ (u * value)) / columns
    return (kernel @ (w * pooled)) / (kernel @ w)
