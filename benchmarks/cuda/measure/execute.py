"""Runs the steps of a plan, whatever becomes of each."""

import time
from typing import Any

from .outcomes import out_of_time, outcomes
from .plan import END, Step
from .record import Record
from .run import Ended, Log, run

MARGIN = 5.0  # seconds for a step to start in, and to end in
MOST_LOST = 5  # processes of one step


def execute(plan: list[Step], record: Record, environment: dict[str, str]) -> list[str]:
    """Every step in turn, whatever becomes of the others; how they ended."""
    for i, step in enumerate(plan):
        missing = [name for name in step.needs if record.status(name) != "ok"]
        left = record.data["limit_s"] - record.elapsed()
        # what cannot run without this step is worth no time that this step lacks
        kept = sum(later.least for later in plan[i + 1 :] if step.name not in later.needs)
        needed = MARGIN if step.tells_as_it_goes else max(MARGIN, step.least)
        seconds = min(step.most, left, max(left - kept, step.least))
        if missing:
            record.skip(step.name, f"needs {' and '.join(missing)}, which is not ok")
        elif seconds < needed:
            reason = f"no time left of {record.data['limit_s']:.0f} s: needs {needed:.0f}, has "
            record.skip(step.name, reason + f"{max(0, seconds):.0f}")
        else:
            record.begin(step.name, round(seconds, 1), list(step.command))
            try:
                _run_step(step, record, seconds, environment)
            except KeyboardInterrupt:
                record.end("interrupted")
                raise
            except Exception as error:  # of this script, or of the disk
                record.end("failed", f"{type(error).__name__}: {error}")
    record.finish()
    return [step["status"] for step in record.data["steps"]]


def _run_step(step: Step, record: Record, seconds: float, environment: dict[str, str]) -> None:
    end = time.monotonic() + seconds
    log = Log(record.output / f"{step.name}.log")
    items = Items(record)
    while True:
        # on the clock of all processes: theirs begins when Python and torch are loaded
        command = [word.replace(END, f"{end - MARGIN:.1f}") for word in step.command]
        if step.items:
            command += ["--start", str(items.next)]
        left = end - time.monotonic()
        ended = run(command, log, left, environment, items.add, step.patience)
        again = step.items and ended.status != "ok" and items.lost(ended)
        if not again or end - time.monotonic() < 2 * MARGIN:
            break
    status, note = ended.status, ended.note
    if step.outcomes is not None:
        for result in outcomes(step.outcomes):
            record.add(result)
        if status == "failed" and (cut := out_of_time(step.outcomes)):
            status, note = "timed out", cut
    if items.failed:
        status, note = "failed", f"{items.failed} of {items.told} failed" + f"; {note}" * bool(note)
    if items.skipped and status == "ok":
        status, note = "skipped", items.skipped
    record.end(status, note, log.end())


class Items:
    """Which of a step's items were begun and told of; results pass through to the record."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.next = self.told = self.failed = self.processes = 0
        self.begun: dict[str, Any] | None = None
        self.skipped = ""  # why nothing is done

    def add(self, result: dict[str, Any]) -> None:
        """A result, or that an item begins."""
        kind, item = result["kind"], result.get("item")
        if kind == "begin":
            self.begun, self.next = result, (item or 0) + 1
        elif kind == "skipped":
            self.skipped = str(result.get("note"))
        else:
            self.record.add(result)
            if item is not None:
                self.begun = None
                self.told += 1
                self.failed += "error" in result

    def lost(self, ended: Ended) -> bool:
        """The process has ended so; whether another can go on after the item that it was at."""
        self.processes += 1
        came_further = self.begun is not None or self.told > 0
        if ended.status == "timed out":
            if self.begun is not None:
                self.record.add({**self.begun, "kind": "left out", "why": "no time"})
            return False
        if self.begun is not None:
            self.add({**self.begun, "kind": "lost", "error": ended.note})
        return came_further and self.processes < MOST_LOST
