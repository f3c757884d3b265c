"""Time and memory of the operation and of what could be used in its place.

    python benchmarks/attention [--shapes v1 v2 ...] [--competitors NAME ...] [--output FOLDER]
    python benchmarks/attention --lengths | --scaling | --small | --ragged | --check | --record

prints a line of Markdown for each competitor of each case and writes results.json, results.md and
plots into the folder. All competitors of a case run in turn, round after round; figures are
medians, with half the range between the quartiles. Peak memory is that of a process of its own.
What the processor can do (products of matrices, exponentials, copies) is measured in the same run,
and ours is given as a share of what it would take at that. Inputs have unit norm, epsilon is 0.1,
T = 5 (--iterations). Where something else runs, OMP_WAIT_POLICY=passive keeps waiting threads from
slowing all; with --threads 1, --processor-time leaves out the time that others had the core.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import peers
import torch
from cases import DIRECTIONS, OPERATIONS, OURS, Case, Result, measure, peak_memory
from check import check, record
from limits import Rates, measure_rates
from ragged import ragged
from report import HEADER, rows, slopes
from small import small_problems

from setformer_ext import _C
from setformer_ext.cli.timing import DTYPES, SHAPES, Shape, describe, find_device, keep_memory

POOLING_PEERS = ["OTKE"]
LENGTHS = [2**power for power in (8, 10, 12, 14, 16, 17, 18, 19, 20)]
LONGEST = 5.0  # seconds; who takes longer is left out of longer problems


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=["attention"])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    parser.add_argument(
        "--competitors",
        nargs="+",
        choices=[OURS, *peers.PEERS],
        metavar="NAME",
        help=f"of {', '.join([OURS, *peers.PEERS])} (default: those installed)",
    )
    parser.add_argument("--iterations", type=int, default=peers.ITERATIONS, help="T")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="with --threads 1: count the time that the process ran, not that of the clock",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument(
        "--keep-memory", action="store_true", help="give none back to the operating system"
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write JSON, table and plots")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--lengths", action="store_true", help=f"N from {LENGTHS[0]} to {LENGTHS[-1]}"
    )
    kind.add_argument("--scaling", action="store_true", help="ours, on one thread and more")
    kind.add_argument("--small", action="store_true", help="what a call costs beside its work")
    kind.add_argument(
        "--ragged", action="store_true", help="sequences of different lengths, packed and padded"
    )
    kind.add_argument("--check", action="store_true", help="fail if a kernel became slower")
    kind.add_argument("--record", action="store_true", help="write what --check compares with")
    options = parser.parse_args()
    if options.processor_time and options.threads != 1:
        parser.error("--processor-time adds up the time of all threads: give --threads 1 with it")
    clock = time.process_time if options.processor_time else time.perf_counter
    if options.check:
        problems = check()
        print("\n".join(problems), file=sys.stderr)
        return 1 if problems else 0
    if options.record:
        record()
        return 0
    if options.keep_memory:
        keep_memory()
    if options.small:
        print(small_problems(options.threads))
        return 0
    if options.ragged:
        print(ragged(options.threads))
        return 0
    device = find_device(options.device)
    names = options.competitors or [OURS, *peers.available()]
    torch.set_num_threads(options.threads)
    print(f"{describe(device)}, {_C.cpu_isa()}, torch {torch.__version__}\n")
    rates: dict[int, Rates] = {}
    if device.type == "cpu":
        counts = {1, options.threads} if options.scaling else {options.threads}
        rates = {count: measure_rates(count, clock=clock) for count in sorted(counts)}
        print("\n".join(map(str, rates.values())) + "\n")
    print(HEADER)
    results: list[Result] = []
    slow: set[tuple[str, bool]] = set()
    for case in _cases(options, str(device)):
        taking_part = _taking_part(case, names, options)
        taking_part = [name for name in taking_part if (name, case.gradient) not in slow]
        longest = LONGEST if options.lengths else math.inf
        found = measure(case, taking_part, options.rounds, longest, clock)
        slow |= {(n, case.gradient) for n in taking_part} - {
            (result.competitor, case.gradient) for result in found
        }
        if not (options.no_memory or options.scaling):
            found = [replace(r, peak=peak_memory(case, r.competitor)) for r in found]
        print("\n".join(rows(found, rates)), flush=True)
        results += found
    if options.lengths:
        print("\n" + "\n".join(slopes(results)))
    if options.output is not None:
        _write(options, results, rates)
    return 0


def _cases(options: argparse.Namespace, device: str) -> Iterator[Case]:
    shapes = [SHAPES[name] for name in options.shapes]
    if options.lengths:
        shapes = [Shape(1, 2, tokens, 64, 64, 128) for tokens in LENGTHS]
    counts = [options.threads]
    if options.scaling:
        counts = sorted({*range(1, options.threads + 1)})
    for operation in options.operations:
        for shape in shapes:
            for dtype in options.dtypes:
                for direction in options.directions:
                    for threads in counts:
                        gradient = DIRECTIONS[direction]
                        yield Case(
                            operation, shape, dtype, gradient, threads, device, options.iterations
                        )


def _taking_part(case: Case, names: list[str], options: argparse.Namespace) -> list[str]:
    if options.scaling:
        return [OURS]
    if case.operation == "pooling":
        return [name for name in names if name in (OURS, *POOLING_PEERS)]
    return names


def _write(options: argparse.Namespace, results: list[Result], rates: dict[int, Rates]) -> None:
    from plots import draw_lengths, draw_roofline, draw_threads

    folder = options.output
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "isa": _C.cpu_isa(),
        "torch": torch.__version__,
        "rates": [asdict(rate) for rate in rates.values()],
        "results": [result.as_json() for result in results],
    }
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    lines = [HEADER]
    for case in dict.fromkeys(result.case for result in results):
        lines += rows([result for result in results if result.case == case], rates)
    limits = "\n".join(map(str, rates.values()))
    (folder / "results.md").write_text(f"{limits}\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
    if options.scaling:
        draw_threads(results, folder / "threads.png")
    elif options.lengths:
        draw_lengths(results, folder / "lengths.png")
    elif rates:
        draw_roofline(results, rates[options.threads], folder / "roofline.png")


if __name__ == "__main__":
    sys.exit(main())
