"""``setformer train classify|detect|segment|mlm|glue``: training on your own data."""

from __future__ import annotations

import argparse
import os
import sys
from statistics import fmean

from ...errors import first_line
from .options import TaskParser

TASKS = {
    "classify": "images in one folder per class",
    "detect": "boxes and masks, in COCO's format",
    "segment": "a class for each pixel, in ADE20K's layout",
    "mlm": "text files, from which masked words are predicted",
    "glue": "the tasks of GLUE, from its own download",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the tasks; each one's options come with its module, when it is chosen."""
    tasks = parser.add_subparsers(
        dest="task", required=True, metavar="task", parser_class=TaskParser
    )
    for name, summary in TASKS.items():
        tasks.add_parser(name, help=summary, description=f"Train on {summary}.").task = name


def run(options: argparse.Namespace) -> int:
    """Train; returns the exit status."""
    from torch import OutOfMemoryError

    from .loop import train
    from .options import task_class
    from .task import TrainingError

    try:
        kind = task_class(options.task)
        scores = {}
        for single in kind.split(options):
            scores[single.output.name] = train(kind, single).best
        if len(scores) > 1:
            _print_average(kind.monitor, scores)
    except KeyboardInterrupt:
        return _fail(options, "interrupted; --resume goes on from the last checkpoint", 130)
    except OutOfMemoryError as error:
        advice = "try a smaller --batch-size with --accumulate, --gradient-checkpointing or --shard"
        return _fail(options, f"{first_line(error).split('. ')[0]}; {advice}", 1)
    except (TrainingError, OSError) as error:
        return _fail(options, first_line(error), 1)
    return 0


def _print_average(monitor: str, scores: dict[str, float | None]) -> None:
    """The best figure of each of several trainings, and their mean."""
    if os.environ.get("RANK", "0") != "0":
        return
    print(f"\n{monitor} of each, the best on its evaluation data:")
    for name, score in scores.items():
        print(f"{name:<24}{score:>12.4f}")
    print(f"{'average':<24}{fmean(s for s in scores.values() if s is not None):>12.4f}")


def _fail(options: argparse.Namespace, message: str, status: int) -> int:
    print(f"setformer train {options.task}: {message}", file=sys.stderr)
    return status
