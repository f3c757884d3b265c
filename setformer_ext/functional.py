"""set_attention, set_pooling and transport_plan: the public functions."""

import inspect
from typing import Any

import torch
from torch import Tensor

from . import (
    plain,
    transforms,  # noqa: F401  (registers vmap, autocast and FLOP counts)
)
from . import reference as definition
from .arguments import Arguments
from .autograd import differentiable_call
from .foreign import answers_foreign_names
from .ops import Problem, accumulate_dtype
from .reference import zero_invalid
from .unit import unit

__all__ = ["set_attention", "set_pooling", "transport_plan"]


@answers_foreign_names
def set_attention(
    query: Tensor | None,
    key: Tensor,
    value: Tensor,
    reference: Tensor,
    *,
    mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    token_mass: Tensor | None = None,
    reference_mass: Tensor | None = None,
    kernel: str = "gaussian",
    bandwidth: float | Tensor = 1.0,
    epsilon: float | Tensor = 0.04,
    iterations: int = 1,
    token_positions: Tensor | None = None,
    query_positions: Tensor | None = None,
    reference_positions: Tensor | None = None,
    position_bandwidth: float | None = None,
    normalize: bool = True,
) -> Tensor:
    """SeT attention: tokens are pooled onto references by entropic transport and read back.

    With ``S_ij = kappa(k_i, y_j) w_ij`` and the potentials f, g of ``iterations`` Sinkhorn steps
    on ``S / epsilon`` (:func:`setformer_ext.reference.sinkhorn`)::

        C_ij = softmax_i(S_ij / epsilon + f_i)      A_j = sum_i C_ij v_i     (collect)
        R_ij = softmax_j(S_ij / epsilon + g_j)      O_i = sum_j R_ij A_j     (distribute)

    Both are averages: outputs stay within the convex hull of the values. O(N M) time and
    O(T (N + M)) memory, forward and backward; the gradient is the exact one of the T steps.

    Source: Shamsolmoali et al., SeTformer (AAAI 2024, arXiv:2401.03540). The kernel cost, the
    references, the entropic transport and the positional penalty are the paper's; distribute, the
    masses and all default values are our reading.

    Args:
        query: [B, H, Nq, D]. ``None`` or ``key`` itself is self attention, with one solve for both
            sides. Anything else is cross attention: the queries' potentials come from a second
            solve against the same references, with uniform marginals over the valid queries.
        key: [B, H, N, D], float32, float64, bfloat16 or float16. Any strides.
        value: [B, H, N, Dv], of the key's type.
        reference: [H, M, D] (learned) or [B, H, M, D] (computed from the input), M >= 1, of the
            key's type.
        mask: bool [B, N], True = valid. Masked tokens hold no mass; in self attention their output
            is 0. Their gradient is 0 whatever they contain.
        query_mask: bool [B, Nq], for cross attention: outputs of masked queries are 0.
        token_mass: [B, H, N] >= 0, floating: the marginal a, up to its sum. Uniform if None. A
            token of mass 0 gives nothing and still receives.
        reference_mass: [H, M] or [B, H, M] > 0, floating: the marginal b, up to its sum.
        kernel: ``"gaussian"``, exp(-|k - y|^2 / (2 bandwidth^2)), or ``"linear"``, <k, y>.
        bandwidth: > 0, a number or a tensor, scalar or [H], with gradient.
        epsilon: > 0, the entropy; a number or a tensor, scalar or [H], with gradient.
        iterations: T >= 0. T = 0 leaves f = log a, g = 0: two softmax attentions in a row.
        token_positions: [N, P], P = 1, 2 or 3 coordinates, floating, without gradient. Together
            with ``reference_positions`` they weigh S by
            w_ij = exp(-|p_i - r_j|^2 / position_bandwidth^2).
        query_positions: [Nq, P], for cross attention; w = 1 for the queries if None.
        reference_positions: [M, P].
        position_bandwidth: > 0, required with positions.
        normalize: scale keys, queries and references to unit length first, with a gradient through
            it; zero vectors stay zero. The gaussian kernel then lies in [exp(-2 / bandwidth^2), 1],
            whatever scale the inputs have. With False vectors are taken as they are: the gaussian
            kernel of unit variance and D = 32 is 1e-14 nearly everywhere, and the output the mean.

    Returns:
        [B, H, Nq, Dv] of the key's type (Nq = N in self attention). Under autocast query, key,
        value and reference take the autocast type. Computation is in float32 (float64 for float64).

    With DTensors (then all tensors must be, but for positions that all processes have alike) each
    process works on its own samples or heads, where they are sharded on those; what is sharded on
    the tokens is gathered first, which :func:`setformer_ext.distributed.set_attention` does
    without.

    On CUDA all work goes onto the current stream of the tensors' device, without waiting for it: a
    call can be captured in a CUDA graph, after one call outside of it. Values of tensors are
    therefore not checked there: a bandwidth, epsilon or reference mass <= 0 and a negative token
    mass make the results of their head NaN.

    Raises:
        ValueError: a shape, size, device or value that does not fit; it names the argument.
        TypeError: an argument of the wrong type, or of another attention: it names ours.
        NotImplementedError: forward-mode derivatives (jvp, jacfwd).
        RuntimeError: CUDA refuses to launch a kernel.
    """
    if query is key:
        query = None
    positions = (token_positions, query_positions, reference_positions, position_bandwidth)
    if all(x is None for x in positions):
        masks = (mask, query_mask, token_mass, reference_mass)
        found = plain.set_attention(
            query,
            key,
            value,
            reference,
            *masks,
            kernel,
            bandwidth,
            epsilon,
            iterations,
            normalize,
        )
        if found is not None:
            return found
    problem = attention_problem(
        Arguments("set_attention", key),
        query=query,
        key=key,
        value=value,
        reference=reference,
        mask=mask,
        query_mask=query_mask,
        token_mass=token_mass,
        reference_mass=reference_mass,
        kernel=kernel,
        bandwidth=bandwidth,
        epsilon=epsilon,
        iterations=iterations,
        token_positions=token_positions,
        query_positions=query_positions,
        reference_positions=reference_positions,
        position_bandwidth=position_bandwidth,
        normalize=normalize,
    )
    output: Tensor = differentiable_call("set_attention", *problem)[0]
    return output


