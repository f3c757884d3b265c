"""Two images of Fashion-MNIST side by side: are they of one class?

What a patch shows has to be gathered for each image and then compared: a sum over patches, each
seen alone, cannot tell.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .images import GRID, PATCH, Patches, cut, load_images
from .task import Data, Samples, Task

HELD_OUT = 5000  # images


def load(_folder: Path) -> Data:
    """[K, 98, 16]: the patches of one image and of the other; an image is in one part only."""
    generator = torch.Generator().manual_seed(0)

    def pairs(images: Tensor, labels: Tensor) -> Samples:
        """As many pairs as images: each with one of its class, or with one of any other."""
        same = torch.rand(len(images), generator=generator) < 0.5
        other = torch.empty(len(images), dtype=torch.int64)
        for label in range(10):
            inside, outside = (labels == label).nonzero()[:, 0], (labels != label).nonzero()[:, 0]
            for pool, wanted in ((inside, same), (outside, ~same)):
                asking = (wanted & (labels == label)).nonzero()[:, 0]
                drawn = torch.randint(len(pool), (len(asking),), generator=generator)
                other[asking] = pool[drawn]
        patches = cut(images)
        return Samples(torch.cat([patches, patches[other]], 1), same.long())

    images, labels, test_images, test_labels = load_images()
    return Data(
        pairs(images[:-HELD_OUT], labels[:-HELD_OUT]),
        pairs(images[-HELD_OUT:], labels[-HELD_OUT:]),
        pairs(test_images[:HELD_OUT], test_labels[:HELD_OUT]),
    )


GARMENTS = Task(
    name="garments",
    about="two images of Fashion-MNIST: are they of one class?",
    load=load,
    make_embedding=lambda dim: Patches(2 * GRID[0] * GRID[1], PATCH**2, dim),
    classes=2,
    steps=800,
    batch_size=64,
)
