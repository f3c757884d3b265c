"""Trainings by the command line, each of them once, and their figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean, stdev

from setformer_ext import cli


def train(folder: Path, *given: str) -> None:
    """``setformer train`` with these arguments into a folder, or the rest of it."""
    if (folder / "metrics.json").exists():
        print(f"{folder}: trained before, not again", file=sys.stderr)
        return
    if cli.main(["train", *given, f"--output={folder}", "--resume"]):
        sys.exit(1)


def best(folder: Path, metric: str) -> float:
    """A figure of the best evaluation."""
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["best"][metric]


def cell(values: list[float], digits: int = 4) -> str:
    """Mean and standard deviation."""
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{spread}"
