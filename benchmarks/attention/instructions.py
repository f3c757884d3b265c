"""Instructions of the kernels, counted by valgrind, which repeat exactly on a busy machine."""

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

# NumPy's arrays and the compiled module alone: torch would take minutes to start there.
CALL = """
import importlib.util
import numpy as np

spec = importlib.util.spec_from_file_location("_C", {module!r})
_C = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_C)
STORAGE, ACCUMULATE = np.dtype("{dtype}"), np.float32
B, H, N, D, Dv, M, T = {sizes}
random = np.random.default_rng(0)

def zeros(*shape, dtype=STORAGE):
    return np.zeros(shape, dtype)

def unit(*shape):
    x = random.standard_normal(shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(STORAGE)

given = dict(
    key=unit(B, H, N, D), value=unit(B, H, N, Dv), reference=unit(H, M, D), epsilon=0.1,
    iterations=T, output=zeros(B, H, N, Dv), pooled=zeros(B, H, M, Dv, dtype=ACCUMULATE),
    rows=zeros(B, H, T + 1, N, dtype=ACCUMULATE), columns=zeros(B, H, T + 1, M, dtype=ACCUMULATE),
)
gradients = dict(
    grad_output=unit(B, H, N, Dv), grad_key=zeros(B, H, N, D), grad_value=zeros(B, H, N, Dv),
    grad_reference=zeros(B, H, M, D, dtype=ACCUMULATE),
    grad_epsilon=zeros(B, H, dtype=ACCUMULATE),
)
for _ in range({calls}):
    _C.set_attention_forward(**given)
    if {gradient}:
        _C.set_attention_backward(**given, **gradients)
"""


def can_count() -> bool:
    """Whether there is valgrind, and a kernel that it can run."""
    return shutil.which("valgrind") is not None and ISA in _C.cpu_isas_supported()


def count(shape: Shape, dtype: str, gradient: bool, iterations: int = 5) -> int:
    """Of one head by one thread, forward and where `gradient` backward.

    What a second call adds to those of the whole process: the module has no names of functions.
    """
    sizes = (1, 1, shape.tokens, shape.depth, shape.value_depth, shape.references, iterations)
    one, two = (
        _count(
            CALL.format(
                module=_C.__file__, sizes=sizes, dtype=dtype, gradient=gradient, calls=calls
            )
        )
        for calls in (1, 2)
    )
    return two - one


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
