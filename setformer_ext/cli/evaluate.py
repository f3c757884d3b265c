"""``setformer evaluate``: a trained model's metrics on a data set."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .images import add_annotated, add_max_pixels

LISTED = 20  # broken samples named on the screen; --output has them all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from .train.options import add_workers, number

    parser.add_argument(
        "training", type=Path, metavar="RUN", help="the --output folder of a `setformer train`"
    )
    parser.add_argument(
        "--data",
        type=Path,
        nargs="+",
        required=True,
        metavar="PATH",
        help="in the layout of the training's --data, of which what is trained on may be missing; "
        "for mlm all text files to evaluate on",
    )
    parser.add_argument(
        "--split",
        metavar="NAME",
        help="the folder of images in --data (default: val of classify, val2017 of detect, "
        "validation of segment; . for classes in --data itself)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write the metrics there, as JSON"
    )
    parser.add_argument(
        "--batch-size", type=number(int, 1), metavar="N", help="default: the training's default"
    )
    parser.add_argument(
        "--precision",
        choices=("no", "bf16", "fp16"),
        default="no",
        help="that of the training gives the figures that it reported (default: %(default)s)",
    )
    add_workers(parser)
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="what to do about a broken sample (default: %(default)s)",
    )
    add_annotated(parser)
    add_max_pixels(parser)


def run(options: argparse.Namespace) -> None:
    """Evaluate; of several processes the main one prints and writes the metrics."""
    from accelerate.utils import gather_object
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    from .train.evaluation import measure
    from .train.examinations import prepare
    from .train.learner import make_accelerator
    from .train.options import task_class
    from .train.sampling import EVALUATION, Collate, Once, SeededDataset
    from .train.task import DataError

    accelerator = make_accelerator(options.precision)
    examination = prepare(options)
    batch_size = options.batch_size or task_class(examination.task).defaults.get("batch_size", 64)
    samples = SeededDataset(examination.samples, examination.seed, EVALUATION, replace=False)
    places = (accelerator.process_index, accelerator.num_processes)
    loader = DataLoader(
        samples,
        batch_sampler=Once(samples.size, batch_size, *places),
        collate_fn=Collate(examination.collate),
        num_workers=options.workers,
    )
    broken: list[str] = []

    def note(failures: list[str]) -> None:
        if failures and options.on_error == "stop":
            raise DataError(f"{failures[0]} (--on-error skip: leave such samples out)")
        broken.extend(failures)

    figures = measure(
        examination.model.to(accelerator.device),
        examination.metrics,
        tqdm(loader, unit="batch", leave=False, disable=None),
        accelerator,
        note,
    )
    broken = gather_object(broken)
    if not accelerator.is_main_process:
        return
    result = {
        "training": str(options.training),
        "data": [str(path) for path in options.data],
        "samples": samples.size,
        "metrics": figures,
        "skipped": broken,
        "left_out": examination.problems,
        "notes": examination.notes,
    }
    _print(result)
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _print(result: dict[str, Any]) -> None:
    for name, value in result["metrics"].items():
        print(f"{name:<24}{value:>12.4f}")
    print()
    for note in result["notes"]:
        print(note)
    skipped, records = result["skipped"], result["left_out"]
    told = f"{result['samples']} samples"
    told += f", {len(skipped)} left out" if skipped else ""
    told += f", {len(records)} records left out" if records else ""
    problems = [*skipped, *records]
    print(told + (":" if problems else ""))
    for problem in problems[:LISTED]:
        print(f"  {problem}")
    if len(problems) > LISTED:
        print(f"  and {len(problems) - LISTED} more, which --output has")
