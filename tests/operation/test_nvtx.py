"""The ranges that profilers show, and that they cost nothing where nobody listens."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from setformer_ext import _C

pytestmark = pytest.mark.skipif(
    _C.build_info()["nvtx"] == "no", reason="compiled without the NVTX headers"
)

CALLS = """
import torch, setformer_ext
x, query, y = torch.zeros(2, 3, 7, 4), torch.zeros(2, 3, 9, 4), torch.zeros(3, 5, 4)
key = x.clone().requires_grad_()
setformer_ext.set_attention(None, key, x[..., :3], y).sum().backward()
setformer_ext.set_attention(query.double(), x.double(), x.double(), y.double(), iterations=2)
pooled, rows, columns = torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 2, 7), torch.zeros(2, 3, 2, 5)
try:
    setformer_ext._C.set_attention_forward(
        key=x, value=x, reference=y, epsilon=torch.zeros(3), pooled=pooled, rows=rows,
        columns=columns,
    )
except ValueError:
    print("refused")
"""

RANGES = """
domain setformer_ext
push set_attention_forward float32 B2 H3 N7 M5 D4 Dv3 T1
pop
push set_attention_backward float32 B2 H3 N7 M5 D4 Dv3 T1
pop
push set_attention_forward float64 B2 H3 N7 Nq9 M5 D4 Dv4 T2
pop
push set_attention_forward float32 B2 H3 N7 M5 D4 Dv4 T1
pop
refused
"""


@pytest.mark.slow
def test_ranges(tmp_path: Path) -> None:
    """Each operation is one range, which ends also where the operation fails."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc, which knows where the NVTX headers lie")
    listener = tmp_path / "listener.so"
    source = Path(__file__).with_name("nvtx_listener.cpp")
    options = ["-shared", "-Xcompiler=-fPIC", "-cudart=none", "-o", str(listener)]
    subprocess.run(["nvcc", *options, str(source)], check=True)
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    told = subprocess.run(
        [sys.executable, "-u", "-c", CALLS],
        cwd=tmp_path,
        env=os.environ | paths | {"NVTX_INJECTION64_PATH": str(listener)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout == RANGES.removeprefix("\n")
