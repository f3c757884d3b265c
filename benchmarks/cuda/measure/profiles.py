"""Nsight Compute's look into the kernels that take longest."""

import csv
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

from . import bounded
from .items import Item, SkippedError, options, work
from .results import found, tell

COUNT = 5
SECONDS = 40  # of one kernel
NO_PERMISSION = "ERR_NVGPUCTRPERM"
# Shown in the report, by ncu's name; all others are in the .ncu-rep beside it.
METRICS = {
    "us": "gpu__time_duration.sum",
    "SM %": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "DRAM %": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "L1 %": "l1tex__throughput.avg.pct_of_peak_sustained_active",
    "L2 %": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "issue active %": "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "occupancy %": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
    "blocks": "launch__grid_size",
}


def main() -> None:
    """One kernel each, in the shape where it takes most time."""
    given = options()
    if shutil.which("ncu") is None:
        tell("skipped", note="ncu (Nsight Compute) was not found on PATH")
        return
    kernels = largest(found("kernel"))
    if not kernels:
        sys.exit("the step `kernels` has told no kernel")
    items = [
        Item({"kernel": k["kernel"], "shape": k["shape"]}, partial(profile, k, given.device))
        for k in kernels
    ]
    work(items, given.start, given.end, lambda: True)


def largest(kernels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By the time of all their launches in one call."""
    by_name: dict[str, dict[str, Any]] = {}
    for kernel in kernels:
        known = by_name.setdefault(kernel["kernel"], kernel)
        if kernel["us"] > known["us"]:
            by_name[kernel["kernel"]] = kernel
    return sorted(by_name.values(), key=lambda kernel: -kernel["us"])[:COUNT]


def profile(kernel: dict[str, Any], device: str) -> dict[str, Any]:
    """Of its first launch; the whole report of ncu stays beside the log."""
    base = re.split("[<(]", kernel["kernel"])[0]
    file = f"{base}-{kernel['shape']}-{kernel['sizes']['batch']}"
    sizes = [f"--{name.replace('_', '-')}={size}" for name, size in kernel["sizes"].items()]
    run(
        "ncu", "--profile-from-start", "off", "--target-processes", "all",
        "--kernel-name", f"regex:^{base}$", "--launch-count", "1", "--set", "full",
        "--clock-control", "none",  # as the table's: who shares a card must not lock its clocks
        "--import-source", "yes", "--force-overwrite", "--export", file,
        sys.executable, "-m", "setformer_ext", "profile", *sizes, "--dtype", "bfloat16",
        "--device", device, "--repeats", "1", "--warmup", "1",
    )  # fmt: skip
    if not Path(f"{file}.ncu-rep").exists():
        raise RuntimeError("ncu has profiled nothing: see the log")
    raw = run(
        "ncu", "--import", f"{file}.ncu-rep", "--page", "raw", "--csv", "--print-units", "base"
    )
    return {"file": f"{file}.ncu-rep", **metrics(raw)}


def run(*command: str) -> str:
    """Its stdout, whose beginning is in the log too."""
    done = bounded.run(command, SECONDS)
    print(done.stdout[:2000], flush=True)
    if NO_PERMISSION in done.stdout:
        raise SkippedError(f"{NO_PERMISSION}: the driver lets only root read the counters")
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} ended with status {done.returncode}: see the log")
    return done.stdout


def metrics(raw: str) -> dict[str, Any]:
    """Of ncu's table: names, then units, then a line for each launch."""
    lines = [line for line in raw.splitlines() if line.startswith('"')]
    table = list(csv.reader(lines))
    if len(table) < 3:
        return {"note": "ncu's table could not be read; its file is whole"}
    values = dict(zip(table[0], table[2], strict=False))
    shown = {name: number(values.get(metric, "")) for name, metric in METRICS.items()}
    if isinstance(shown["us"], float):
        shown["us"] /= 1000  # from nanoseconds
    return shown


def number(text: str) -> float | str:
    """Without the commas between thousands; what is no number as it is."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text


if __name__ == "__main__":
    main()
