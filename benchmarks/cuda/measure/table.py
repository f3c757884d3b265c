"""The table of times: SeT attention by shape, size and type, its limit, torch's SDPA beside it."""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from setformer_ext import set_attention
from setformer_ext.cli.timing import DTYPES, SHAPES, Shape, inputs, step

from .device import Device, find
from .items import Item, options, work
from .limits import limit, measured_device

# 7 x 7 tokens, the last stage of a vision transformer on 224 x 224 or a window of an earlier one.
WINDOW = {"window": Shape(8, 24, 49, 32, 32, 49)}
BATCHES = (8, 128)
BATCHES_OF_LONG = (1, 8)  # of 16384 tokens, more only tell of SDPA's patience
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,  # asked for only where no other takes the problem
}


@dataclass(frozen=True)
class Case:
    """One row."""

    name: str
    shape: Shape
    dtype: str
    iterations: int
    gradient: bool

    @property
    def label(self) -> dict[str, Any]:
        """Its first cells."""
        return {
            "shape": self.name,
            "batch": self.shape.batch,
            "dtype": self.dtype,
            "T": self.iterations,
            "direction": "forward + backward" if self.gradient else "forward",
        }


def cases() -> Iterator[Case]:
    """What is most worth knowing first: the models' type, then large batches, then all the rest."""
    shapes = {name: SHAPES[name] for name in ("v2", "v3", "v1", "lang")} | WINDOW
    for dtype in ("bfloat16", "float16", "float32"):
        for large in (True, False):
            for gradient in (False, True):
                for iterations in (5, 1):
                    for name, shape in shapes.items():
                        sized = replace(shape, batch=BATCHES[large])
                        yield Case(name, sized, dtype, iterations, gradient)
                    long = replace(SHAPES["long"], batch=BATCHES_OF_LONG[large])
                    yield Case("long", long, dtype, iterations, gradient)


def emulated_cases() -> Iterator[Case]:
    """As small as can be, and counted."""
    for gradient in (False, True):
        yield Case("tiny", Shape(1, 1, 49, 32, 32, 49), "bfloat16", 1, gradient)


def main() -> None:
    """One line a row."""
    given = options()
    device = find(given.device)
    listed = emulated_cases() if device.emulated else cases()
    items = [Item(case.label, partial(measure, device, case)) for case in listed]
    work(items, given.start, given.end, device.usable)


def call_of(device: Device, case: Case) -> Callable[[], object]:
    """One call of set_attention; its inputs are made here."""
    tensors = inputs(
        case.shape, dtype=DTYPES[case.dtype], device=device.torch, gradient=case.gradient
    )

    def attention(key: torch.Tensor, value: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return set_attention(
            None, key, value, y, iterations=case.iterations, normalize=False
        )  # of unit length already

    return step(attention, tensors, case.gradient)


def measure(device: Device, case: Case) -> dict[str, Any]:
    """The row's figures."""
    call = call_of(device, case)
    call()  # the first loads the kernels
    host = device.host_microseconds(call)
    times = device.microseconds(call)
    us = statistics.median(times)
    row: dict[str, Any] = {"us": us, "least_us": min(times), "host_us": host}
    least = limit(case.shape, case.dtype, case.iterations, case.gradient, measured_device())
    if least is not None:
        row |= {"limit_us": least[0], "limit": least[1], "share": least[0] / us}
    sdpa = softmax_times(device, case.shape, case.dtype, case.gradient)
    if not sdpa:
        return row | {"sdpa": "none took it"}
    fastest = min(sdpa, key=lambda name: sdpa[name])
    ratio = sdpa[fastest] / us
    return row | {"sdpa_us": sdpa[fastest], "sdpa": fastest, "ratio": ratio, "all_sdpa_us": sdpa}


@cache
def softmax_times(device: Device, shape: Shape, dtype: str, gradient: bool) -> dict[str, float]:
    """Median microseconds of each backend of SDPA that takes these tokens."""
    tensors = inputs(shape, dtype=DTYPES[dtype], device=device.torch, gradient=gradient)[:2]
    times: dict[str, float] = {}
    for name, backend in BACKENDS.items():
        if name == "math" and times:
            continue
        try:
            with sdpa_kernel(backend):
                call = step(softmax_attention, tensors, gradient)
                times[name] = statistics.median(device.microseconds(call))
        except RuntimeError as error:  # it does not take the problem, or memory is short
            print(f"{shape} {dtype}: SDPA's {name}: {str(error).splitlines()[0]}", flush=True)
            if not device.usable():
                raise
    return times


def softmax_attention(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """As the models have it: each token asks with its key. [B, H, N, D], [B, H, N, Dv]"""
    return F.scaled_dot_product_attention(key, key, value)


if __name__ == "__main__":
    main()
