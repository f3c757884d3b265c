"""What a training has to know of what it trains: classification, detection or segmentation."""

from __future__ import annotations

import argparse
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...errors import UserError, first_line

NO_IMAGES = "no images by their endings"
# Figures of an evaluation: the mean loss on its data, if the task measures that; else the mean sum
# of the losses that were trained on since the evaluation before.
EVAL_LOSS, TRAIN_LOSS = "eval_loss", "train_loss"
Batch = Any  # whatever Task.collate gives; moved to the device by the loop


class TrainingError(UserError):
    """What the user can put right: an option, a file, a checkpoint; the message says what to do."""


class DataError(TrainingError):
    """Data that cannot be trained on; the message names the file, what was expected and got."""


@contextmanager
def blaming(
    where: str, *errors: type[Exception], kind: type[TrainingError] = TrainingError
) -> Iterator[None]:
    """Make of such errors a TrainingError, or one of its kinds, that says first where they are."""
    try:
        yield
    except errors as error:
        raise kind(f"{where}: {first_line(error)}") from error


def listed(things: Sequence[object], most: int = 3, separator: str = "; ") -> str:
    """The first things, such as problems, and how many more there are."""
    rest = len(things) - most
    return separator.join([*map(str, things[:most]), *([f"and {rest} more"] if rest > 0 else [])])


def named(files: Sequence[Path], what: str) -> list[str]:
    """Says of files, if there are any, what they are; of ``listed`` names."""
    return [f"{len(files)} files are {what}: {listed(files)}"] if files else []


class Metrics(ABC):
    """What is measured on the evaluation data, over all processes."""

    @abstractmethod
    def update(self, model: nn.Module, batch: Batch) -> None:
        """Take in the model's answers to a batch; it is in eval mode, without gradients."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """The figures of all batches, by name; asked for once."""

    def to(self, device: torch.device) -> None:
        """Move the state there; by default that of all metrics of torchmetrics among attributes."""
        for value in vars(self).values():
            if isinstance(value, nn.Module):
                value.to(device)


def in_lists(samples: list[Any]) -> list[list[Any]]:
    """A batch of samples whose parts are of different sizes: a list of each part."""
    return [list(parts) for parts in zip(*samples, strict=True)]


class Samples(Protocol):
    """A list, or one of torch's datasets that know their length."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Task(ABC):
    """One kind of training: its data, model, losses and metrics.

    The loop owns all else: processes, precision, optimizer, schedule, EMA, checkpoints, logs.
    Randomness is the loop's as well: it seeds Python's, NumPy's and torch's generators before each
    sample is loaded and before each step, so datasets and losses draw from the global ones. A
    dataset raises DataError or OSError, naming the file, for a sample that cannot be read;
    ``--on-error`` says what happens then.
    """

    name: str
    monitor: str  # the figure that decides which weights are the best
    smaller_is_better = False  # of that figure
    defaults: dict[str, Any] = {}  # of the loop's options, where this task's customs differ
    train: Samples  # what __init__ finds to train on
    eval: Samples  # and to evaluate on
    collate: Callable[[list[Any]], Batch]  # of samples, as by torch's default_collate or in_lists

    @staticmethod
    @abstractmethod
    def add_options(parser: argparse._ArgumentGroup) -> None:
        """Declare the options of this task alone (data layout, model, augmentation)."""

    @abstractmethod
    def __init__(self, options: argparse.Namespace) -> None:
        """Look the data over; raises DataError for what cannot be trained on."""

    @abstractmethod
    def describe(self) -> str:
        """One line about the data: counts, classes, sizes."""

    @abstractmethod
    def make_model(self) -> nn.Module:
        """The model with fresh (or ``--pretrained FILE``) weights."""

    @staticmethod
    def split(options: argparse.Namespace) -> list[argparse.Namespace]:
        """The trainings that the options ask for, one after the other; mostly one."""
        return [options]

    @classmethod
    def best(cls, history: list[dict[str, float]]) -> dict[str, float]:
        """The evaluation that monitors best; of several, as few samples give, that of least loss.

        What is no number is the worst.
        """
        sign = -1 if cls.smaller_is_better else 1

        def merit(entry: dict[str, float]) -> tuple[float, ...]:
            loss = entry.get(EVAL_LOSS, entry.get(TRAIN_LOSS, math.nan))
            values = (sign * entry.get(cls.monitor, math.nan), -loss)
            return tuple(-math.inf if math.isnan(value) else value for value in values)

        return max(history, key=merit)

    def prepare(self, output: Path) -> None:  # noqa: B027 (most have nothing to write)
        """Write what the weights in ``output`` need beside the card; before the first step."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Losses by name, whose sum is minimised; batch augmentation (mixup) happens here."""

    @abstractmethod
    def metrics(self) -> Metrics: ...

    @abstractmethod
    def card(self) -> dict[str, Any]:
        """What ``setformer predict`` needs beside the weights to rebuild the model and read images.

        Task name, model name and arguments, class names, input size, mean and std. JSON.
        """
