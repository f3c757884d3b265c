"""The table of what is on record, and what it says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from .mixers import MIXERS
from .records import Run
from .schedule import SEEDS, chosen
from .tasks import TASKS

CLEAR = 3.0  # spreads by which softmax attention must beat no mixer for a task to tell anything


@dataclass(frozen=True)
class Cell:
    """A mixer on a task, over the seeds."""

    mean: float
    spread: float  # standard deviation of the seeds
    milliseconds: float
    mebibytes: float
    parameters: int
    learning_rate: float

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Cell:
        tests = [run.test for run in runs if run.test is not None]
        return cls(
            fmean(tests),
            stdev(tests),
            min(run.milliseconds for run in runs),  # the others shared their core
            fmean(run.mebibytes for run in runs),
            runs[0].parameters,
            runs[0].plan.learning_rate,
        )


def cells(runs: Iterable[Run], task: str) -> dict[str, Cell]:
    """The mixers that have all their runs on record."""
    found = {mixer: chosen(runs, task, mixer) for mixer in MIXERS}
    return {mixer: Cell.of(made) for mixer, made in found.items() if len(made) == len(SEEDS)}


def difference(one: Cell, other: Cell) -> float:
    """How far one's mean is above another's, in spreads: of the difference of two single runs."""
    apart = one.mean - other.mean
    spread = math.hypot(one.spread, other.spread)
    return apart / spread if spread else math.copysign(math.inf, apart) if apart else 0.0


def tells(of_task: dict[str, Cell]) -> bool | None:
    """Whether the task needs attention: None as long as not both were run."""
    if not {"none", "softmax"} <= of_task.keys():
        return None
    return difference(of_task["softmax"], of_task["none"]) > CLEAR


def verdict(cell: Cell, softmax: Cell) -> str:
    """Beside softmax attention; within the spread of the seeds is level."""
    spreads = difference(cell, softmax)
    return "level" if abs(spreads) <= 1 else "ahead" if spreads > 0 else "behind"


def table(runs: Iterable[Run], tasks: Iterable[str]) -> str:
    """Markdown: a row for each task, a column for each mixer, and then each task's own table."""
    runs = list(runs)
    found = {task: cells(runs, task) for task in tasks}
    found = {task: of_task for task, of_task in found.items() if of_task}
    details = [_details(task, of_task) for task, of_task in found.items()]
    return "\n\n".join([*([_summary(found)] if len(found) > 1 else []), *details])


def _summary(found: dict[str, dict[str, Cell]]) -> str:
    lines = [_row("task", *MIXERS), _row("---", *["---"] * len(MIXERS))]
    for task, of_task in found.items():
        accuracies = (
            f"{of_task[mixer].mean:.3f} ± {of_task[mixer].spread:.3f}" if mixer in of_task else ""
            for mixer in MIXERS
        )
        lines.append(_row(task, *accuracies))
    return "\n".join(lines)


def _details(task: str, of_task: dict[str, Cell]) -> str:
    silent = "; tells nothing, for softmax is not clear of none" if tells(of_task) is False else ""
    lines = [
        f"{task}: {TASKS[task].about}{silent}",
        "",
        _row("mixer", "accuracy", "", "ms a step", "MiB", "parameters", "learning rate"),
        _row("---", "---", "---", "--:", "--:", "--:", "--:"),
    ]
    for mixer, cell in of_task.items():
        compared = mixer != "softmax" and "softmax" in of_task
        lines.append(
            _row(
                mixer,
                f"{cell.mean:.4f} ± {cell.spread:.4f}",
                verdict(cell, of_task["softmax"]) if compared else "",
                f"{cell.milliseconds:.0f}",
                f"{cell.mebibytes:.0f}",
                f"{cell.parameters:,}",
                f"{cell.learning_rate:g}",
            )
        )
    return "\n".join(lines)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
