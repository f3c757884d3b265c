"""Scaling to unit length, with a backward pass of few passes over memory."""

from typing import Any

import torch
from torch import Tensor

from . import reference
from .autograd import refuse_tangents

SHORTEST = 1e-12  # shorter vectors have no direction but that of rounding


def scaled(x: Tensor) -> tuple[Tensor, Tensor]:  # [..., D] -> [..., D], [..., 1]
    """u = x / |x| and |x|, which is 1 for vectors that are too short; they stay as they are."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # Several times as fast on short rows as torch.linalg.vector_norm.
    length = wide.square().sum(-1, keepdim=True).sqrt()
    length.masked_fill_(length <= SHORTEST, 1)
    return (x / length).to(x.dtype), length


class _Unit(torch.autograd.Function):
    """:func:`scaled`, with the gradient (du - u <u, du>) / |x| + d|x| u.

    It reads and writes less than that of a quotient by a norm, and is itself differentiable, at
    zero vectors too. (A ``setup_context`` would take longer than a short row's arithmetic.)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        u, length = scaled(x)
        ctx.save_for_backward(u, length)
        return u, length

    @staticmethod
    def backward(ctx: Any, du: Tensor | None, dlength: Tensor | None) -> Tensor | None:
        u, length = ctx.saved_tensors
        gradient = None
        if du is not None:
            along = (du * u).sum(-1, keepdim=True, dtype=length.dtype)
            gradient = (torch.addcmul(du, u, along.to(u.dtype), value=-1) / length).to(u.dtype)
        if dlength is not None:
            more = (dlength * u).to(u.dtype)
            gradient = more if gradient is None else gradient + more
        return gradient


def unit(x: Tensor) -> Tensor:  # [..., D]
    """x / |x| as :func:`setformer_ext.reference.unit` defines it.

    Raises:
        NotImplementedError: for forward-mode derivatives.
    """
    # A compiler fuses the passes itself, torch.func asks for derivatives of its own, and a trace by
    # torch.jit, which does not see into the function, would keep its result as a constant.
    traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    if traced or torch._C._are_functorch_transforms_active():
        return reference.unit(x)
    refuse_tangents((x,))
    if not (torch.is_grad_enabled() and x.requires_grad):
        return scaled(x)[0]
    u: Tensor = _Unit.apply(x)[0]
    return u
