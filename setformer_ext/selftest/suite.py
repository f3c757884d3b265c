"""The tests of a checkout, run by pytest on one device."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import torch

LAST_LINES = 60


def run_suite(folder: Path, device: torch.device) -> tuple[bool, str]:
    """Whether pytest passed, and the end of what it printed."""
    if importlib.util.find_spec("pytest") is None:
        return False, 'needs pytest, which is not installed. In the checkout: pip install ".[test]"'
    # the tests' parameters are named after the backends: cpu, cuda, cuda-emulated
    backend = "cuda and not emulated" if device.type == "cuda" else "not cuda"
    command = [sys.executable, "-m", "pytest", "-q", "-ra", "--tb=short", "-k", backend, "."]
    done = subprocess.run(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    lines = done.stdout.splitlines()[-LAST_LINES:]
    text = "\n".join([f"pytest -k '{backend}' in {folder}, status {done.returncode}", *lines])
    return done.returncode == 0, text
