"""What the tests of benchmarks/cuda/measure share."""

import json
import os
from pathlib import Path
from typing import Any

import setformer_ext

CUDA = Path(__file__).resolve().parents[2] / "benchmarks" / "cuda"
PACKAGE = Path(setformer_ext.__file__).parents[1]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(CUDA), str(PACKAGE), os.environ.get("PYTHONPATH", "")]),
    "PYTHONUNBUFFERED": "1",
    "OMP_NUM_THREADS": "1",
}


def record_of(folder: Path) -> dict[str, Any]:
    """The report, as far as the run has come."""
    read = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert isinstance(read, dict)
    return read


def ended(record: dict[str, Any]) -> dict[str, str]:
    """How each step did."""
    return {step["name"]: step["status"] for step in record["steps"]}
