"""The table of what is on record, and what it says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from .costs import Cost
from .markdown import row
from .mixers import MIXERS
from .records import Run
from .schedule import SEEDS, chosen
from .tasks import TASKS

CLEAR = 3.0  # spreads by which softmax attention must beat no mixer for a task to tell anything
LEVEL = 1.6  # spreads within which two means of three seeds are level, as 95 % of equals are


@dataclass(frozen=True)
class Cell:
    """A mixer on a task, over the seeds."""

    mean: float
    spread: float  # standard deviation of the seeds
    parameters: int
    learning_rate: float

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Cell:
        """Of a run for each seed."""
        tests = [run.test for run in runs if run.test is not None]
        return cls(fmean(tests), stdev(tests), runs[0].parameters, runs[0].plan.learning_rate)


def cells(runs: Iterable[Run], task: str) -> dict[str, Cell]:
    """The mixers that have all their runs on record."""
    runs = list(runs)
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


def verdict(one: Cell, other: Cell) -> str:
    """Ahead of the other, behind it, or level."""
    spreads = difference(one, other)
    return "level" if abs(spreads) <= LEVEL else "ahead" if spreads > 0 else "behind"


def summary(runs: Iterable[Run], tasks: Iterable[str]) -> str:
    """Markdown: a row for each task that tells something, a column for each mixer."""
    runs = list(runs)
    lines = [row("task", *MIXERS), row("---", *["---"] * len(MIXERS))]
    for task in tasks:
        of_task = cells(runs, task)
        if tells(of_task):
            accuracies = (
                f"{cell.mean:.3f} ± {cell.spread:.3f}" if (cell := of_task.get(mixer)) else ""
                for mixer in MIXERS
            )
            lines.append(row(task, *accuracies))
    return "\n".join(lines)


def details(runs: Iterable[Run], task: str, costs: dict[str, Cost]) -> str:
    """Markdown: a task's own table, a row for each mixer."""
    of_task = cells(runs, task)
    silent = "; tells nothing, for softmax is not clear of none" if tells(of_task) is False else ""
    lines = [
        f"{task}: {TASKS[task].about}{silent}",
        "",
        row(
            *("mixer", "accuracy", "beside softmax", "SeT beside it", "ms a step", "MiB a step"),
            *("parameters", "learning rate"),
        ),
        row(*["---"] * 4, *["--:"] * 4),
    ]
    for mixer, cell in of_task.items():
        beside_softmax, beside_set = (
            verdict(*pair) if all(pair) and pair[0] is not pair[1] else ""
            for pair in ((cell, of_task.get("softmax")), (of_task.get("SeT"), cell))
        )
        cost = costs.get(mixer)
        lines.append(
            row(
                mixer,
                f"{cell.mean:.4f} ± {cell.spread:.4f}",
                beside_softmax,
                beside_set,
                f"{cost.milliseconds:.0f}" if cost else "",
                f"{cost.mebibytes:.0f}" if cost else "",
                f"{cell.parameters:,}",
                f"{cell.learning_rate:g}",
            )
        )
    return "\n".join(lines)
