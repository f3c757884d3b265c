"""What the options of SetAttention are worth, by validation data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from statistics import fmean
from typing import Any

from .mixers import set_options
from .records import Run
from .tasks import TASKS


def studies(runs: Iterable[Run]) -> str:
    """Markdown: a row for each set of options that was tried, what differs from the defaults; a
    column for each task, with the mean accuracy of the seeds at the best learning rate, and how
    many seeds these are."""
    accuracies: dict[str, dict[str, dict[float, list[float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for run in runs:
        plan, task = run.plan, TASKS[run.plan.task]
        if plan.mixer == "SeT" and run.steps == task.steps:
            row = accuracies[_changes(plan.options, task.references)]
            row[plan.task][plan.learning_rate].append(run.validation)
    columns = [task for task in TASKS if any(task in row for row in accuracies.values())]
    lines = [_row("options", *columns), _row("---", *["---"] * len(columns))]
    for changes, row in sorted(accuracies.items()):
        lines.append(_row(changes, *(_cell(row.get(task, {})) for task in columns)))
    return "\n".join(lines)


def _changes(options: dict[str, Any], references: int) -> str:
    defaults = set_options("SeT", references, {})
    changed = [f"{k}={v}" for k, v in options.items() if k not in defaults or defaults[k] != v]
    return ", ".join(changed) or "as they are by default"


def _cell(of_rates: dict[float, list[float]]) -> str:
    if not of_rates:
        return ""
    best = max(of_rates.values(), key=fmean)
    return f"{fmean(best):.3f} ({len(best)})"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
