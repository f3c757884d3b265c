"""What a call costs beside its work: small problems, Python's part, many heads."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from limits import count_work
from peers import ITERATIONS

from setformer_ext import ops, set_attention
from setformer_ext.cli.timing import Shape, inputs

WINDOW = Shape(1, 4, 49, 32, 32, 16)  # a window of 7 x 7 tokens
MANY = Shape(512, 4, 49, 32, 32, 16)
OPTIONS = {"iterations": ITERATIONS, "normalize": False}  # the kernels; keys are of unit length


class Clock:
    """Stands for the compiled module and adds up the time spent in it."""

    def __init__(self, module: Any) -> None:
        self.module, self.seconds = module, 0.0

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.module, name)

        def timed(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def small_problems(threads: int) -> str:
    """A table in Markdown."""
    torch.set_num_threads(threads)
    tensors = inputs(WINDOW)
    with torch.no_grad():
        call = _microseconds(lambda: set_attention(None, *tensors, **OPTIONS))
        product = _microseconds(_one_product())
        outside = _outside_of_module(tensors)
        python = _without_module(tensors)
        many = inputs(MANY)
        times = []
        for count in (1, threads):
            torch.set_num_threads(count)
            times.append(_microseconds(lambda: set_attention(None, *many, **OPTIONS), calls=5))
        scaled = [
            _microseconds(partial(set_attention, None, *x, iterations=ITERATIONS), calls=calls)
            for x, calls in ((tensors, 1000), (many, 5))
        ]
    rows = [
        ("one window of 7 x 7, forward", f"{call:.1f} us"),
        (
            "one torch.matmul of as many operations",
            f"{product:.1f} us ({call / product:.1f} times)",
        ),
        ("of that call outside of the compiled module", f"{outside:.1f} us"),
        ("the call with the compiled module replaced by nothing", f"{python:.1f} us"),
        (f"{MANY.batch} windows, {threads} threads over 1", f"{times[0] / times[1]:.2f} times"),
        ("scaling to unit length (normalize=True), one window", f"{scaled[0] / call:.2f} times"),
        (f"the same, {MANY.batch} windows", f"{scaled[1] / times[1]:.2f} times"),
    ]
    return "\n".join(["| what | |", "| --- | --: |", *(f"| {a} | {b} |" for a, b in rows)])


def _one_product() -> Callable[[], object]:
    """A product with as many operations as the window's forward pass."""
    rows = WINDOW.batch * WINDOW.heads * WINDOW.tokens
    columns = WINDOW.references
    depth = round(count_work(WINDOW, ITERATIONS, False, 4).operations / (2 * rows * columns))
    left, right = torch.randn(rows, depth), torch.randn(depth, columns)
    return lambda: torch.matmul(left, right)


def _without_module(tensors: tuple[torch.Tensor, ...]) -> float:
    """Microseconds of Python alone, its code and data in the caches."""
    module, ops._C = ops._C, SimpleNamespace(set_attention_forward=lambda **_: None)
    try:
        return _microseconds(lambda: set_attention(None, *tensors, **OPTIONS))
    finally:
        ops._C = module


def _outside_of_module(tensors: tuple[torch.Tensor, ...], calls: int = 1000) -> float:
    """Microseconds of a call that are not spent in the compiled module; the best of five runs."""
    clock, module = Clock(ops._C), ops._C
    best = float("inf")
    ops._C = clock
    try:
        for _ in range(5):
            clock.seconds, start = 0.0, time.perf_counter()
            for _ in range(calls):
                set_attention(None, *tensors, **OPTIONS)
            outside = time.perf_counter() - start - clock.seconds
            best = min(best, outside / calls)
    finally:
        ops._C = module
    return 1e6 * best


def _microseconds(call: Callable[[], object], calls: int = 1000) -> float:
    """Of one call; the best of five runs."""
    call()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - start) / calls)
    return 1e6 * best
