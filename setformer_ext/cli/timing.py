"""What ``profile``, ``selftest`` and the benchmarks share: device, shapes, inputs, milliseconds."""

import ctypes
import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .._C import build_info
from ..errors import UserError


@dataclass(frozen=True)
class Shape:
    """Sizes of a self attention."""

    batch: int  # B
    heads: int  # H
    tokens: int  # N
    depth: int  # D
    value_depth: int  # Dv
    references: int  # M

    def __str__(self) -> str:
        return (
            f"B={self.batch} H={self.heads} N={self.tokens} M={self.references} "
            f"D={self.depth} Dv={self.value_depth}"
        )


SHAPES = {
    "v1": Shape(8, 3, 3136, 32, 32, 49),  # the four stages of a vision transformer on 224 x 224
    "v2": Shape(8, 6, 784, 32, 32, 49),
    "v3": Shape(8, 12, 196, 32, 32, 49),
    "v4": Shape(8, 24, 49, 32, 32, 49),
    "lang": Shape(8, 12, 512, 64, 64, 64),
    "long": Shape(1, 8, 16384, 64, 64, 128),
}
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def why_no_cuda() -> str | None:
    """Why this build and this torch cannot use a GPU; None if they can."""
    build = build_info()
    if not build["cuda_runtime"]:
        return f"setformer_ext holds no CUDA kernels ({build['cuda']}); install it where nvcc is"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA; install one built with it"
    if not torch.cuda.is_available():
        return "torch finds no usable NVIDIA GPU; `setformer info` says what the driver reports"
    return None


def find_device(name: str | None) -> torch.device:
    """The device of this name; without one, the current GPU if it can be used, else the CPU.

    Raises:
        UserError: there is no such device, or it cannot be used; it says why.
    """
    reason = why_no_cuda()
    if name is None:
        name = "cpu" if reason else "cuda"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise UserError(f"--device must be cpu, cuda or cuda:N, got {name or 'nothing'}")
    if reason:
        raise UserError(f"--device {name} cannot be used: {reason}")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise UserError(
            f"--device must be one of the {torch.cuda.device_count()} GPUs torch finds, "
            f"cuda:0 and so on, got {name}"
        )
    return torch.device("cuda", index)


def keep_memory() -> None:
    """Make the C library keep freed memory. Giving it back to the operating system and getting it
    again, page by page, takes long, and happens or not depending on earlier allocations."""
    mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not (mallopt(mmap_max, 0) and mallopt(trim_threshold, -1)):
        print("this C library does not keep memory when told to", file=sys.stderr)


def describe(device: torch.device) -> str:
    """The device's name, and the GPU's model."""
    if device.type == "cpu":
        return f"the CPU ({torch.get_num_threads()} threads)"
    return f"{device} ({torch.cuda.get_device_name(device)})"


def inputs(
    shape: Shape,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    gradient: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Key [B, H, N, D] and references [H, M, D] of unit length, value [B, H, N, Dv].

    Made on the device itself, because a CPU takes seconds for large ones. A GPU therefore gets
        other numbers.
    """
    rng = torch.Generator(device).manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=rng, device=device)

    key = F.normalize(normal(shape.batch, shape.heads, shape.tokens, shape.depth), dim=-1)
    value = normal(shape.batch, shape.heads, shape.tokens, shape.value_depth)
    reference = F.normalize(normal(shape.heads, shape.references, shape.depth), dim=-1)
    key, value, reference = (x.to(dtype) for x in (key, value, reference))
    for x in (key, value, reference):
        x.requires_grad_(gradient)
    return key, value, reference


def step(
    attention: Callable[..., Tensor], tensors: tuple[Tensor, ...], gradient: bool
) -> Callable[[], object]:
    """One forward of attention(*tensors); with backward, for the tensors that it uses."""
    if not gradient:

        def forward() -> Tensor:
            with torch.no_grad():
                return attention(*tensors)

        return forward
    with torch.no_grad():
        grad_output = torch.randn_like(attention(*tensors))
    return lambda: torch.autograd.grad(attention(*tensors), tensors, grad_output, allow_unused=True)


def by_the_clock(
    call: Callable[[], object], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Milliseconds until each of `repeats` calls in a row returns, on any device."""
    times = []
    for _ in range(repeats):
        start = clock()
        call()
        times.append(1e3 * (clock() - start))
    return times


def milliseconds(call: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """The time of each of `repeats` calls in a row.

    On a GPU that is the time between two events in the stream, so that nothing waits between the
    calls. If launching takes longer than the work, it is the time of launching.
    """
    if device.type != "cuda":
        return by_the_clock(call, repeats)
    with torch.cuda.device(device):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        events[-1].synchronize()
        return [start.elapsed_time(end) for start, end in itertools.pairwise(events)]
