"""What the options of SetAttention are worth, by validation data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from statistics import fmean, stdev

from .markdown import row
from .mixers import options_of
from .records import Plan, Run
from .schedule import STUDY_RATE
from .tasks import TASKS


def studies(runs: Iterable[Run]) -> str:
    """Markdown: a row for each set of options that was tried, named by what differs from the
    defaults; a column for each task, with the mean accuracy over seeds, and their spread."""
    found: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        plan, task = run.plan, TASKS[run.plan.task]
        if (plan.mixer, plan.recipe, plan.learning_rate) == ("SeT", task.recipe, STUDY_RATE):
            # A run of the table is one of the study, too.
            found[changes(plan)][plan.task][plan.seed] = run.validation
    columns = [task for task in TASKS if any(task in of_tasks for of_tasks in found.values())]
    lines = [row("options", *columns), row("---", *["---"] * len(columns))]
    for options, of_tasks in sorted(found.items()):
        lines.append(row(options, *(_cell([*of_tasks[task].values()]) for task in columns)))
    return "\n".join(lines)


def changes(plan: Plan) -> str:
    """What differs from SetAttention's defaults, in words."""
    defaults = options_of("SeT", TASKS[plan.task].references, {})
    changed = [f"{name}={value}" for name, value in plan.options.items() if defaults[name] != value]
    return ", ".join(changed) or "as they are by default"


def _cell(accuracies: list[float]) -> str:
    if not accuracies:
        return ""
    spread = f" ± {stdev(accuracies):.3f}" if len(accuracies) > 1 else ""
    return f"{fmean(accuracies):.3f}{spread}"
