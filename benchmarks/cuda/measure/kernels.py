"""How long each kernel takes in the shapes of the table: which are worth a look inside."""

from dataclasses import asdict
from functools import partial
from typing import Any

from .device import Device, find
from .items import Item, options, work
from .results import tell
from .table import Case, call_of, cases, emulated_cases


def main() -> None:
    """bfloat16, T = 5, forward and backward, as a profiler sees them."""
    given = options()
    device = find(given.device)
    listed = [
        case
        for case in (emulated_cases() if device.emulated else cases())
        if (case.dtype == "bfloat16" and case.gradient and case.iterations == 5) or device.emulated
    ]
    items = [Item(case.label, partial(measure, device, case), "case") for case in listed]
    work(items, given.start, given.end, device.usable)


def measure(device: Device, case: Case) -> dict[str, Any]:
    """Tells each kernel of a call; returns their sum."""
    found = device.kernels(call_of(device, case))
    if not found:
        raise RuntimeError("the profiler saw no kernel of this package")
    for kernel, (launches, us) in sorted(found.items(), key=lambda each: -each[1][1]):
        sizes = asdict(case.shape)
        row = {"kernel": kernel, "shape": case.name, "batch": case.shape.batch, "sizes": sizes}
        tell("kernel", **row, launches=launches, us=us)
    return {"us": sum(us for _, us in found.values())}


if __name__ == "__main__":
    main()
