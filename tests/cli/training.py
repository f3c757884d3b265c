"""Small real data and tiny networks for the tests of training."""

import argparse
import json
import os
import socket
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from setformer_ext import cli
from setformer_ext.cli.train.task import Task

TINY = (
    "--model=setformer_mini",
    "--model-options",
    "dims=(32,32,32,32)",
    "depths=(1,1,1,1)",
    "num_references=(4,4,4,4)",
    "--input-size=16",
    "--in-chans=1",
    "--workers=0",
)
PLAIN = (
    "--flip=0",
    "--crop-scale=0.7",
    "--auto-augment=none",
    "--random-erasing=0",
    "--mixup=0",
    "--cutmix=0",
)

# A clean server that has the modules, so that a process starts at once.
processes = get_context("forkserver")
processes.set_forkserver_preload(
    [f"setformer_ext.cli.train.{name}" for name in ("loop", "classify", "segment", "mlm", "glue")]
)


def write_digits(root: Path, train: int, val: int) -> Path:
    """Handwritten digits as an ImageFolder, the first ``train`` and the ``val`` after them."""
    digits = load_digits()
    for index, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        if index < train + val:
            folder = root / ("train" if index < train else "val") / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.uint8(image * 15.9)).save(folder / f"{index}.png")
    return root


def arguments(data: Path, output: Path, *more: object) -> list[str]:
    """A training of classification by a tiny network, without augmentation."""
    given = ["train", "classify", f"--data={data}", f"--output={output}", *TINY, *PLAIN]
    return [*given, *map(str, more)]


def run_command(given: list[str]) -> None:
    """As a process of its own runs it, which ends with the command's exit status."""
    raise SystemExit(cli.main(given))


def options_of(kind: type[Task], *given: str, **others: Any) -> argparse.Namespace:
    """A task's own options as the command line gives them, beside those of all trainings."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers")
    kind.add_options(parser)
    defaults = {"on_error": "stop", "batch_size": 4, "seed": 0, "resume": False, "output": Path()}
    parser.set_defaults(**defaults | others)
    return parser.parse_args(given)


def classify(data: Path, output: Path, *more: object) -> dict[str, Any]:
    """Train in this process; returns what ``metrics.json`` holds."""
    assert cli.main(arguments(data, output, *more)) == 0
    return metrics(output)


def metrics(output: Path) -> dict[str, Any]:
    return json.loads((output / "metrics.json").read_text(encoding="utf-8"))


def launch(
    count: int, target: Callable[..., None], *args: Any, kill_after: float = 120
) -> list[int]:
    """Call a function in so many processes that find each other; returns their exit codes.

    What still runs after so many seconds is killed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = [
        processes.Process(target=_in_process, args=(rank, count, port, target, args))
        for rank in range(count)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout=kill_after)
        if process.exitcode is None:
            process.kill()
            process.join()
    return [process.exitcode for process in started]


def _in_process(
    rank: int, count: int, port: int, target: Callable[..., None], args: tuple[Any, ...]
) -> None:
    import torch

    torch.set_num_threads(1)
    if count > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(count),
            LOCAL_WORLD_SIZE=str(count),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    target(*args)
