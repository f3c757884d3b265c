"""The vision backbone beside other networks, and with other attentions, on Fashion-MNIST.

    python benchmarks/vision/fashion_mnist.py [--quick] [--validate] [NAME ...]

trains small networks on the same images in the same order, over several seeds: the backbone with
SeT, with softmax attention, with the mean of all tokens and without attention, of equal parameters;
and timm's ResNet (of basic blocks), ConvNeXt, FocalNet and Swin, of equal parameters and
multiply-adds, to 5 %. The backbone's convolutions do well without attention here. Prints a line of
Markdown for each: the accuracy of every seed, their mean and spread, the mean training loss of the
last 50 steps, parameters, multiply-adds of an image and time. A plot goes to ``--output``, and
every run to ``--results``, from where it is taken the next time.

Trained only when named is the backbone with one thing changed: SeT-many (references), SeT-queries
(a projection of their own), SeT-late (attention in the last two stages alone), SeT-loud (what
attention adds starts five times as large).

``--validate`` holds out the last 5,000 training images and measures on these: for choices.
``--quick`` takes one seed, the first and a minute, and fails if it learns too little.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np
import torch
from classification import command, compare, parse
from torch import Tensor

from setformer_ext.cli.demo.data import Images

CLASSES = [str(label) for label in range(10)]
STEPS, QUICK_STEPS = 1000, 150
QUICK_ACCURACY = 0.6  # that --quick asks for; a guess has 0.1
VALIDATION = 5000  # images
FOLDER = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist


def main() -> int:
    parser = command(__doc__, STEPS, "fashion_mnist.png")
    parser.add_argument("--data", type=Path, default=FOLDER, help="folder of the four .gz files")
    options = parse(parser, QUICK_STEPS)
    if not options.data.is_dir():
        parser.error(
            f"--data: {options.data} is no folder; install Debian's package dataset-fashion-mnist, "
            "or name a folder with the four gzipped files of the data set"
        )
    images = load(options.data)
    return compare(hold_out(images) if options.validate else images, options, QUICK_ACCURACY)


def load(folder: Path) -> Images:
    """The images, [N, 1, 28, 28]."""

    def read(name: str, offset: int) -> np.ndarray:
        return np.frombuffer(gzip.decompress((folder / name).read_bytes()), np.uint8, offset=offset)

    def pair(name: str) -> tuple[Tensor, Tensor]:
        images = torch.tensor(read(f"{name}-images-idx3-ubyte.gz", 16)).view(-1, 1, 28, 28)
        return images.float() / 255, torch.tensor(read(f"{name}-labels-idx1-ubyte.gz", 8)).long()

    return Images(*pair("train"), *pair("t10k"), CLASSES, "test")


def hold_out(images: Images) -> Images:
    """The last training images in place of the test's."""
    x, labels = images.train, images.train_labels
    kept, held = slice(-VALIDATION), slice(-VALIDATION, None)
    return Images(x[kept], labels[kept], x[held], labels[held], CLASSES, "validation")


if __name__ == "__main__":
    sys.exit(main())
