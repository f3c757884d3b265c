"""The operation in plain torch, two ways: what the compiled kernels are measured against."""

import math

import torch
from torch import Tensor


def log_domain(
    key: Tensor,  # [B, H, N, D]
    value: Tensor,  # [B, H, N, Dv]
    references: Tensor,  # [H, M, D]
    epsilon: float = 0.1,
    iterations: int = 5,
) -> Tensor:  # [B, H, N, Dv]
    """The definition as one would write it: no masks or masses, uniform marginals."""
    s = similarity(key, references) / epsilon  # [B, H, N, M]
    log_a, log_b = -math.log(s.shape[-2]), -math.log(s.shape[-1])
    g = torch.zeros_like(s[..., :1, :])
    for _ in range(iterations):
        f = log_a - torch.logsumexp(s + g, dim=-1, keepdim=True)
        g = log_b - torch.logsumexp(s + f, dim=-2, keepdim=True)
    pooled = torch.softmax(s + f, dim=-2).mT @ value
    return torch.softmax(s + g, dim=-1) @ pooled


def similarity(key: Tensor, references: Tensor) -> Tensor:
    """exp(-|k - y|^2 / 2): [B, H, N, D], [H, M, D] -> [B, H, N, M]."""
    norms = key.square().sum(-1, keepdim=True) + references.square().sum(-1).unsqueeze(-2)
    return torch.exp(key @ references.mT - norms / 2)


def scaling(
    key: Tensor,  # [B, H, N, D]
    value: Tensor,  # [B, H, N, Dv]
    references: Tensor,  # [H, M, D]
    epsilon: float = 0.1,
    iterations: int = 5,
) -> Tensor:  # [B, H, N, Dv]
    """The same in scaling form: K = exp(S / epsilon) is formed once, the steps are products."""
    tokens, count = key.shape[-2], references.shape[-2]
    kernel = torch.exp(similarity(key, references) / epsilon)  # [B, H, N, M]
    w = torch.ones_like(kernel[..., :1, :]).mT  # [B, H, M, 1]
    for _ in range(iterations):
        u = 1 / (tokens * (kernel @ w))  # [B, H, N, 1]
        columns = kernel.mT @ u
        w = 1 / (count * columns)
    pooled = (kernel.mT @ (u * value)) / columns
    return (kernel @ (w * pooled)) / (kernel @ w)