@answers_foreign_names
def set_pooling(
    key: Tensor,
    value: Tensor,
    reference: Tensor,
    *,
    mask: Tensor | None = None,
    token_mass: Tensor | None = None,
    reference_mass: Tensor | None = None,
    kernel: str = "gaussian",
    bandwidth: float | Tensor = 1.0,
    epsilon: float | Tensor = 0.04,
    iterations: int = 1,
    token_positions: Tensor | None = None,
    reference_positions: Tensor | None = None,
    position_bandwidth: float | None = None,
    normalize: bool = True,
) -> Tensor:
    """The pooled outputs ``A_j = sum_i C_ij v_i`` of :func:`set_attention`, one per reference.

    This is the optimal-transport kernel embedding of Mialon et al. (ICLR 2021, arXiv:2006.12065).
    Arguments and errors are those of :func:`set_attention`.

    Returns:
        [B, H, M, Dv] of the key's type.
    """
    arguments = Arguments("set_pooling", key)
    problem = _problem(
        arguments,
        value,
        reference,
        mask,
        token_mass,
        reference_mass,
        kernel,
        bandwidth,
        epsilon,
        iterations,
        token_positions,
        reference_positions,
        position_bandwidth,
        normalize,
        distribute=False,
    )
    output, pooled, *_ = differentiable_call("set_attention", *problem)
    result: Tensor = pooled.to(output.dtype)
    return result


@answers_foreign_names
def transport_plan(
    key: Tensor,
    reference: Tensor,
    *,
    mask: Tensor | None = None,
    token_mass: Tensor | None = None,
    reference_mass: Tensor | None = None,
    kernel: str = "gaussian",
    bandwidth: float | Tensor = 1.0,
    epsilon: float | Tensor = 0.04,
    iterations: int = 1,
    token_positions: Tensor | None = None,
    reference_positions: Tensor | None = None,
    position_bandwidth: float | None = None,
    normalize: bool = True,
) -> Tensor:
    """The plan ``b_j C_ij``: what moves from token i to reference j.

    For T >= 1 that is ``exp(S_ij / epsilon + f_i + g_j)``. Its columns sum to the reference
    marginal b, its rows to the token marginal a as T grows. Arguments and errors are those of
    :func:`set_attention`, but that there are forward-mode derivatives, too. For looking at, and for
    losses on the plan: it stores N x M numbers, by the definition in plain torch, in float32 at
    least.

    Returns:
        [B, H, N, M] of the key's type.
    """
    arguments = Arguments("transport_plan", key)
    problem = _problem(
        arguments,
        key,  # the plan has no values: these stand in where all problems have them
        reference,
        mask,
        token_mass,
        reference_mass,
        kernel,
        bandwidth,
        epsilon,
        iterations,
        token_positions,
        reference_positions,
        position_bandwidth,
        normalize,
    )
    storage = arguments.storage_type
    problem = problem.in_storage_type(storage).in_storage_type(accumulate_dtype(storage))
    names = inspect.signature(definition.transport_plan).parameters.keys() - {"normalize"}
    # Contiguous, so that torch's products round alike whatever the strides.
    given: dict[str, Any] = {
        name: x.contiguous() if isinstance(x, Tensor) else x
        for name, x in problem._asdict().items()
        if name in names
    }
    with torch.autocast(key.device.type, enabled=False):
        plan = definition.transport_plan(**given, normalize=False)
    return plan.to(storage)


