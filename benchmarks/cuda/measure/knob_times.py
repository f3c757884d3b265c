"""The shapes that knobs.py compares, in this process's design."""

import statistics
from collections.abc import Iterator
from dataclasses import replace

from setformer_ext.cli.timing import SHAPES

from .device import find
from .items import options
from .results import tell
from .table import WINDOW, Case, call_of, emulated_cases


def cases() -> Iterator[Case]:
    """Those that both resident and streaming kernels take, few heads and many."""
    for gradient in (False, True):
        yield Case("window", replace(WINDOW["window"], batch=128), "bfloat16", 5, gradient)
        for name, batch in (("v3", 8), ("v3", 128), ("v2", 8), ("v2", 128), ("v1", 8), ("lang", 8)):
            yield Case(name, replace(SHAPES[name], batch=batch), "bfloat16", 5, gradient)


def main() -> None:
    """Median microseconds, by a name short enough for a column."""
    device = find(options().device)
    for case in emulated_cases() if device.emulated else cases():
        direction = "f+b" if case.gradient else "f"
        us = statistics.median(device.microseconds(call_of(device, case)))
        tell("time", case=f"{case.name} B={case.shape.batch} {direction}", us=us)


if __name__ == "__main__":
    main()
