"""Builds, checks and measures the CUDA kernels on the card at hand:
`bash benchmarks/cuda/measure.sh OUTPUT`.

plan.py says which steps there are, run.py runs the process of one until its deadline, and
bounded.py sees to it that nothing of it stays; record.py keeps what was found, report.py writes
it as Markdown. Each step is a module that runs as a process of its own: machine, build, selftest,
ceilings, table, knobs, kernels, profiles, sanitize. They print their results line by line
(results.py, items.py); device.py is the card, or the emulated device in its place.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]  # of the checkout
PACKAGE = "package"  # beside the report: what was installed, or the emulated module

sys.path.append(str(ROOT / "tests" / "cuda"))  # for the emulator
