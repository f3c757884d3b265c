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
            fmean(run.milliseconds for run in runs),
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


def table(runs: Iterable[Run], tasks: Iterable[str]) -> str:
    """Markdown: a table for each task."""
    runs = list(runs)
    parts = []
    for task in tasks:
        of_task = cells(runs, task)
        if not of_task:
            continue
        lines = [
            f"{task}: {TASKS[task].about}"
            + (" (tells nothing: softmax is not clear of none)" if tells(of_task) is False else ""),
            "",
            "| mixer | accuracy | against softmax | ms a step | MiB | parameters | learning rate |",
            "| --- | --- | --- | --: | --: | --: | --: |",
        ]
        for mixer, cell in of_task.items():
            verdict = ""
            if "softmax" in of_task and mixer != "softmax":
                spreads = difference(cell, of_task["softmax"])
                verdict = "level" if abs(spreads) <= 1 else "ahead" if spreads > 0 else "behind"
            lines.append(
                f"| {mixer} | {cell.mean:.4f} ± {cell.spread:.4f} | {verdict} "
                f"| {cell.milliseconds:.0f} | {cell.mebibytes:.0f} | {cell.parameters:,} "
                f"| {cell.learning_rate:g} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
