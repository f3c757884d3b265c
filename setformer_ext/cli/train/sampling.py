"""The order of samples, their random numbers, and what happens if one cannot be read.

All random numbers of a training depend only on the seed and a place: the step, or the sample's
position in the stream of samples. So the number of workers does not matter, and a checkpoint needs
no state of a generator.
"""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import BatchSampler, Dataset, Sampler

from ...errors import first_line
from .task import DataError, Samples

INITIALISATION, ORDER, SAMPLE, STEP, EVALUATION = range(5)  # purposes of random numbers
Place = tuple[int, int]  # position in the stream, index in the dataset


def seed_generators(seed: int, *place: int) -> None:
    """Seed Python's, NumPy's and torch's global generators; different places are independent."""
    state = np.random.SeedSequence((seed, *place)).generate_state(4)
    random.seed(int(state[0]))
    np.random.seed(state[1])  # noqa: NPY002 (timm's augmentations draw from the global one)
    torch.manual_seed(int(state[2]) << 32 | int(state[3]))


class Stream(Sampler[list[Place]]):
    """Batches of an endless stream: one permutation of the dataset after the other.

    With R processes and B samples per batch, pass p takes places [p * B * R, (p + 1) * B * R) of
    the stream, and each process its part of them. So batches may cross the border of two epochs, no
    batch is short, and a dataset may be smaller than a batch.

    Args:
        size: samples of the dataset.
        batch_size: B.
        seed: of the permutations.
        passes: the first pass, and the one after the last.
        rank: this process.
        processes: R.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        passes: tuple[int, int],
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.passes, self.rank, self.processes = passes, rank, processes

    def __len__(self) -> int:
        return self.passes[1] - self.passes[0]

    def __iter__(self) -> Iterator[list[Place]]:
        known, order = -1, np.empty(0, dtype=np.int64)
        for step in range(*self.passes):
            first = (step * self.processes + self.rank) * self.batch_size
            batch = []
            for position in range(first, first + self.batch_size):
                epoch, offset = divmod(position, self.size)
                if epoch != known:
                    generator = np.random.default_rng((self.seed, ORDER, epoch))
                    known, order = epoch, generator.permutation(self.size)
                batch.append((position, int(order[offset])))
            yield batch


class Once(BatchSampler):
    """Batches that hold each sample once, distributed over the processes without repeats."""

    def __init__(self, size: int, batch_size: int, rank: int = 0, processes: int = 1) -> None:
        places: Any = [(index, index) for index in range(rank, size, processes)]
        super().__init__(places, batch_size, drop_last=False)


def transformed(path: Path | str, transform: Callable[..., Any], *sample: Any) -> Any:
    """Apply a dataset's transform to a sample that was read from a file.

    Raises:
        DataError: for any error of the transform; names the file and the step that failed.
    """
    try:
        return transform(*sample)
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise DataError(f"{path}: the transform {_failed(error)} failed: {reason}") from error


def _failed(error: Exception) -> str:
    """The innermost transform that raised an error, or the whole function if there is none."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    steps = [frame.f_locals["self"] for frame in frames if callable(frame.f_locals.get("self"))]
    return shorten(repr(steps[-1]) if steps else frames[-1].f_code.co_name, 100, placeholder="...")


class Loaded(NamedTuple):
    """A sample or None, and what was wrong with samples that could not be read."""

    sample: Any
    failures: list[str]


class SeededDataset(Dataset[Loaded]):
    """A dataset by place. A sample draws the same random numbers in whichever process it is loaded.

    Args:
        dataset: raises DataError or OSError for a sample that cannot be read.
        seed: the training's.
        purpose: SAMPLE or EVALUATION.
        replace: give the next readable sample in place of a broken one, rather than None.
    """

    def __init__(self, dataset: Samples, seed: int, purpose: int, replace: bool) -> None:
        self.dataset, self.seed, self.purpose, self.replace = dataset, seed, purpose, replace
        self.size: int = len(dataset)

    def __getitem__(self, place: Place) -> Loaded:
        position, index = place
        failures: list[str] = []
        for distance in range(self.size if self.replace else 1):
            seed_generators(self.seed, self.purpose, position)
            try:
                return Loaded(self.dataset[(index + distance) % self.size], failures)
            except (DataError, OSError) as error:
                # Returned, not raised: an error raised in a worker comes with a traceback.
                failures.append(first_line(error))
        return Loaded(None, failures)

    def __getitems__(self, places: list[Place]) -> list[Loaded]:
        """A batch, on one thread as in a worker, because sums depend on the number of threads."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return [self[place] for place in places]
        finally:
            torch.set_num_threads(threads)


class Collate:
    """Task.collate for samples of a :class:`SeededDataset`: (batch or None, failures)."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, loaded: list[Loaded]) -> tuple[Any, list[str]]:
        samples = [sample for sample, _ in loaded if sample is not None]
        failures = [failure for _, failures in loaded for failure in failures]
        return self.collate(samples) if samples else None, failures
