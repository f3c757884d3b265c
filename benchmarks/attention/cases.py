"""One case of the benchmark: what is computed, by whom, how long it takes and what memory."""

from __future__ import annotations

import argparse
import json
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from limits import Work, count_work
from peers import EPSILON, ITERATIONS, Attention, peer

from setformer_ext import set_attention, set_pooling
from setformer_ext.cli.timing import DTYPES, Shape, by_the_clock, inputs, milliseconds, step

OURS = "setformer_ext"
# The kernels themselves, on inputs of unit length: the peers scale nothing either.
OPERATIONS = {
    "attention": partial(set_attention, None, normalize=False),
    "pooling": partial(set_pooling, normalize=False),
}
DIRECTIONS = {"forward": False, "forward + backward": True}
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """What all competitors are given."""

    operation: str  # of OPERATIONS
    shape: Shape
    dtype: str  # of DTYPES
    gradient: bool
    threads: int
    device: str = "cpu"
    iterations: int = ITERATIONS

    @property
    def direction(self) -> str:
        return "forward + backward" if self.gradient else "forward"

    @property
    def work(self) -> Work:
        """What the operation cannot do without."""
        element_bytes = DTYPES[self.dtype].itemsize
        return count_work(self.shape, self.iterations, self.gradient, element_bytes)


@dataclass(frozen=True)
class Result:
    """What one competitor took for a case."""

    case: Case
    competitor: str
    milliseconds: list[float]  # of every round
    peak: float | None = None  # MiB beyond what the process has before the inputs are made

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds)

    @property
    def spread(self) -> float:
        """Half the range between the quartiles, as a share of the median."""
        if len(self.milliseconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.milliseconds, n=4, method="inclusive")
        return (high - low) / 2 / self.median

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"median": self.median, "spread": self.spread}


def competitor(case: Case, name: str) -> Attention:
    """Ours or a peer, as a function of key, value and references."""
    if name != OURS:
        return peer(name, case.iterations)
    return partial(OPERATIONS[case.operation], epsilon=EPSILON, iterations=case.iterations)


def prepared(case: Case, name: str) -> Callable[[], object]:
    """One forward, or forward and backward, on inputs of its own."""
    tensors = inputs(
        case.shape, dtype=DTYPES[case.dtype], device=case.device, gradient=case.gradient
    )
    return step(competitor(case, name), tensors, case.gradient)


def measure(
    case: Case,
    names: Iterable[str],
    rounds: int,
    longest: float = float("inf"),
    clock: Callable[[], float] = time.perf_counter,
) -> list[Result]:
    """Times of all competitors, in turn, round after round, so that a change of the machine's speed
    meets them alike; one untimed round before. Who takes longer than `longest` seconds in that one
    is left out. `clock` tells the time on the CPU.
    """
    torch.set_num_threads(case.threads)
    device = torch.device(case.device)

    def taken(run: Callable[[], object]) -> list[float]:
        if device.type == "cpu":
            return by_the_clock(run, 1, clock)
        return milliseconds(run, device, 1)

    steps = {name: prepared(case, name) for name in names}
    for name, run in list(steps.items()):
        run()  # compiles, allocates
        if taken(run)[0] > 1e3 * longest:
            del steps[name]
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, run in steps.items():
            times[name] += taken(run)
    return [Result(case, name, measured) for name, measured in times.items()]


def peak_memory(case: Case, name: str) -> float | None:
    """MiB that a process of its own needs for the case; None if it has not enough memory."""
    request = json.dumps({"case": asdict(case), "competitor": name})
    command = [sys.executable, str(Path(__file__)), request]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, encoding="utf-8")
    return float(answer.stdout.split()[-1]) if answer.returncode == 0 else None


def _measure_own_peak(request: str) -> float:
    """Run once, after a small problem has loaded all code."""
    given = json.loads(request)
    given["case"]["shape"] = Shape(**given["case"]["shape"])
    case = Case(**given["case"])
    torch.set_num_threads(case.threads)
    small = replace(case, shape=Shape(1, 1, 64, case.shape.depth, 8, 8))
    prepared(small, given["competitor"])()
    if case.device != "cpu":
        torch.cuda.reset_peak_memory_stats(case.device)
        before = torch.cuda.memory_allocated(case.device)
        prepared(case, given["competitor"])()
        return (torch.cuda.max_memory_allocated(case.device) - before) / MIB
    before = (
        int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
        * resource.getpagesize()
    )
    prepared(case, given["competitor"])()
    # Not ru_maxrss: a process inherits that from the one that started it.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert peak, "no VmHWM in /proc/self/status"
    return (int(peak[1]) * 1024 - before) / MIB


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The peak memory of one case, in MiB.")
    parser.add_argument("request", help="JSON, from peak_memory")
    print(_measure_own_peak(parser.parse_args().request))
