"""The Nystrom approximation of a kernel: finite features whose inner products replace it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .arguments import autocast_enabled
from .reference import similarity


def nystrom_features(
    x: Tensor,  # [B, H, N, D]
    anchor: Tensor,  # [H, P, D]
    bandwidth: float | Tensor = 1.0,  # scalar or [H]
    floor: float = 1e-5,
) -> Tensor:  # [B, H, N, P]
    """psi(x) = kappa(W W^T)^(-1/2) kappa(W x), for the gaussian kernel and anchors W.

    <psi(x), psi(y)> approximates kappa(x, y), exactly so where x or y is an anchor, and |psi| <= 1
    (Mialon et al., OTKE, ICLR 2021, section 3.3). Eigenvalues of kappa(W W^T) below ``floor``
    count as ``floor``, so anchors that coincide do no harm; they only add nothing.

    The result has x's dtype, and is computed in float32 at least.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    # Only if autocast is on: torch has no autocast for some devices, such as meta.
    autocast = autocast_enabled(x.device.type)
    with torch.autocast(x.device.type, enabled=False) if autocast else nullcontext():
        points, anchor = x.to(dtype), anchor.to(dtype)
        gram = similarity(anchor.unsqueeze(0), anchor, bandwidth=bandwidth)  # [1, H, P, P]
        kernel = similarity(points, anchor, bandwidth=bandwidth)  # [B, H, N, P]
        return (kernel @ _InverseSquareRoot.apply(gram, gram.new_full((), floor))).to(x.dtype)


class _InverseSquareRoot(torch.autograd.Function):
    """A^(-1/2) of symmetric positive matrices [..., P, P], eigenvalues raised to a floor.

    Autograd through eigh divides by differences of eigenvalues, which vanish for equal ones
    (anchors far apart: A is nearly the identity). The derivative of a function of a matrix,
    V (F * (V^T dA V)) V^T with F the divided differences of the function (Daleckii and Krein),
    needs no such division: for c = max(lambda, floor),

        (c_i^(-1/2) - c_j^(-1/2)) / (c_i - c_j) = -1 / (c_i c_j^(1/2) + c_j c_i^(1/2)).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, floor: Tensor) -> Tensor:
        eigenvalues, vectors = torch.linalg.eigh(matrix)
        return (vectors * eigenvalues.clamp(min=floor).rsqrt().unsqueeze(-2)) @ vectors.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        matrix, floor = ctx.saved_tensors
        eigenvalues, vectors = torch.linalg.eigh(matrix)
        raised = eigenvalues.clamp(min=floor)
        root = raised.sqrt()
        difference = -1 / (raised.unsqueeze(-1) * root.unsqueeze(-2)
                           + raised.unsqueeze(-2) * root.unsqueeze(-1))  # fmt: skip
        # Where the floor acts, c moves less than lambda: by (c_i - c_j) / (lambda_i - lambda_j).
        moves = eigenvalues > floor
        both = moves.unsqueeze(-1) & moves.unsqueeze(-2)
        one = moves.unsqueeze(-1) ^ moves.unsqueeze(-2)
        gap = torch.where(one, eigenvalues.unsqueeze(-1) - eigenvalues.unsqueeze(-2), 1)
        share = (raised.unsqueeze(-1) - raised.unsqueeze(-2)) / gap
        difference = difference * torch.where(one, share, both.to(share.dtype))
        gradient = vectors @ (difference * (vectors.mT @ gradient @ vectors)) @ vectors.mT
        return gradient, None
