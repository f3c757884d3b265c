"""The functions of the compiled module, whose own docstring describes the arrays."""

from collections.abc import Callable
from typing import Any, Literal, Protocol

class SupportsDLPack(Protocol):
    """An array of NumPy, torch, CuPy, JAX and others."""

    def __dlpack__(self, *, stream: Any = None) -> Any: ...

# DLPack capsules are taken too, and None for arrays that are not given.
Array = SupportsDLPack | Any
Merge = Callable[[list[Any], Literal["sum", "logsum"]], None]

class Operation(Protocol):
    def __call__(
        self,
        kernel: str = "gaussian",
        position_bandwidth: float = 1.0,
        iterations: int = 1,
        normalize: bool = False,
        max_seqlen: int = 0,
        max_seqlen_query: int = 0,
        stream: int = 0,
        workspace: Callable[[int], Array] | None = None,
        merge: Merge | None = None,
        **arrays: Array,
    ) -> None: ...

# Writes output, pooled, rows and columns.
set_attention_forward: Operation
# Writes the gradients of forward's inputs, from these and from what forward wrote.
set_attention_backward: Operation

def cpu_isa() -> Literal["baseline", "avx2", "avx512", "avx512_bf16"]:
    """The instruction set in use; SETFORMER_CPU_ISA overrides the choice."""

def cpu_isas_supported() -> list[str]:
    """All instruction sets that were compiled and that this processor has."""

def max_threads() -> int:
    """Threads a call may use; torch.set_num_threads sets it."""

def build_info() -> dict[str, str]:
    """What this module was compiled with."""

def cuda_driver_version() -> str:
    """Empty where there is no CUDA driver."""

def cuda_devices() -> list[str]:
    """One line a device, and whether this module has code for it."""
