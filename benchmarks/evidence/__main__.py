"""Does an attention earn its place? Mixers of tokens in one network, on tasks that need them.

    cd benchmarks
    python -m evidence TASK                 run what a task's table lacks, and print it
    python -m evidence --table              run nothing, print all tables and draw the picture
    python -m evidence TASK --costs         time and memory of a step, on an idle machine
    python -m evidence TASK --study OPTION=VALUE ... [--study ...]
                                            options of SetAttention, judged by validation data

Every mixer stands in the same network, whose MLPs are as wide as makes the parameters equal, and
gets the same steps, order of samples and recipe. Its learning rate is the best of three on
validation data with the first seed; of three seeds at that rate the test accuracies are compared.
Each run takes some minutes of one core and is put on record in runs.jsonl as it ends, from where it
is taken the next time.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from . import costs
from .mixers import MIXERS
from .picture import draw
from .records import Plan, Run, load
from .schedule import STUDY_RATE, plan, run_all, run_missing
from .studies import changes, studies
from .table import details, summary
from .tasks import TASKS

FOLDER = Path(gettempdir()) / "setformer-evidence"  # of data that take long to draw


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--mixers", nargs="+", choices=MIXERS, default=MIXERS, metavar="NAME")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one core each")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--picture", type=Path, default=Path("evidence.png"))
    parser.add_argument("--costs", action="store_true")
    parser.add_argument("--study", nargs="*", action="append", metavar="OPTION=VALUE")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of a study")
    options = parser.parse_args()
    unknown = set(options.tasks) - set(TASKS)
    if unknown:
        parser.error(f"TASK must be of {', '.join(TASKS)}, got {', '.join(sorted(unknown))}")
    if bool(options.tasks) == options.table or (options.table and (options.study or options.costs)):
        parser.error("expected TASKs, or --table alone")
    if options.costs:
        for task in options.tasks:
            costs.measure(task, options.mixers, FOLDER)
    elif options.study:
        try:
            plans = [each for task in options.tasks for each in _study(task, options)]
        except ValueError as error:
            parser.error(f"--study: {error}")
        _show(run_all(plans, FOLDER, options.jobs))
    else:
        for task in () if options.table else options.tasks:
            _show(run_missing(task, dict.fromkeys(options.mixers), FOLDER, options.jobs))
    _print_tables(options)
    return 0


def _study(task: str, options: argparse.Namespace) -> Iterator[Plan]:
    for given in options.study:
        for seed in options.seeds:
            yield plan(task, "SeT", STUDY_RATE, seed, _read(given), study=True)


def _read(given: list[str]) -> dict[str, Any]:
    """OPTION=VALUE, in Python's notation; words are themselves."""
    read: dict[str, Any] = {}
    for name, equals, text in (each.partition("=") for each in given):
        if not equals:
            raise ValueError(f"expected OPTION=VALUE, got {name}")
        try:
            read[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            read[name] = text
    return read


def _show(runs: Iterator[Run]) -> None:
    for run in runs:
        made = run.plan
        print(
            f"{made.task} | {made.mixer} | {changes(made)} | {made.learning_rate:g} | "
            f"{made.seed} | validation {run.validation:.4f} | loss {run.loss:.4f} | "
            f"{run.milliseconds:.0f} ms",
            file=sys.stderr,
            flush=True,
        )


def _print_tables(options: argparse.Namespace) -> None:
    runs = load()
    if options.table:
        print(summary(runs, TASKS))
    for task in options.tasks or TASKS:
        if any(run.plan.task == task and not run.plan.study for run in runs):
            print(f"\n{details(runs, task, costs.load(task))}")
    if options.table or options.study:
        print(f"\nSetAttention's options, by validation data:\n\n{studies(runs)}")
    if options.table:
        draw(runs, options.picture)
        print(f"\nPicture: {options.picture}")


if __name__ == "__main__":
    sys.exit(main())
