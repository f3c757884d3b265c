"""``setformer train classify|detect|segment``: training on your own data."""

from __future__ import annotations

import argparse
import sys

from .options import TaskParser

TASKS = {
    "classify": "images in one folder per class",
    "detect": "boxes and masks, in COCO's format",
    "segment": "a class for each pixel, in ADE20K's layout",
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
        train(task_class(options.task), options)
    except KeyboardInterrupt:
        return _fail(options, "interrupted; --resume goes on from the last checkpoint", 130)
    except OutOfMemoryError as error:
        advice = "try a smaller --batch-size with --accumulate, --gradient-checkpointing or --shard"
        return _fail(options, f"{str(error).split('. ')[0]}; {advice}", 1)
    except (TrainingError, OSError) as error:
        return _fail(options, str(error), 1)
    return 0


def _fail(options: argparse.Namespace, message: str, status: int) -> int:
    print(f"setformer train {options.task}: {message}", file=sys.stderr)
    return status
