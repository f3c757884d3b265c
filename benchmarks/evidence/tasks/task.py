"""What a task is: its data, its embedding of tokens, and the sizes of the network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

IGNORED = -100  # the label of tokens that are not asked about
VERSION = 2  # of the network, the mixers and the training: who changes them counts on


class Samples(NamedTuple):
    """Sequences of one length and what is asked about them."""

    inputs: Tensor  # [K, N] or [K, N, F]
    labels: Tensor  # [K], or [K, N] where tokens are classified
    mask: Tensor | None = None  # [K, N], True = valid

    def chosen(self, indices: Tensor) -> Samples:
        """Some of them."""
        mask = None if self.mask is None else self.mask[indices]
        return Samples(self.inputs[indices], self.labels[indices], mask)


class Data(NamedTuple):
    """Learning rates and options are chosen by validation; the test is for the table alone."""

    training: Samples
    validation: Samples
    test: Samples


@dataclass(frozen=True)
class Task:
    """A classification of sequences, or of their tokens."""

    name: str
    about: str
    load: Callable[[Path], Data]  # from a folder in which what takes long may be kept
    make_embedding: Callable[[int], nn.Module]  # of inputs, [B, N] or [B, N, F], to [B, N, C]
    classes: int
    steps: int
    batch_size: int
    version: int = 1  # of the data and the embedding: who changes them counts on
    of_tokens: bool = False
    grid: tuple[int, int] | None = None  # of the tokens, if they are one
    convolution: int = 0  # width of a depthwise convolution before each mixer, odd; 0 for none
    dim: int = 64
    depth: int = 4
    num_heads: int = 4
    references: int = 32  # M of SeT attention

    @property
    def recipe(self) -> str:
        """By which a run is known to be of the task as it is."""
        return (
            f"{VERSION}.{self.version}: {self.steps} steps of {self.batch_size}, "
            f"{self.depth} blocks of {self.dim}, {self.num_heads} heads"
        )
