"""A few shapes under each design that environment variables choose, beside the default.

The launchers of the kernels read them once a process, so each design has a process of its own.
"""

import os
import sys
from functools import partial
from typing import Any

from . import bounded
from .items import Item, options, work
from .results import read

DESIGNS: tuple[dict[str, str], ...] = (
    {},
    {"SETFORMER_CUDA_RESIDENT": "off"},
    *({"SETFORMER_CUDA_TILES": str(tiles)} for tiles in (2, 8, 1, 16)),
    {"SETFORMER_CUDA_RESIDENT": "off", "SETFORMER_CUDA_TILES": "1"},
)
EMULATED = 2  # of them, where times mean nothing
SECONDS = 35  # of one design


def main() -> None:
    """One line a design; its columns are microseconds."""
    given = options()
    designs = DESIGNS[:EMULATED] if given.device == "emulated" else DESIGNS
    items = [Item({"design": label(x)}, partial(measure, x, given.device)) for x in designs]
    work(items, given.start, given.end, lambda: True)


def label(design: dict[str, str]) -> str:
    """As one would type it."""
    return " ".join(f"{name}={value}" for name, value in design.items()) or "default"


def measure(design: dict[str, str], device: str) -> dict[str, Any]:
    """What knob_times.py tells in a process of this design."""
    command = [sys.executable, "-m", "measure.knob_times", "--device", device]
    done = bounded.run(command, SECONDS, env=os.environ | design)
    if done.returncode != 0:
        raise RuntimeError(f"its process ended with status {done.returncode}: see the log")
    results = [result for line in done.stdout.splitlines() if (result := read(line))]
    return {result["case"]: result["us"] for result in results}


if __name__ == "__main__":
    main()
