"""``setformer selftest``: every check of the numbers, and a benchmark, on the user's own device."""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import first_line
from .. import info
from ..timing import find_device
from . import report
from .outcome import SECTIONS, Outcome
from .runner import run_apart, run_here
from .suite import MOST_SECONDS, Suite, run_suite

SUITE = "suite"  # what --only calls the folder of --suite
EXIT_STATUS = (
    "The exit status is 0 where everything passed, 1 where something failed or was not run (or the "
    "report cannot be made), 2 for options it does not know."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.epilog = EXIT_STATUS
    parser.add_argument(
        "--device", metavar="NAME", help="cpu, cuda or cuda:N (default: cuda if it can be used)"
    )
    parser.add_argument("--quick", action="store_true", help="a few small problems only")
    parser.add_argument(
        "--only",
        action="append",
        choices=[*SECTIONS, SUITE],
        help="run this part only: smoke (each kernel family, type and direction once: seconds), "
        "speed, checks or, with --suite, suite; may be given again for another",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="write the report to this file as well, and beside it, named .json, all numbers",
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
        help="run pytest on this folder too, the tests of a checkout, with the device's backend; "
        "where pytest is missing this is skipped, and not passed",
    )
    parser.add_argument(
        "--suite-seconds",
        type=float,
        default=MOST_SECONDS,
        metavar="S",
        help="end the suite early, so that the command ends so many seconds after its start with "
        "what was found (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> int:
    """Print the report as it grows; returns 0 if everything passed, else 1."""
    only = options.only or SECTIONS
    try:
        device = find_device(options.device)
        if options.suite is None and SUITE in only:
            raise ValueError("--only suite needs the folder of the tests: --suite FOLDER")
        if options.suite is not None and not options.suite.is_dir():
            raise ValueError(f"--suite must be a folder of tests, got {options.suite}")
        if not options.suite_seconds > 0:
            raise ValueError(f"--suite-seconds must be above 0, got {options.suite_seconds}")
        json = None
        if options.output is not None:
            json = report.path_beside(options.output)
            # paths that cannot be written show before the work
            options.output.write_text("", encoding="utf-8")
            report.write_json(json, {"finished": False, "tasks": []})
    except (ValueError, OSError) as error:
        print(f"setformer selftest: {first_line(error)}", file=sys.stderr)
        return 1

    def write(text: str) -> None:
        print(text, flush=True)
        if options.output is not None:
            with options.output.open("a", encoding="utf-8") as file:
                print(text, file=file)

    passed = selftest(
        device,
        options.quick,
        sections=[section for section in SECTIONS if section in only],
        apart=not options.in_process,
        suite=options.suite,
        suite_seconds=options.suite_seconds - age(),
        write=write,
        json=json,
    ).passed
    return 0 if passed else 1


def age(process: int | str = "self") -> float:
    """Seconds since the process started, of which importing torch may be many; 0 if unknown."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0.0
    ticks = int(text.rpartition(")")[2].split()[19])  # starttime of proc(5), after the name
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


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
    sections: Collection[str] = SECTIONS,
    apart: bool = False,
    suite: Path | None = None,
    suite_seconds: float = MOST_SECONDS,
    write: Callable[[str], None] = lambda text: None,
    json: Path | None = None,
) -> Report:
    """Run checks and measurements on the device; what fails does not stop what does not need it.

    Args:
        device: the CPU or a GPU, with its index.
        quick: small problems only.
        sections: of smoke, speed and checks, which run in this order.
        apart: run in another process, which is replaced should it crash or hang.
        suite: a folder of tests for pytest to run as well.
        suite_seconds: after which all of this ends, if only the suite is left.
        write: is given each part of the report when it is known.
        json: a file for all of it as JSON (`report.as_json`).
    """
    device, start = torch.device(device), time.monotonic()
    parts: list[str] = []

    def add(*texts: str) -> None:
        for text in texts:
            parts.append(text)
            write(text)

    tasks: list[dict[str, Any]] = []
    record: dict[str, Any] = {"device": str(device), "quick": quick, "sections": list(sections)}

    def keep(**fields: Any) -> None:
        record.update(fields)
        if json is not None:
            report.write_json(json, record)

    facts = report.facts(device)
    keep(facts=facts, finished=False, tasks=tasks)
    add(f"setformer selftest{' --quick' if quick else ''}", "", info.table(facts))
    outcomes: list[Outcome] = []
    running = (run_apart if apart else run_here)(device, quick, sections)
    for section, group in itertools.groupby(running, key=lambda outcome: outcome.section):
        add("", report.heading(section))
        first = len(outcomes)
        for outcome in group:
            outcomes.append(outcome)
            tasks.append(report.as_json(outcome))
            keep()
            add(report.line(outcome))
        for text in (report.times(outcomes[first:]), report.failures(outcomes[first:])):
            if text:
                add("", text)

    of_suite: Suite | None = None
    if suite is not None:
        add("")
        of_suite = Suite(suite, device)
        for line in run_suite(of_suite, suite_seconds - (time.monotonic() - start)):
            if line:
                add(line)
            keep(suite=of_suite.to_json())
    seconds = time.monotonic() - start
    verdict = report.verdict(outcomes, of_suite, seconds)
    passed = verdict.startswith("PASSED")
    add("", verdict)
    keep(verdict=verdict, passed=passed, seconds=seconds, finished=True)
    return Report(outcomes, "\n".join(parts), passed)
