"""The definition of SeT attention in plain torch: what every backend is tested against.

Each line is keyed to an equation; nothing is tiled, fused or clever, and every tensor is
differentiable any number of times. It stores N x M matrices, so it is a specification (and
the road to second derivatives), not something to train with.

Sources: Shamsolmoali et al., SeTformer (AAAI 2024, arXiv:2401.03540) for the kernel cost, the
entropic transport onto references and the exponential positional penalty; Mialon et al., OTKE
(ICLR 2021, arXiv:2006.12065) for pooling by the plan. How the M reference outputs return to N
tokens ("distribute") and the learned masses are our reading.

The potentials are written through their normalisers, ``f = log a - rows`` and
``g = log b - columns``, so that a token of mass 0 (``log a = -inf``) keeps finite potentials
and an exact derivative with respect to its mass.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


def set_attention(
    query: Tensor | None,  # [B, H, Nq, D], or None: the tokens attend to themselves
    key: Tensor,  # [B, H, N, D]
    value: Tensor,  # [B, H, N, Dv]
    reference: Tensor,  # [H, M, D] or [B, H, M, D]
    *,
    mask: Tensor | None = None,  # [B, N] bool, True = valid
    query_mask: Tensor | None = None,  # [B, Nq] bool
    query_positions: Tensor | None = None,  # [Nq, P]
    **options: Any,  # of `transport`
) -> Tensor:  # [B, H, Nq, Dv]
    """SeT attention; see :func:`setformer_ext.set_attention` for the parameters."""
    of_tokens = transport(key, reference, mask=mask, **options)
    pooled = of_tokens.collect().mT @ zero_invalid(value, mask)  # A_j = sum_i C_ij v_i
    if query is None or query is key:
        receivers = of_tokens
    else:
        options |= {"query_mask": query_mask, "query_positions": query_positions}
        receivers = transport_of_queries(query, reference, **options)
        mask = query_mask
    return zero_invalid(receivers.distribution() @ pooled, mask)


def set_pooling(
    key: Tensor,  # [B, H, N, D]
    value: Tensor,  # [B, H, N, Dv]
    reference: Tensor,  # [H, M, D] or [B, H, M, D]
    *,
    mask: Tensor | None = None,  # [B, N] bool
    **options: Any,  # of `transport`
) -> Tensor:  # [B, H, M, Dv]
    """The pooled outputs A_j = sum_i C_ij v_i, one per reference (OTKE's embedding)."""
    collected = transport(key, reference, mask=mask, **options).collect()
    return collected.mT @ zero_invalid(value, mask)


def transport_plan(
    key: Tensor,  # [B, H, N, D]
    reference: Tensor,  # [H, M, D] or [B, H, M, D]
    **options: Any,  # of `transport`
) -> Tensor:  # [B, H, N, M]
    """The plan C_ij b_j, which for T >= 1 is exp(s_ij + f_i + g_j); its columns sum to b."""
    solved = transport(key, reference, **options)
    return solved.collect() * solved.log_b.exp().unsqueeze(-2)


class Transport(NamedTuple):
    """The scaled similarities of tokens and references, the marginals and the potentials."""

    s: Tensor  # [B, H, N, M], S_ij / epsilon
    a: Tensor  # [B, H, N]
    log_b: Tensor  # [H, M] or [B, H, M]
    rows: Tensor  # [B, H, N], f = log a - rows
    columns: Tensor  # [B, H, M]
    g: Tensor  # [B, H, M]

    def collect(self) -> Tensor:  # [B, H, N, M]
        """C_ij = softmax_i(s_ij + f_i) = a_i exp(s_ij - rows_i - columns_j): columns sum to 1."""
        exponent = self.s - self.rows.unsqueeze(-1) - self.columns.unsqueeze(-2)
        return self.a.unsqueeze(-1) * exponent.clamp(max=_largest_exponent(self.s)).exp()

    def distribution(self) -> Tensor:  # [B, H, N, M]
        """R_ij = softmax_j(s_ij + g_j): rows sum to 1."""
        return torch.softmax(self.s + self.g.unsqueeze(-2), dim=-1)


def transport(
    key: Tensor,  # [B, H, N, D]
    reference: Tensor,  # [H, M, D] or [B, H, M, D]
    *,
    mask: Tensor | None = None,  # [B, N] bool, True = valid
    token_mass: Tensor | None = None,  # [B, H, N] >= 0
    reference_mass: Tensor | None = None,  # [H, M] or [B, H, M] > 0
    epsilon: float | Tensor = 0.04,  # scalar or [H]
    iterations: int = 1,
    normalize: bool = True,
    **options: Any,  # of `similarity`
) -> Transport:
    """Entropic transport of the tokens onto the references by T Sinkhorn steps."""
    key = zero_invalid(key, mask)
    if normalize:
        key, reference = unit(key), unit(reference)
    s = similarity(key, reference, **options) / _per_head(epsilon, key)
    a = token_marginal(s, token_mass, mask)
    log_b = log_reference_marginal(s, reference_mass)
    return Transport(s, a, log_b, *sinkhorn(s, a, log_b, iterations))


def transport_of_queries(
    query: Tensor,  # [B, H, Nq, D]
    reference: Tensor,  # [H, M, D] or [B, H, M, D]
    *,
    query_mask: Tensor | None,  # [B, Nq] bool
    query_positions: Tensor | None,  # [Nq, P]
    **options: Any,  # of `transport`, as for the keys
) -> Transport:
    """The second solve of cross attention, with uniform marginals."""
    options |= {"mask": query_mask, "token_mass": None, "token_positions": query_positions}
    return transport(query, reference, **options)


def unit(x: Tensor) -> Tensor:  # [..., D]
    """x / |x|, computed in float32 at least; a zero vector stays zero.

    Vectors shorter than 1e-12 also stay as they are: their direction is only rounding.
    """
    accumulate = torch.promote_types(x.dtype, torch.float32)
    short = torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True, dtype=accumulate) <= 1e-12
    # Short vectors are replaced by ones here: second derivatives of the length of 0 are NaN.
    safe = torch.where(short, 1, x)
    length = torch.linalg.vector_norm(safe, dim=-1, keepdim=True, dtype=accumulate)
    return (x / torch.where(short, 1, length)).to(x.dtype)


