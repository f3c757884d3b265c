"""A few shapes under each design that environment variables choose, beside the default.

Kernels' launchers read them once a process, so each design has a process of its own.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from setformer_ext.timing import SHAPES

from .device import find
from .items import Item, options, work
from .table import WINDOW, Case, call_of, emulated_cases

DESIGNS: tuple[dict[str, str], ...] = (
    {},
    {"SETFORMER_CUDA_RESIDENT": "0"},
    *({"SETFORMER_CUDA_TILES": str(tiles)} for tiles in (1, 2, 8, 16)),
    {"SETFORMER_CUDA_RESIDENT": "0", "SETFORMER_CUDA_TILES": "1"},
)
SECONDS = 25  # of one design
INNER = "MEASURE_KNOBS_INNER"  # set in the process that measures


def cases() -> Iterator[Case]:
    """Those on whose design there is something to choose."""
    for gradient in (False, True):
        yield Case("window", replace(WINDOW["window"], batch=128), "bfloat16", 5, gradient)
        for name, batch in (("v3", 8), ("v3", 128), ("v2", 8), ("v2", 128), ("v1", 8), ("lang", 8)):
            yield Case(name, replace(SHAPES[name], batch=batch), "bfloat16", 5, gradient)


def main() -> None:
    """One line a design; its columns are microseconds."""
    given = options()
    if os.environ.get(INNER):
        print(json.dumps(measure(given.device)))
        return
    items = [
        Item({"design": label(design)}, partial(apart, design, given.device)) for design in DESIGNS[: 2 if given.device == "emulated" else None]
    ]
    work(items, given.start, given.seconds, lambda: True)


def label(design: dict[str, str]) -> str:
    """As one would type it."""
    return " ".join(f"{name}={value}" for name, value in design.items()) or "default"


def apart(design: dict[str, str], device: str) -> dict[str, Any]:
    """The figures of a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "measure.knobs", "--device", device],
        env=os.environ | design | {INNER: "1"},
        stdout=subprocess.PIPE,
        encoding="utf-8",
        timeout=SECONDS,
    )
    if done.returncode != 0:
        raise RuntimeError(f"its process ended with status {done.returncode}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(name: str) -> dict[str, Any]:
    """Median microseconds by case."""
    device = find(name)
    return {
        f"{case.name} B={case.shape.batch} {'f+b' if case.gradient else 'f'}": statistics.median(
            device.microseconds(call_of(device, case))
        )
        for case in (emulated_cases() if device.emulated else cases())
    }


if __name__ == "__main__":
    main()
