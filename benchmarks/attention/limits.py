"""What the processor can do, measured, and what a case would take if it did nothing but that.

A forward pass needs, for each pair of a token and a reference, a product of D for the similarity
and two of Dv for pooling and distributing, each two operations, four operations for each of T steps
of Sinkhorn, and two exponentials (of the gaussian kernel and of S / epsilon). A backward pass needs
those of the similarity again, two more products of D (gradients of key and reference), four of Dv
(of the plan and of the values, on both ways) and eight operations a step. Each input is read and
each output written once.

    limit = max(operations / sgemm rate + exponentials / exponential rate, bytes / copy rate)
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from setformer_ext.cli.timing import Shape

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "csrc"


@dataclass(frozen=True)
class Rates:
    """Per second, of all threads together."""

    threads: int
    multiply_add: float  # operations, two for each multiply-add, of registers alone
    bfloat16_multiply_add: float  # the same of AVX512_BF16's products; 0 where there are none
    sgemm: float  # operations of torch's product of large matrices
    exponential: float
    copy: float  # bytes, read and written

    def __str__(self) -> str:
        return (
            f"{self.threads} threads: multiply-add {self.multiply_add / 1e9:.0f} Gflop/s (bfloat16 "
            f"{self.bfloat16_multiply_add / 1e9:.0f}), sgemm "
            f"{self.sgemm / 1e9:.0f} Gflop/s, exp {self.exponential / 1e9:.1f} G/s, copy "
            f"{self.copy / 1e9:.1f} GB/s"
        )


@dataclass(frozen=True)
class Work:
    """What a case cannot do without."""

    operations: float
    exponentials: float
    bytes: float

    def seconds(self, rates: Rates) -> float:
        """The limit."""
        computing = self.operations / rates.sgemm + self.exponentials / rates.exponential
        return max(computing, self.bytes / rates.copy)


def count_work(shape: Shape, iterations: int, gradient: bool, element_bytes: int) -> Work:
    """Of set_attention on this shape, forward or forward and backward."""
    heads = shape.batch * shape.heads
    pairs = heads * shape.tokens * shape.references
    D, Dv, T = shape.depth, shape.value_depth, iterations
    operations = pairs * (2 * D + 4 * Dv + 4 * T)
    elements = heads * shape.tokens * (D + 2 * Dv) + shape.heads * shape.references * D
    if gradient:
        operations += pairs * (2 * D + 4 * D + 8 * Dv + 8 * T)
        elements *= 2  # of each input its gradient, of the output that which comes in
    return Work(operations, pairs * (4 if gradient else 2), elements * element_bytes)


def measure_rates(
    threads: int, seconds: float = 0.5, clock: Callable[[], float] = time.perf_counter
) -> Rates:
    """Measure each for so long; torch's product by this clock.

    Raises:
        OSError: there is no C++ compiler.
        subprocess.CalledProcessError: it cannot compile rates.cpp.
    """
    with tempfile.TemporaryDirectory() as folder:
        library = ctypes.CDLL(str(_compile(Path(folder))))
        found = []
        for name in (
            "multiply_add_rate",
            "bfloat16_multiply_add_rate",
            "exponential_rate",
            "copy_rate",
        ):
            function = getattr(library, name)
            function.argtypes, function.restype = (ctypes.c_int, ctypes.c_double), ctypes.c_double
            found.append(function(threads, seconds))
    multiply_add, bfloat16, exponential, copy = found
    sgemm = _sgemm_rate(threads, seconds, clock)
    return Rates(threads, multiply_add, bfloat16, sgemm, exponential, copy)


def _compile(folder: Path) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise OSError("the machine's limits need a C++ compiler, and none was found: set CXX")
    library = folder / "rates.so"
    flags = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", f"-I{SOURCES}"]
    subprocess.run([compiler, *flags, str(HERE / "rates.cpp"), "-o", str(library)], check=True)
    return library


def _sgemm_rate(threads: int, seconds: float, clock: Callable[[], float]) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    size = 768
    a, b, product = (torch.randn(size, size) for _ in range(3))
    best, end = 0.0, clock() + seconds
    while clock() < end:
        start = clock()
        torch.mm(a, b, out=product)
        best = max(best, 2 * size**3 / (clock() - start))
    torch.set_num_threads(before)
    return best
