"""Instructions of the kernels, counted by valgrind, which repeat on a busy machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setformer_ext import _C
from setformer_ext.cli.timing import Shape

ISA = "avx2"  # valgrind knows no AVX-512
CALLS = 20

# NumPy's arrays and the compiled module alone: torch would take minutes to start there.
CALL = """
import importlib.util
import numpy as np

spec = importlib.util.spec_from_file_location("_C", {module!r})
_C = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_C)
B, H, N, D, Dv, M, T = {sizes}
random = np.random.default_rng(0)

def zeros(*shape):
    return np.zeros(shape, np.float32)

def unit(*shape):
    x = random.standard_normal(shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)

given = dict(
    key=unit(B, H, N, D), value=unit(B, H, N, Dv), reference=unit(H, M, D), epsilon=0.1,
    iterations=T, output=zeros(B, H, N, Dv), pooled=zeros(B, H, M, Dv),
    rows=zeros(B, H, T + 1, N), columns=zeros(B, H, T + 1, M),
)
gradients = dict(
    grad_output=unit(B, H, N, Dv), grad_key=zeros(B, H, N, D), grad_value=zeros(B, H, N, Dv),
    grad_reference=zeros(B, H, M, D),
    grad_epsilon=zeros(B, H),
)
for _ in range({calls}):
    _C.set_attention_forward(**given)
    if {gradient}:
        _C.set_attention_backward(**given, **gradients)
"""


def can_count() -> bool:
    """Whether there is valgrind, and a kernel that it can run."""
    return shutil.which("valgrind") is not None and ISA in _C.cpu_isas_supported()


def count(shape: Shape, gradient: bool, iterations: int = 5) -> int:
    """Of one head of float32 by one thread, forward and where `gradient` backward.

    What more calls add to those of the whole process, whose start varies by some ten thousand: the
    module has no names of functions to count by.
    """
    sizes = (1, 1, shape.tokens, shape.depth, shape.value_depth, shape.references, iterations)
    one, more = (
        _count(CALL.format(module=_C.__file__, sizes=sizes, gradient=gradient, calls=calls))
        for calls in (1, 1 + CALLS)
    )
    return (more - one) // CALLS


def _count(code: str) -> int:
    """Of a process that runs this."""
    environment = {"SETFORMER_CPU_ISA": ISA, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "callgrind.out"
        subprocess.run(
            [
                *("valgrind", "--tool=callgrind", f"--callgrind-out-file={file}"),
                *(sys.executable, "-c", code),
            ],
            env=os.environ | environment,
            check=True,
            capture_output=True,
        )
        totals = re.search(r"^totals: (\d+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    assert totals is not None
    return int(totals[1])