def similarity(
    key: Tensor,  # [B, H, N, D]
    reference: Tensor,  # [H, M, D] or [B, H, M, D]
    kernel: str = "gaussian",
    bandwidth: float | Tensor = 1.0,  # scalar or [H]
    token_positions: Tensor | None = None,  # [N, P]
    reference_positions: Tensor | None = None,  # [M, P]
    position_bandwidth: float | None = None,
) -> Tensor:  # [B, H, N, M]
    """S_ij = kappa(k_i, y_j) w_ij with w_ij = exp(-|p_i - r_j|^2 / position_bandwidth^2)."""
    if kernel == "gaussian":
        distance = squared_distance(key, reference)
        s = torch.exp(-distance / (2 * _per_head(bandwidth, key) ** 2))
    elif kernel == "linear":
        s = key @ reference.mT
    else:
        raise ValueError(f"kernel must be 'gaussian' or 'linear', got {kernel!r}")
    if token_positions is None or reference_positions is None:
        return s
    if position_bandwidth is None:
        raise ValueError("position_bandwidth must be given with positions")
    distance = squared_distance(token_positions.to(s), reference_positions.to(s))
    return s * torch.exp(-distance / position_bandwidth**2)


def squared_distance(x: Tensor, y: Tensor) -> Tensor:  # [..., N, D], [..., M, D] -> [..., N, M]
    """|x_i - y_j|^2 by expansion, kept from going negative by rounding."""
    norms = x.square().sum(-1).unsqueeze(-1) + y.square().sum(-1).unsqueeze(-2)
    return (norms - 2 * x @ y.mT).clamp_min(0)


