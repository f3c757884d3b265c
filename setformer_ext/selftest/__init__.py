"""``setformer selftest``: every check of the numbers, and a benchmark, on the user's own device."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import first_line
from ..timing import find_device
from . import report
from .outcome import Outcome
from .runner import run_apart, run_here
from .suite import run_suite


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--device", metavar="NAME", help="cpu, cuda or cuda:N (default: cuda if it can be used)"
    )
    parser.add_argument("--quick", action="store_true", help="a few small problems only")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write the report to this file as well"
    )
    parser.add_argument(
        "--in-process",
        action="store_true",
        help="run the checks in this very process, where a crash ends the report: for debuggers",
    )
    parser.add_argument(
        "--suite",
        type=Path,
        metavar="FOLDER",
        help="run pytest on this folder too, the tests of a checkout, with the device's backend",
    )


def run(options: argparse.Namespace) -> int:
    """Print the report as it grows; returns 0 if every check passed, else 1."""
    try:
        device = find_device(options.device)
        if options.suite is not None and not options.suite.is_dir():
            raise ValueError(f"--suite must be a folder of tests, got {options.suite}")
        if options.output is not None:
            options.output.write_text(
                "", encoding="utf-8"
            )  # a path that cannot be written shows before the work
    except (ValueError, OSError) as error:
        print(f"setformer selftest: {first_line(error)}", file=sys.stderr)
        return 1

    def write(text: str) -> None:
        print(text, flush=True)
        if options.output is not None:
            with options.output.open("a", encoding="utf-8") as file:
                print(text, file=file)

    passed = selftest(
        device, options.quick, apart=not options.in_process, suite=options.suite, write=write
    ).passed
    return 0 if passed else 1


@dataclass(frozen=True)
class Report:
    """The outcomes of all tasks, and the report as text."""

    outcomes: list[Outcome]
    text: str
    passed: bool


def selftest(
    device: torch.device | str = "cpu",
    quick: bool = False,
    *,
    apart: bool = False,
    suite: Path | None = None,
    write: Callable[[str], None] = lambda text: None,
) -> Report:
    """Run every check and measurement on the device; a failing one does not stop the others.

    Args:
        device: the CPU or a GPU, with its index.
        quick: small problems only.
        apart: run in another process, which is replaced should it crash or hang.
        suite: a folder of tests for pytest to run as well.
        write: is given each part of the report when it is known.
    """
    device = torch.device(device)
    outcomes: list[Outcome] = []
    parts: list[str] = []

    def add(*texts: str) -> None:
        for text in texts:
            parts.append(text)
            write(text)

    add(f"setformer selftest{' --quick' if quick else ''}", "", report.facts(device))
    add("", report.heading())
    for outcome in (run_apart if apart else run_here)(device, quick):
        outcomes.append(outcome)
        add(report.line(outcome))
    for text in (report.times(outcomes), report.failures(outcomes)):
        if text:
            add("", text)
    suite_passed = True
    if suite is not None:
        suite_passed, text = run_suite(suite, device)
        add("", text)
    add("", report.verdict(outcomes, suite_passed if suite else None))
    passed = suite_passed and all(outcome.status != "FAILED" for outcome in outcomes)
    return Report(outcomes, "\n".join(parts), passed)
