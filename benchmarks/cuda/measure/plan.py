"""The steps of a run, in their order, and how they share its time."""

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import ROOT
from .record import Record
from .run import Log, run

LEAST = 5.0  # seconds that starting a step is worth
MOST_LOST = 5  # processes of one step
PATIENCE = 45.0  # seconds until the next result of a step that tells them one by one


@dataclass(frozen=True)
class Step:
    """One process, or several: where `items` are told, one lost over an item is replaced."""

    name: str
    command: tuple[str, ...]
    least: float  # seconds that earlier steps leave for it
    most: float  # seconds that it may take
    needs: tuple[str, ...] = ()  # steps without which it cannot run
    items: bool = False  # its process takes --start and --seconds
    patience: float = PATIENCE
    environment: tuple[tuple[str, str], ...] = ()


def steps(output: Path, device: str, package: Path | None) -> list[Step]:
    """All of them; a package that was built before is not built again."""

    def python(module: str, *arguments: str) -> tuple[str, ...]:
        return (sys.executable, "-m", f"measure.{module}", "--device", device, *arguments)

    def selftest(name: str, *arguments: str) -> tuple[str, ...]:
        return python("selftest", "--output", str(output / f"{name}.txt"), *arguments)

    built = () if package else ("build",)
    smoke = ("--only", "smoke")
    suite = ("--only", "smoke", "--suite", str(ROOT / "tests"))
    build = [] if package else [Step("build", python("build"), 30, 300, ("machine",))]
    return [
        Step("machine", python("machine"), 10, 60),
        *build,
        Step("smoke", selftest("smoke", *smoke), 20, 90, built),
        Step("ceilings", python("ceilings"), 20, 60, items=True, patience=30),
        Step("table", python("table"), 100, 170, built, items=True),
        Step("knobs", python("knobs"), 25, 45, built, items=True),
        Step("selftest", selftest("selftest", "--only", "checks"), 40, 150, built),
        Step("suite", selftest("suite", *suite), 20, 120, built),
        Step("kernels", python("kernels"), 15, 30, built, items=True),
        Step("profiles", python("profiles"), 40, 120, built, items=True, patience=60),
        *(
            Step(tool, python("sanitize", "--tool", tool), least, 120, built)
            for tool, least in (("memcheck", 30), ("racecheck", 5), ("synccheck", 5))
        ),
    ]


def execute(plan: list[Step], record: Record, environment: dict[str, str]) -> list[str]:
    """Every step in turn, whatever becomes of the others; how they ended."""
    for i, step in enumerate(plan):
        missing = [name for name in step.needs if record.status(name) != "ok"]
        left = record.data["limit_s"] - record.elapsed()
        kept = sum(later.least for later in plan[i + 1 :])
        seconds = min(step.most, left, max(left - kept, step.least))
        if missing:
            record.skip(step.name, f"needs {' and '.join(missing)}, which did not succeed")
        elif seconds < LEAST:
            record.skip(step.name, f"no time left of {record.data['limit_s']:.0f} s")
        else:
            record.begin(step.name, round(seconds, 1), list(step.command))
            _run_step(step, record, seconds, environment | dict(step.environment))
    record.finish()
    return [step["status"] for step in record.data["steps"]]


def _run_step(step: Step, record: Record, seconds: float, environment: dict[str, str]) -> None:
    start = time.monotonic()
    log = Log(record.output / f"{step.name}.log")
    items = Items(record)
    while True:
        left = seconds - (time.monotonic() - start)
        command = list(step.command)
        patience = math.inf
        if step.items:
            command += ["--start", str(items.next), "--seconds", f"{left - LEAST:.1f}"]
            patience = step.patience
        ended = run(command, log, left, environment, items.add, patience)
        again = step.items and ended.status != "ok" and items.lost(ended.note)
        if not again or seconds - (time.monotonic() - start) < 2 * LEAST:
            break
    status, note = ended.status, ended.note
    if items.failed:
        status, note = "failed", f"{items.failed} of {items.told} failed" + f"; {note}" * bool(note)
    if items.skipped and status == "ok":
        status, note = "skipped", items.skipped
    record.end(status, time.monotonic() - start, note, log.end())


class Items:
    """Which of a step's items were begun and told of; results pass through to the record."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.next = self.told = self.failed = self.processes = 0
        self.begun: dict[str, Any] | None = None
        self.skipped = ""  # why nothing is done

    def add(self, result: dict[str, Any]) -> None:
        """A result, or that an item begins."""
        if result["kind"] == "begin":
            self.begun = result
            self.next = result["item"] + 1
            return
        if "item" in result:
            self.begun = None
            self.told += 1
            self.failed += "error" in result
        if result["kind"] == "skipped":
            self.skipped = result["note"]
            return
        self.record.add(result)

    def lost(self, how: str) -> bool:
        """The process has ended so; whether another can go on after the item that it was at."""
        self.processes += 1
        came_further = self.begun is not None or self.told > 0
        if self.begun is not None:
            self.add({**self.begun, "kind": "lost", "error": how})
        return came_further and self.processes < MOST_LOST