def token_marginal(s: Tensor, token_mass: Tensor | None, mask: Tensor | None) -> Tensor:
    """a_i: the masses of the valid tokens normalised to 1; 0 everywhere if they hold none."""
    mass = s.new_ones(s.shape[:-1]) if token_mass is None else token_mass.to(s.dtype)
    if mask is not None:
        mass = torch.where(mask.unsqueeze(1), mass, 0)
    total = mass.sum(-1, keepdim=True)
    return torch.where(total == 0, 0, mass) / torch.where(total == 0, 1, total)


def log_reference_marginal(s: Tensor, reference_mass: Tensor | None) -> Tensor:  # [..., H, M]
    """log b_j: the masses of the references normalised to 1."""
    if reference_mass is None:
        return s.new_full(s.shape[1::2], -math.log(s.shape[-1]))
    mass = reference_mass.to(s.dtype)
    return mass.log() - mass.sum(-1, keepdim=True).log()


def sinkhorn(
    s: Tensor,  # [B, H, N, M]
    a: Tensor,  # [B, H, N]
    log_b: Tensor,  # [H, M] or [B, H, M]
    iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:  # [B, H, N], [B, H, M], [B, H, M]
    """T steps from g = 0; returns rows, columns and g, where f = log a - rows.

    rows_i    = logsumexp_j(s_ij + g_j)           so  f^t_i = log a_i - rows_i
    columns_j = log sum_i a_i exp(s_ij - rows_i)  so  g^t_j = log b_j - columns_j

    With T = 0, f = log a and g = 0: rows is 0 and columns only normalises collect.
    """
    rows = torch.zeros_like(a)
    g = torch.zeros_like(s[..., 0, :]) if s.shape[-2] else s.new_zeros(s.shape[:2] + s.shape[-1:])
    columns = _log_weighted_sum_exp(s, a)
    for _ in range(iterations):
        rows = torch.logsumexp(s + g.unsqueeze(-2), dim=-1)
        columns = _log_weighted_sum_exp(s - rows.unsqueeze(-1), a)
        g = log_b - columns
    return rows, columns, g


def _log_weighted_sum_exp(x: Tensor, a: Tensor) -> Tensor:  # [B, H, N, M], [B, H, N] -> [B, H, M]
    """log sum_i a_i exp(x_ij), differentiable in a_i also where a_i = 0; 0 if all a are 0."""
    if x.shape[-2] == 0:
        return x.sum(-2)
    has_mass = (a > 0).unsqueeze(-1)
    shift = torch.where(has_mass, x, -torch.inf).amax(-2, keepdim=True).detach()
    shift = torch.where(has_mass.any(-2, keepdim=True), shift, 0)
    terms = (x - shift).clamp(max=_largest_exponent(x)).exp()
    total = (a.unsqueeze(-1) * terms).sum(-2)
    return torch.where(has_mass.any(-2), total, 1).log() + shift.squeeze(-2)


def _largest_exponent(x: Tensor) -> float:
    """A bound of exponents, for tokens without mass, which no normaliser bounds: 0 * inf would be
    NaN."""
    return 0.75 * math.log(torch.finfo(x.dtype).max)


def zero_invalid(x: Tensor, mask: Tensor | None) -> Tensor:  # [B, H, N, D]
    """Cut masked tokens out of values and gradients, whatever padding they hold (even NaN)."""
    return x if mask is None else torch.where(mask[:, None, :, None], x, 0)


def _per_head(x: float | Tensor, like: Tensor) -> float | Tensor:
    """A number as it is, a tensor [], [H] or [B, H] as [..., 1, 1]."""
    return x.to(like.dtype)[..., None, None] if isinstance(x, Tensor) else x
