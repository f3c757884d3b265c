"""SeT attention: self-optimal transport of tokens onto a small set of references."""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING

from . import _import_failure

# Import torch before _C: both need libgomp.so.1, and the first import decides which copy the
# process loads. It must be the copy that torch ships. With one copy there is one pool of threads,
# so that torch.set_num_threads holds for both.
try:
    import torch as _torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    _torch = None  # type: ignore[assignment]

try:
    from ._C import build_info as _build_info
except ImportError as error:
    raise ImportError(_import_failure.explain(error, _Path(__file__).parent)) from error

if _TYPE_CHECKING or _torch is not None:
    from .functional import set_attention, set_attention_varlen, set_pooling, transport_plan
    from .modules import SetAttention

    def __getattr__(name: str) -> object:
        if name == "distributed":  # when first used: torch.distributed.tensor takes its time
            return _import_module(f"{__name__}.distributed")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
else:

    def __getattr__(name: str) -> object:
        if name in __all__:
            raise ImportError(_import_failure.TORCH_IS_MISSING.format(name=f"{__name__}.{name}"))
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__: str = _build_info()["version"]

__all__ = [
    "SetAttention",
    "__version__",
    "distributed",
    "set_attention",
    "set_attention_varlen",
    "set_pooling",
    "transport_plan",
]