def attention_problem(
    arguments: Arguments,
    *,
    key: Tensor,
    query: Tensor | None,
    value: Tensor,
    reference: Tensor,
    mask: Tensor | None,
    query_mask: Tensor | None,
    token_mass: Tensor | None,
    reference_mass: Tensor | None,
    kernel: str,
    bandwidth: float | Tensor,
    epsilon: float | Tensor,
    iterations: int,
    token_positions: Tensor | None,
    query_positions: Tensor | None,
    reference_positions: Tensor | None,
    position_bandwidth: float | None,
    normalize: bool,
) -> Problem:
    """Checks the arguments of ``set_attention``, whose key ``arguments`` has checked."""
    batch, heads, tokens, depth = key.shape
    if query is not None:
        arguments.storage("query", query, [("B", batch), ("H", heads), ("Nq", None), ("D", depth)])
        queries = ("Nq", query.shape[2])
        arguments.mask("query_mask", query_mask, [("B", batch), queries])
    else:
        queries = ("Nq", tokens)
        for name, x in (("query_mask", query_mask), ("query_positions", query_positions)):
            if x is not None:
                expected = "None in self attention (mask and token_positions serve both sides)"
                raise arguments.value_error(name, expected, type(x).__name__)
    return _problem(
        arguments,
        value,
        reference,
        mask,
        token_mass,
        reference_mass,
        kernel,
        bandwidth,
        epsilon,
        iterations,
        token_positions,
        reference_positions,
        position_bandwidth,
        normalize,
        query=query,
        query_mask=query_mask,
        query_positions=(query_positions, queries),
    )


def _problem(
    arguments: Arguments,
    value: Tensor,
    reference: Tensor,
    mask: Tensor | None,
    token_mass: Tensor | None,
    reference_mass: Tensor | None,
    kernel: str,
    bandwidth: float | Tensor,
    epsilon: float | Tensor,
    iterations: int,
    token_positions: Tensor | None,
    reference_positions: Tensor | None,
    position_bandwidth: float | None,
    normalize: bool,
    *,
    query: Tensor | None = None,
    query_mask: Tensor | None = None,
    query_positions: tuple[Tensor | None, tuple[str, int]] | None = None,
    offsets: Tensor | None = None,
    query_offsets: Tensor | None = None,
    distribute: bool = True,
) -> Problem:
    """Checks what the public functions share and brings it into the form of the operations."""
    key = arguments.key
    batch, heads, tokens, depth = key.shape
    b, h, n = ("B", batch), ("H", heads), ("N", tokens)
    each = b if offsets is None else ("S", offsets.shape[0] - 1)
    arguments.storage("value", value, [b, h, n, ("Dv", None)])
    if value.shape[3] < 1:
        raise arguments.value_error("value", "[B, H, N, Dv] with Dv >= 1", list(value.shape))
    per_head = [h, ("M", None), ("D", depth)]
    arguments.storage("reference", reference, per_head, [each, *per_head])
    m = ("M", reference.shape[-2])
    if reference.shape[-2] < 1:
        raise arguments.value_error("reference", "[.., M, D] with M >= 1", list(reference.shape))
    arguments.mask("mask", mask, [b, n])
    arguments.mass("token_mass", token_mass, [b, h, n], zero=True)
    arguments.mass("reference_mass", reference_mass, [h, m], [each, h, m], zero=False)
    arguments.kernel(kernel)
    arguments.positive("bandwidth", bandwidth, heads)
    arguments.positive("epsilon", epsilon, heads)
    arguments.iterations(iterations)
    queried = query_positions or (None, n)
    arguments.positions(
        {
            "token_positions": (token_positions, n),
            "query_positions": queried,
            "reference_positions": (reference_positions, m),
        },
        position_bandwidth,
    )
    arguments.flag("normalize", normalize)
    if normalize:
        key, reference = unit(zero_invalid(key, mask)), unit(reference)
        query = None if query is None else unit(zero_invalid(query, query_mask))

    accumulate = accumulate_dtype(key.dtype)
    problem = Problem(
        key=key,
        value=value,
        reference=reference,
        bandwidth=_by_head(bandwidth, heads, key, accumulate),
        epsilon=_by_head(epsilon, heads, key, accumulate),
        query=query,
        mask=mask,
        query_mask=query_mask,
        token_mass=_to(token_mass, accumulate),
        reference_mass=_to(reference_mass, accumulate),
        token_positions=_to(token_positions, accumulate),
        query_positions=_to(queried[0], accumulate),
        reference_positions=_to(reference_positions, accumulate),
        offsets=offsets,
        query_offsets=query_offsets,
        kernel=kernel,
        position_bandwidth=float(position_bandwidth or 1.0),
        iterations=iterations if isinstance(iterations, torch.SymInt) else int(iterations),
        distribute=distribute,
    )
    if arguments.distributed:
        from .distributed.sharding import placed  # registers how operations are cut, too

        problem = placed(problem)
    return problem


def _by_head(x: float | Tensor, heads: int, key: Tensor, dtype: torch.dtype) -> Tensor:  # [H]
    if isinstance(x, Tensor):
        return x.to(dtype).expand(heads)
    return key.new_full((heads,), float(x), dtype=dtype)  # a DTensor where the key is one


def _to(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)
