"""The operation on NumPy arrays, without torch: results are allocated, arguments checked.

``setformer_ext._C`` below it takes any DLPack array, writes into the caller's memory and has the
gradient.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._C import set_attention_forward
from .foreign import answers_foreign_names

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["set_attention", "set_pooling", "transport_plan"]

Array = NDArray[Any]


class Options(TypedDict, total=False):
    """What all functions take; see :func:`set_attention`."""

    mask: Array | None  # [B, N] bool, True = valid
    token_mass: ArrayLike | None  # [B, H, N] >= 0
    reference_mass: ArrayLike | None  # [H, M] or [B, H, M] > 0
    kernel: str  # "gaussian" or "linear"
    bandwidth: ArrayLike  # > 0, a number or [H]
    epsilon: ArrayLike  # > 0, a number or [H]
    iterations: int  # T >= 0
    token_positions: ArrayLike | None  # [N, P]
    reference_positions: ArrayLike | None  # [M, P]
    position_bandwidth: float | None  # > 0
    normalize: bool


@answers_foreign_names
def set_attention(
    query: Array | None,
    key: Array,
    value: Array,
    reference: Array,
    *,
    query_mask: Array | None = None,
    query_positions: ArrayLike | None = None,
    **options: Unpack[Options],
) -> Array:
    """SeT attention, as :func:`setformer_ext.set_attention` defines it, of NumPy arrays.

    Args:
        query: [B, H, Nq, D]; ``None`` or ``key`` itself is self attention.
        key: [B, H, N, D], float32, float64 or float16.
        value: [B, H, N, Dv], of the key's type.
        reference: [H, M, D] or [B, H, M, D], of the key's type.
        query_mask: bool [B, Nq], for cross attention.
        query_positions: [Nq, P], for cross attention.
        options: those of ``setformer_ext.set_attention``, with its defaults: mask, token_mass,
            reference_mass, kernel, bandwidth, epsilon, iterations, token_positions,
            reference_positions, position_bandwidth, normalize.

    Returns:
        [B, H, Nq, Dv] of the key's type (Nq = N in self attention).

    Raises:
        ValueError: a shape or value that does not fit; it names the argument.
        TypeError: an argument of the wrong type.
    """
    if query is key:
        query = None
    arrays = _arrays(key, reference, **options)
    if query is None:
        for name, x in (("query_mask", query_mask), ("query_positions", query_positions)):
            if x is not None:
                raise ValueError(f"set_attention: {name} must be None in self attention")
    else:
        arrays["query"] = _native("query", query)
        if query_mask is not None:
            arrays["query_mask"] = _native("query_mask", query_mask)
        if query_positions is not None:
            arrays["query_positions"] = _accumulate(
                "query_positions", query_positions, arrays["key"]
            )
    arrays["value"] = _native("value", value)
    tokens = arrays.get("query", arrays["key"]).shape[:3]
    output = np.empty((*tokens, *arrays["value"].shape[-1:]), arrays["key"].dtype)
    set_attention_forward(**arrays, output=output)
    return output


@answers_foreign_names
def set_pooling(key: Array, value: Array, reference: Array, **options: Unpack[Options]) -> Array:
    """The pooled outputs A_j of :func:`set_attention`, [B, H, M, Dv] of the key's type."""
    arrays = _arrays(key, reference, **options)
    arrays["value"] = _native("value", value)
    return _solve(arrays)["pooled"].astype(arrays["key"].dtype)


