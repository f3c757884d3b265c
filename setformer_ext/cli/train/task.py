"""What the training loop must know about a task, such as classification or detection."""

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
# Figures of an evaluation: the mean loss on its data, if the task measures that, or else the mean
# of the summed training losses since the last evaluation.
EVAL_LOSS, TRAIN_LOSS = "eval_loss", "train_loss"
Batch = Any  # the result of Task.collate; the loop moves it to the device


class TrainingError(UserError):
    """An error in an option, file or checkpoint that the user can correct; the message says how."""


class DataError(TrainingError):
    """Data that cannot be trained on; the message names the file, what was expected and found."""


@contextmanager
def blaming(
    where: str, *errors: type[Exception], kind: type[TrainingError] = TrainingError
) -> Iterator[None]:
    """Turn these errors into a TrainingError (or a subclass) that begins with where they are."""
    try:
        yield
    except errors as error:
        raise kind(f"{where}: {first_line(error)}") from error


def listed(things: Sequence[object], most: int = 3, separator: str = "; ") -> str:
    """The first `most` things, such as problems, and how many more there are."""
    rest = len(things) - most
    return separator.join([*map(str, things[:most]), *([f"and {rest} more"] if rest > 0 else [])])


def named(files: Sequence[Path], what: str) -> list[str]:
    """A list with a sentence that counts and names the files that are `what`, if there are any."""
    return [f"{len(files)} files are {what}: {listed(files)}"] if files else []


class Metrics(ABC):
    """The figures of an evaluation, over all processes."""

    @abstractmethod
    def update(self, model: nn.Module, batch: Batch) -> None:
        """Add the model's answers to a batch; it is in eval mode, without gradients."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """The figures of all batches, by name; called once."""

    def to(self, device: torch.device) -> None:
        """Move the state to a device; by default that of all attributes of torchmetrics' kind."""
        for value in vars(self).values():
            if isinstance(value, nn.Module):
                value.to(device)


def in_lists(samples: list[Any]) -> list[list[Any]]:
    """Collate samples whose parts have different sizes: a list for each part."""
    return [list(parts) for parts in zip(*samples, strict=True)]


class Samples(Protocol):
    """A list, or a dataset of torch that has a length."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Task(ABC):
    """One kind of training: its data, model, losses and metrics.

    Everything else belongs to the loop: processes, precision, optimizer, schedule, EMA,
    checkpoints, logs. The loop also seeds the global generators of Python, NumPy and torch before
    each sample is loaded and before each step; datasets and losses draw from these. A dataset
    raises DataError or OSError, naming the file, for a sample that cannot be read; ``--on-error``
    says what happens then.
    """

    name: str
    monitor: str  # the figure that decides which weights are the best
    smaller_is_better = False  # for that figure
    defaults: dict[str, Any] = {}  # of the loop's options, if this task has others
    train: Samples  # to train on; set by __init__
    eval: Samples  # to evaluate on; set by __init__
    collate: Callable[[list[Any]], Batch]  # of samples, as by torch's default_collate or in_lists

    @staticmethod
    @abstractmethod
    def add_options(parser: argparse._ArgumentGroup) -> None:
        """Declare the options of this task alone (data layout, model, augmentation)."""

    @abstractmethod
    def __init__(self, options: argparse.Namespace) -> None:
        """Check the data; raises DataError for data that cannot be trained on."""

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
        """The evaluation with the best monitored figure; of several equal ones, as few samples
        give, the one with the least loss.

        NaN counts as the worst.
        """
        sign = -1 if cls.smaller_is_better else 1

        def merit(entry: dict[str, float]) -> tuple[float, ...]:
            loss = entry.get(EVAL_LOSS, entry.get(TRAIN_LOSS, math.nan))
            values = (sign * entry.get(cls.monitor, math.nan), -loss)
            return tuple(-math.inf if math.isnan(value) else value for value in values)

        return max(history, key=merit)

    def prepare(self, output: Path) -> None:  # noqa: B027 (most have nothing to write)
        """Write what the weights in ``output`` need in addition to the card; called before the
        first step."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Losses by name, whose sum is minimised; batch augmentation (mixup) happens here."""

    @abstractmethod
    def metrics(self) -> Metrics: ...

    @abstractmethod
    def card(self) -> dict[str, Any]:
        """What ``setformer predict`` needs, in addition to the weights, to rebuild the model and
        read images.

        Task name, model name and arguments, class names, input size, mean and std. JSON.
        """
