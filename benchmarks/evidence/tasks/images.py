"""Fashion-MNIST without convolutions: as a grid of patches, and as a set of pixels."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .task import Data, Samples, Task

FOLDER = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
HELD_OUT = 5000  # of the 60,000 to train on
PATCH = 4
GRID = (28 // PATCH, 28 // PATCH)
POINTS_OF_AN_IMAGE = 128


class Patches(nn.Module):
    """A linear embedding of tokens and one of their places: [B, N, F] to [B, N, C]."""

    def __init__(self, count: int, features: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, dim)
        self.position = nn.Parameter(0.02 * torch.randn(count, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.position


class Points(nn.Module):
    """Sines of the coordinates, and the brightness: [B, N, 3] to [B, N, C]."""

    FREQUENCIES = 4

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(3 + 4 * self.FREQUENCIES, dim)

    def forward(self, x: Tensor) -> Tensor:
        octaves = math.pi * 2 ** torch.arange(self.FREQUENCIES)
        angles = (x[..., :2, None] * octaves).flatten(-2)  # [B, N, 2 FREQUENCIES]
        return self.linear(torch.cat([2 * x - 1, angles.sin(), angles.cos()], -1))


def load_images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [K, 28, 28] in [0, 1] and labels [K]: 60,000 and 10,000."""
    if not FOLDER.is_dir():
        raise FileNotFoundError(f"{FOLDER} is missing: install Debian's dataset-fashion-mnist")

    def read(name: str, offset: int) -> Tensor:
        raw = gzip.decompress((FOLDER / name).read_bytes())
        return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=offset).copy())

    parts = []
    for name in ("train", "t10k"):
        images = read(f"{name}-images-idx3-ubyte.gz", 16).view(-1, 28, 28).float() / 255
        parts += [images, read(f"{name}-labels-idx1-ubyte.gz", 8).long()]
    return tuple(parts)


def cut(images: Tensor) -> Tensor:  # [K, 28, 28] -> [K, 49, 16]
    """Into patches, row by row; brightness in [-1, 1]."""
    tiles = images.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)  # [K, 7, 7, 4, 4]
    return 2 * tiles.flatten(3).flatten(1, 2) - 1


def load_patches(_folder: Path) -> Data:
    """[K, 49, 16]."""
    images, labels, test_images, test_labels = load_images()
    return _split(cut(images), labels, cut(test_images), test_labels)


def load_points(_folder: Path) -> Data:
    """[K, 128, 3]: of every image pixels of its own, drawn once; x and y in [0, 1], brightness."""
    generator = torch.Generator().manual_seed(0)

    def draw(images: Tensor) -> Tensor:
        drawn = torch.rand(len(images), 28 * 28, generator=generator).topk(POINTS_OF_AN_IMAGE)[1]
        brightness = images.flatten(1).gather(1, drawn)
        return torch.stack([(drawn % 28 + 0.5) / 28, (drawn // 28 + 0.5) / 28, brightness], -1)

    images, labels, test_images, test_labels = load_images()
    return _split(draw(images), labels, draw(test_images), test_labels)


def _split(inputs: Tensor, labels: Tensor, test_inputs: Tensor, test_labels: Tensor) -> Data:
    return Data(
        Samples(inputs[:-HELD_OUT], labels[:-HELD_OUT]),
        Samples(inputs[-HELD_OUT:], labels[-HELD_OUT:]),
        Samples(test_inputs, test_labels),
    )


PATCHES = Task(
    name="patches",
    about="Fashion-MNIST, 49 patches of 4 x 4 pixels",
    load=load_patches,
    grid=GRID,
    make_embedding=lambda dim: Patches(GRID[0] * GRID[1], PATCH**2, dim),
    classes=10,
    steps=1500,
    batch_size=64,
)
POINTS = Task(
    name="points",
    about=f"Fashion-MNIST, sets of {POINTS_OF_AN_IMAGE} pixels",
    load=load_points,
    make_embedding=Points,
    classes=10,
    steps=800,
    batch_size=64,
)