@answers_foreign_names
def transport_plan(key: Array, reference: Array, **options: Unpack[Options]) -> Array:
    """The plan of :func:`set_attention`, [B, H, N, M] of the key's type.

    Computed by pooling the N x N identity matrix with the kernels, in O(N^2 M).
    """
    arrays = _arrays(key, reference, **options)
    key = arrays["key"]
    tokens = (*key.shape, 0, 0, 0)[2]
    identity = np.eye(tokens, max(tokens, 1), dtype=key.dtype)
    # One for all heads. (Older NumPys hand out no array that numpy.broadcast_to made.)
    strides = (0,) * len(key.shape[:2]) + identity.strides
    value = np.lib.stride_tricks.as_strided(identity, (*key.shape[:2], *identity.shape), strides)
    pooled = _solve(arrays | {"value": value})["pooled"][..., :tokens]  # C, [B, H, M, N]
    mass = arrays.get("reference_mass", np.ones(pooled.shape[2], pooled.dtype))
    plan = pooled * (mass / mass.sum(-1, keepdims=True))[..., None]
    return plan.swapaxes(2, 3).astype(key.dtype)


def _arrays(
    key: Array,
    reference: Array,
    *,
    kernel: str = "gaussian",
    bandwidth: ArrayLike = 1.0,
    epsilon: ArrayLike = 0.04,
    iterations: int = 1,
    position_bandwidth: float | None = None,
    normalize: bool = True,
    mask: Array | None = None,
    **others: Any,
) -> dict[str, Any]:
    """The arguments in the form of the compiled module, which checks them."""
    arrays: dict[str, Any] = {
        "key": _native("key", key),
        "reference": _native("reference", reference),
    }
    if not isinstance(normalize, bool):
        raise TypeError(f"set_attention: normalize must be a bool, got {normalize!r}")
    for name, x in (("bandwidth", bandwidth), ("epsilon", epsilon), *others.items()):
        if x is not None:
            numbers = _accumulate(name, x, arrays["key"])
            arrays[name] = numbers if numbers.ndim else numbers.item()  # one for all heads
    if mask is not None:
        arrays["mask"] = _native("mask", mask)
    if position_bandwidth is not None:
        arrays["position_bandwidth"] = _number(float, "position_bandwidth", position_bandwidth)
    elif arrays.keys() & {"token_positions", "reference_positions"}:
        raise ValueError("set_attention: position_bandwidth must be given together with positions")
    steps = _number(operator.index, "iterations", iterations)
    return arrays | {"kernel": str(kernel), "iterations": steps, "normalize": normalize}


def _number(convert: Callable[[Any], Any], name: str, x: object) -> Any:
    try:
        if isinstance(x, bool):
            raise TypeError
        return convert(x)
    except (TypeError, ValueError):
        raise TypeError(f"set_attention: {name} must be a number, got {x!r}") from None


def _solve(arrays: dict[str, Any]) -> dict[str, Array]:
    """The pooled outputs and the normalisers of every step."""
    key, value, reference = (arrays[name] for name in ("key", "value", "reference"))
    batch, heads, tokens = (*key.shape, 0, 0, 0)[:3]
    references, depth = (0, 0, *reference.shape)[-2], (0, *value.shape)[-1]
    steps, accumulate = max(arrays["iterations"], 0), _accumulate("key", 0, key).dtype
    solution: dict[str, Any] = {
        "pooled": np.empty((batch, heads, references, depth), accumulate),
        "rows": np.empty((batch, heads, steps + 1, tokens), accumulate),
        "columns": np.empty((batch, heads, max(steps, 1) + 1, references), accumulate),
    }
    set_attention_forward(**arrays, **solution)
    return solution


def _native(name: str, x: ArrayLike) -> Array:
    """In this machine's byte order, the only one that DLPack has."""
    array = np.asarray(x)
    if array.dtype.kind not in "biufc":
        raise TypeError(
            f"set_attention: {name} must be an array of numbers, got {type(x).__name__}"
        )
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _accumulate(name: str, x: ArrayLike, key: Array) -> Array:
    """Numbers in the type that is computed in: float64 for float64 keys, else float32."""
    array = _native(name, x)
    if array.dtype.kind not in "fiu":
        return array  # the compiled module refuses it
    return array.astype(np.float64 if key.dtype == np.float64 else np.float32)
