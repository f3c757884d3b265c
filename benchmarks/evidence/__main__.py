"""Does an attention earn its place? Mixers of tokens in one network, on tasks that need them.

    python -m evidence TASK          run what is missing of a task, print its table
    python -m evidence --table       all tables, and the picture of time and accuracy
    python -m evidence TASK --study OPTION=VALUE ... [--study ...]
                                             options of SetAttention, judged by validation data

Every mixer stands in the same network, whose MLPs are as wide as makes the parameters equal, and
gets the same steps, order of samples and recipe. Its learning rate is the best of three on
validation data with the first seed; three seeds at that rate are then tested. Each run takes some
minutes of one core and is put on record in runs.jsonl as it ends, from where it is taken the next
time.
"""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from .mixers import MIXERS, set_options
from .picture import draw
from .records import Plan, Run, load
from .schedule import LEARNING_RATES, run_all, run_missing
from .studies import studies
from .table import table
from .tasks import TASKS

FOLDER = Path(gettempdir()) / "setformer-evidence"  # of data that take long to draw


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--mixers", nargs="+", choices=MIXERS, default=MIXERS, metavar="NAME")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one core each")
    parser.add_argument("--table", action="store_true", help="run nothing, print and draw all")
    parser.add_argument("--picture", type=Path, default=Path("evidence.png"))
    parser.add_argument("--study", nargs="*", action="append", metavar="OPTION=VALUE")
    parser.add_argument("--learning-rates", nargs="+", type=float, default=LEARNING_RATES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of a study")
    options = parser.parse_args()
    unknown = set(options.tasks) - set(TASKS)
    if unknown:
        parser.error(f"TASK must be of {', '.join(TASKS)}, got {', '.join(sorted(unknown))}")
    if not options.tasks and not options.table:
        parser.error("expected a TASK, or --table")
    for task in options.tasks:
        if options.study:
            runs = run_all(_study(task, options), FOLDER, options.jobs)
        else:
            runs = run_missing(task, options.mixers, FOLDER, options.jobs)
        for run in runs:
            print(_describe(run), file=sys.stderr, flush=True)
    if options.study:
        return 0
    runs = load()
    print(table(runs, options.tasks or list(TASKS)))
    if options.table:
        print(f"\nSetAttention's options, by validation data (seeds):\n\n{studies(runs)}")
        draw(runs, options.picture)
        print(f"\nPicture: {options.picture}")
    return 0


def _study(task: str, options: argparse.Namespace) -> list[Plan]:
    return [
        Plan(
            task, "SeT", rate, seed, set_options("SeT", TASKS[task].references, _read(given)), True
        )
        for given in options.study
        for rate in options.learning_rates
        for seed in options.seeds
    ]


def _read(given: list[str]) -> dict[str, Any]:
    """OPTION=VALUE, in Python's notation; words are themselves."""
    read = {}
    for name, text in (each.split("=", 1) for each in given):
        try:
            read[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            read[name] = text
    return read


def _describe(run: Run) -> str:
    plan = run.plan
    defaults = set_options(plan.mixer, TASKS[plan.task].references, {})
    changed = {k: v for k, v in plan.options.items() if defaults[k] != v}
    return (
        f"{plan.task} | {plan.mixer} | {changed or ''} | {plan.learning_rate:g} | {plan.seed} | "
        f"validation {run.validation:.4f} | loss {run.loss:.4f} | {run.milliseconds:.0f} ms"
    )


if __name__ == "__main__":
    sys.exit(main())
