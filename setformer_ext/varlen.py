"""set_attention_varlen: sequences of different lengths without padding."""

import torch
from torch import Tensor

from .arguments import Arguments, _is_dtensor, _readable
from .autograd import differentiable_call
from .foreign import answers_foreign_names
from .functional import _problem

__all__ = ["set_attention_varlen"]


@answers_foreign_names
def set_attention_varlen(
    query: Tensor | None,
    key: Tensor,
    value: Tensor,
    reference: Tensor,
    cu_seqlens: Tensor,
    *,
    cu_seqlens_query: Tensor | None = None,
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
    """SeT attention within each of S sequences that are packed one after another.

    Sequence s has the tokens ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]``. Its output is that of
    :func:`setformer_ext.set_attention` for this sequence alone, bit by bit, and that of a padded
    batch with a mask to rounding; nothing is computed for padding.

    Args:
        query: [Nq, H, D] of all sequences. ``None`` or ``key`` itself is self attention.
        key: [N, H, D] of all sequences, float32, float64, bfloat16 or float16. Any strides.
            No DTensor, nor is any other tensor.
        value: [N, H, Dv], of the key's type.
        reference: [H, M, D] (learned) or [S, H, M, D] (one set for each sequence).
        cu_seqlens: int32 or int64 [S + 1], ascending from 0 to N; a sequence may be empty. Read on
            the CPU: on another device that waits for it.
        cu_seqlens_query: [S + 1], ascending from 0 to Nq; for cross attention, and only there.
        token_mass: [N, H] >= 0, floating: each sequence's marginal a, up to its sum.
        reference_mass: [H, M] or [S, H, M] > 0, floating.
        kernel, bandwidth, epsilon, iterations: as in ``set_attention``.
        token_positions: [N, P], as in ``set_attention``, together with ``reference_positions``.
        query_positions: [Nq, P], for cross attention.
        reference_positions: [M, P].
        position_bandwidth: > 0, required with positions.
        normalize: scale keys, queries and references to unit length first.

    Returns:
        [Nq, H, Dv] of the key's type (Nq = N in self attention).

    Raises:
        ValueError: a shape, size, device or value that does not fit; it names the argument.
        TypeError: an argument of the wrong type.
        RuntimeError: CUDA refuses to launch a kernel.
    """
    if query is key:
        query = None
    name = "set_attention_varlen"
    if not isinstance(key, Tensor):
        raise TypeError(f"{name}: key must be a tensor, got {type(key).__name__}")
    if _is_dtensor(key):
        raise TypeError(
            f"{name}: key must be a plain tensor, got a DTensor: set_attention takes those, padded "
            "and with a mask"
        )
    if key.dim() != 3 or key.shape[2] < 1:
        raise ValueError(f"{name}: key must be [N, H, D] with D >= 1, got {list(key.shape)}")
    arguments = Arguments(name, _heads_first(key), packed=True)
    tokens, heads, depth = key.shape
    arguments.storage("value", value, [("N", tokens), ("H", heads), ("Dv", None)])
    if value.shape[2] < 1:
        raise arguments.value_error("value", "[N, H, Dv] with Dv >= 1", list(value.shape))
    offsets = _offsets(arguments, "cu_seqlens", cu_seqlens, tokens)
    queries, query_offsets = ("Nq", tokens), None
    if query is None:
        for other, x in (
            ("cu_seqlens_query", cu_seqlens_query),
            ("query_positions", query_positions),
        ):
            if x is not None:
                raise arguments.value_error(other, "None in self attention", type(x).__name__)
    else:
        arguments.storage("query", query, [("Nq", None), ("H", heads), ("D", depth)])
        queries = ("Nq", query.shape[0])
        query_offsets = _offsets(arguments, "cu_seqlens_query", cu_seqlens_query, query.shape[0])
        if query_offsets.shape != offsets.shape:
            expected = f"[S + 1={offsets.shape[0]}] as cu_seqlens is"
            raise arguments.value_error("cu_seqlens_query", expected, list(query_offsets.shape))
    if token_mass is not None:
        arguments.floating("token_mass", token_mass, [("N", tokens), ("H", heads)])
        token_mass = token_mass.t().unsqueeze(0)
    problem = _problem(
        arguments,
        _heads_first(value),
        reference,
        None,
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
        query=None if query is None else _heads_first(query),
        query_positions=(query_positions, queries),
        offsets=offsets,
        query_offsets=query_offsets,
    )
    output: Tensor = differentiable_call("set_attention", *problem)[0]
    return output.squeeze(0).transpose(0, 1)


def _heads_first(x: Tensor) -> Tensor:  # [N, H, D] -> [1, H, N, D]
    return x.transpose(0, 1).unsqueeze(0)


def _offsets(arguments: Arguments, name: str, x: object, tokens: int) -> Tensor:
    """As int64 on the CPU, ascending from 0 to ``tokens``; when tracing, the kernel checks that."""
    if not isinstance(x, Tensor) or _is_dtensor(x):
        raise arguments.type_error(name, "an int32 or int64 tensor [S + 1]", type(x).__name__)
    if x.dtype not in (torch.int32, torch.int64):
        raise arguments.type_error(name, "int32 or int64", str(x.dtype).removeprefix("torch."))
    if x.dim() != 1 or x.shape[0] < 2:
        raise arguments.value_error(name, "[S + 1] for S >= 1 sequences", list(x.shape))
    if x.device.type == "meta":
        raise arguments.value_error(name, "on a device that holds its values", x.device)
    offsets = x.to("cpu", torch.int64).contiguous()
    if _readable(offsets):
        ascends = int(offsets[0]) == 0 and int(offsets[-1]) == tokens
        if not ascends or bool((offsets.diff() < 0).any()):
            expected = f"ascending from 0 to the number of packed tokens, {tokens}"
            got = offsets.tolist() if offsets.shape[0] <= 10 else f"{offsets[0]} to {offsets[-1]}"
            raise arguments.value_error(name, expected, got)
    return offsets
