"""Time a step against accuracy: a panel for each task that tells something and was timed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from . import costs
from .mixers import MIXERS
from .records import Run
from .table import cells, tells
from .tasks import TASKS

COLOURS = {
    "none": "#9e9e9e",
    "mean": "#616161",
    "softmax": "#d1495b",
    "softmax from q = k": "#e8a0a8",
    "linear": "#edae49",
    "Performer": "#8d6a9f",
    "SeT": "#30638e",
    "SeT, T = 0": "#66a5ad",
}
COLUMNS = 3


def draw(runs: Sequence[Run], path: Path) -> None:
    """A dot for each mixer, and its spread over the seeds."""
    of_tasks = {task: cells(runs, task) for task in TASKS}
    shown = {task: x for task, x in of_tasks.items() if tells(x) and costs.load(task)}
    rows = max(1, math.ceil(len(shown) / COLUMNS))
    figure = Figure(figsize=(11, 3.2 * rows + 0.5), layout="constrained")
    panels = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for panel in panels[len(shown) :]:
        panel.set_visible(False)
    for panel, (task, found) in zip(panels, shown.items(), strict=False):
        for mixer, cost in costs.load(task).items():
            if mixer in found:
                cell, colour = found[mixer], COLOURS[mixer]
                panel.errorbar(
                    cost.milliseconds, cell.mean, cell.spread, fmt="o", color=colour, capsize=3
                )
        panel.set_title(TASKS[task].about, fontsize=9, wrap=True)
        panel.set(xlabel="milliseconds a step", ylabel="accuracy")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    handles = [
        Line2D([], [], marker="o", linestyle="", color=COLOURS[mixer], label=mixer)
        for mixer in MIXERS
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(MIXERS), frameon=False)
    figure.savefig(path, dpi=130)
