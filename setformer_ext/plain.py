"""Calls that torch's dispatcher would do nothing to but pass them on, and so need not see.

What comes between a function of torch and its kernel (derivatives, vmap, autocast, tracing, modes,
subclasses of tensors) costs tens of microseconds also where there is none of it: as much as a small
problem takes. So do the checks of arguments; here the kernel's own have to do, and whoever finds a
fault calls again by the way that names it.
"""

import threading
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import ops
from .unit import scaled

# Who wants to see calls with a tensor on the CPU, and who all calls of a thread, where nobody but
# the kernels and autograd does: without and with inference mode.
_keys = torch._C._dispatch_keys
_included = torch._C._dispatch_tls_local_include_set
_excluded = torch._C._dispatch_tls_local_exclude_set
_KEYS: list[object] = []
_STATES: list[tuple[object, object]] = []


def _look_at_unwatched_calls() -> None:
    for inference in (False, True):
        with torch.inference_mode(inference):
            _KEYS.append(_keys(torch.empty(0, device="cpu")))
            _STATES.append((_included(), _excluded()))


# In a thread of its own: whoever imports this may do so within any mode.
_thread = threading.Thread(target=_look_at_unwatched_calls)
_thread.start()
_thread.join()


def is_plain(tensors: Iterable[object]) -> bool:
    """Whether an operation on these is no more than its kernel on the CPU."""
    if torch.compiler.is_compiling():
        return False
    if (
        (_included(), _excluded()) not in _STATES
        or torch._C._len_torch_function_stack() > 0
        or forward_ad._current_level >= 0
        or torch._C._autograd._profiler_enabled()
    ):
        return False
    gradient = torch.is_grad_enabled()
    for x in tensors:
        if type(x) is not Tensor and type(x) is not nn.Parameter:
            return False
        if _keys(x) not in _KEYS or (gradient and x.requires_grad):
            return False
    return True


def set_attention(
    query: Tensor | None,  # [B, H, Nq, D]
    key: Tensor,  # [B, H, N, D]
    value: Tensor,  # [B, H, N, Dv]
    reference: Tensor,  # [H, M, D] or [B, H, M, D]
    mask: Tensor | None,  # [B, N]
    query_mask: Tensor | None,  # [B, Nq]
    token_mass: Tensor | None,  # [B, H, N]
    reference_mass: Tensor | None,  # [H, M] or [B, H, M]
    kernel: str,
    bandwidth: float | Tensor,
    epsilon: float | Tensor,
    iterations: int,
    normalize: bool,
) -> Tensor | None:  # [B, H, Nq, Dv]
    """The output of :func:`setformer_ext.set_attention` without positions; None where the call is
    not plain, or has a fault."""
    given = {"key": key, "value": value, "reference": reference}
    for name, x in (
        ("query", query),
        ("mask", mask),
        ("query_mask", query_mask),
        ("token_mass", token_mass),
        ("reference_mass", reference_mass),
    ):
        if x is not None:
            given[name] = x
    if not (
        is_plain(given.values())
        and _is_moderate(bandwidth)
        and _is_moderate(epsilon)
        and type(iterations) is int
        and type(normalize) is bool
        and kernel in ("gaussian", "linear")
        and key.numel() > 0
        and not (mask is not None and token_mass is not None)  # of which the kernel sees a part
    ):
        return None
    try:
        if normalize:
            for name in given.keys() & {"key", "query", "reference"}:
                given[name] = scaled(given[name])[0]
        rows = key if query is None else query
        output = ops.empty_rows(rows, value.shape[3])
        options = {"kernel": kernel, "iterations": iterations}
        numbers = {"bandwidth": float(bandwidth), "epsilon": float(epsilon)}
        ops.run("set_attention_forward", {**given, **options, **numbers, "output": output})
    except Exception:  # whatever it is, the usual way tells
        return None
    return output


def _is_moderate(x: object) -> bool:
    """A positive number that float32 holds."""
    return (type(x) is float or type(x) is int) and 1e-30 < x < 1e30
