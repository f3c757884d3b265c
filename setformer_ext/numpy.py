"""The operation on NumPy arrays, without torch: results are allocated, arguments checked.

``setformer_ext._C`` below it takes any DLPack array, writes into the caller's memory and has the
gradient.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._C import set_attention_forward
from .errors import first_line
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
    with _errors_of("set_attention", options):
        arrays = _arrays(key, reference, options)
        of_queries = {"query": query, "query_mask": query_mask, "query_positions": query_positions}
        if query is None:
            for name, x in of_queries.items():
                if x is not None:
                    raise ValueError(f"{name} must be None in self attention")
        else:
            arrays |= _converted(of_queries, arrays["key"])
        arrays["value"] = _native("value", value)
        tokens = arrays.get("query", arrays["key"]).shape[:3]
        output = np.empty((*tokens, *arrays["value"].shape[-1:]), arrays["key"].dtype)
        set_attention_forward(**arrays, output=output)
    return output


@answers_foreign_names
def set_pooling(key: Array, value: Array, reference: Array, **options: Unpack[Options]) -> Array:
    """The pooled outputs A_j of :func:`set_attention`, [B, H, M, Dv] of the key's type."""
    with _errors_of("set_pooling", options):
        arrays = _arrays(key, reference, options) | {"value": _native("value", value)}
        return _solve(arrays)["pooled"].astype(arrays["key"].dtype)


@answers_foreign_names
def transport_plan(key: Array, reference: Array, **options: Unpack[Options]) -> Array:
    """The plan of :func:`set_attention`, [B, H, N, M] of the key's type.

    Computed by pooling the N x N identity matrix with the kernels, in O(N^2 M).
    """
    with _errors_of("transport_plan", options):
        arrays = _arrays(key, reference, options)
        key = arrays["key"]
        tokens = (*key.shape, 0, 0, 0)[2]
        identity = np.eye(tokens, max(tokens, 1), dtype=key.dtype)
        # One for all heads. (Older NumPys hand out no array that numpy.broadcast_to made.)
        shape, strides = (*key.shape[:2], *identity.shape), (0, 0, *identity.strides)
        value = np.lib.stride_tricks.as_strided(identity, shape, strides[-len(shape) :])
        pooled = _solve(arrays | {"value": value})["pooled"][..., :tokens]  # C, [B, H, M, N]
    mass = arrays.get("reference_mass", np.ones(pooled.shape[2], pooled.dtype))
    plan = pooled * (mass / mass.sum(-1, keepdims=True))[..., None]
    return plan.swapaxes(2, 3).astype(key.dtype)


@contextmanager
def _errors_of(function: str, options: Mapping[str, object]) -> Iterator[None]:
    """Errors name the public function, whichever function finds them.

    Raises:
        TypeError: at once, for options that are none.
    """
    for name in options:
        if name not in Options.__annotations__:
            raise TypeError(f"{function}() got an unexpected keyword argument '{name}'")
    try:
        yield
    except (ValueError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        message = first_line(error).removeprefix("set_attention_forward: ")
        raise kind(f"{function}: {message}") from None


def _arrays(key: Array, reference: Array, options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments in the form of the compiled module, which checks them."""
    key = _native("key", key)
    # Other defaults are the compiled module's own.
    given = {"reference": reference, "epsilon": 0.04, "iterations": 1, "normalize": True, **options}
    if given.get("position_bandwidth") is None and any(
        given.get(name) is not None for name in ("token_positions", "reference_positions")
    ):
        raise ValueError("position_bandwidth must be given together with positions")
    return {"key": key, **_converted(given, key)}


def _converted(given: Mapping[str, Any], key: Array) -> dict[str, Any]:
    """Arguments in the types that the compiled module takes; without those that are None."""
    converted: dict[str, Any] = {}
    for name, x in given.items():
        if name == "kernel":
            converted[name] = str(x)
        elif name == "iterations":
            converted[name] = _number(operator.index, name, x)
        elif name == "normalize":
            if not isinstance(x, bool):
                raise TypeError(f"normalize must be a bool, got {x!r}")
            converted[name] = x
        elif x is None:
            continue
        elif name == "position_bandwidth":
            converted[name] = _number(float, name, x)
        elif name in ("query", "reference", "mask", "query_mask"):
            converted[name] = _native(name, x)
        else:
            numbers = _accumulate(name, x, key)
            converted[name] = numbers if numbers.ndim else numbers.item()  # one for all heads
    return converted


def _number(convert: Callable[[Any], Any], name: str, x: object) -> Any:
    try:
        if isinstance(x, bool):
            raise TypeError
        return convert(x)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {x!r}") from None


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
        raise TypeError(f"{name} must be an array of numbers, got {type(x).__name__}")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _accumulate(name: str, x: ArrayLike, key: Array) -> Array:
    """Numbers in the type that is computed in: float64 for float64 keys, else float32."""
    array = _native(name, x)
    if array.dtype.kind not in "fiu":
        return array  # the compiled module refuses it
    return array.astype(np.float64 if key.dtype == np.float64 else np.float32)
