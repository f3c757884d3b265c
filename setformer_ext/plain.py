"""Calls that torch's dispatcher would do nothing to but pass them on, and so need not see.

What comes between a function of torch and its kernel (derivatives, vmap, autocast, tracing, modes,
subclasses of tensors) costs tens of microseconds also where there is none of it: as much as a small
problem takes.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def _dispatch_keys(x: Tensor) -> int:
    """Who wants to see calls with this tensor: its device's kernels, autograd, wrappers."""
    return int(torch._C._dispatch_keys(x).raw_repr())


def _thread_state() -> tuple[int, int]:
    """Who wants to see all calls of this thread, and who does not: modes, tracers, transforms."""
    included = torch._C._dispatch_tls_local_include_set().raw_repr()
    return int(included), int(torch._C._dispatch_tls_local_exclude_set().raw_repr())


_STATES, _KEYS = set(), set()  # of threads that nobody watches, and of tensors on the CPU
for inference in (False, True):
    with torch.inference_mode(inference), torch.autocast("cpu", enabled=False):
        _STATES.add(_thread_state())
        _KEYS.add(_dispatch_keys(torch.empty(0)))


def is_plain(arguments: Iterable[object]) -> bool:
    """Whether an operation with these arguments is no more than its kernel on the CPU."""
    if (
        torch.compiler.is_compiling()
        or _thread_state() not in _STATES
        or torch._C._len_torch_function_stack() > 0
        or forward_ad._current_level >= 0
        or torch._C._autograd._profiler_enabled()
    ):
        return False
    gradient = torch.is_grad_enabled()
    for x in arguments:
        if isinstance(x, Tensor):
            if type(x) is not Tensor and type(x) is not nn.Parameter:
                return False
            if _dispatch_keys(x) not in _KEYS or (gradient and x.requires_grad):
                return False
    return True
