"""Images to train on: scikit-learn's digits, or a folder with one subfolder per class."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ...errors import UserError, first_line
from ..image_folder import find_images, held_out
from ..images import MAX_PIXELS, read_image

TEST_SHARE = 0.25


@dataclass
class Images:
    """Labelled images, split into training and test; values in [0, 1]."""

    train: Tensor  # [N, channels, S, S] float32
    train_labels: Tensor  # [N] int64
    test: Tensor  # [K, channels, S, S] float32
    test_labels: Tensor  # [K] int64
    classes: list[str]
    source: str


def load_digits(image_size: int, seed: int) -> Images:
    """The 1797 handwritten digits that come with scikit-learn, 8 x 8 in 17 levels of grey."""
    from sklearn.datasets import load_digits as load

    digits = load()
    images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
    if image_size != images.shape[-1]:
        images = F.interpolate(images, (image_size, image_size), mode="bilinear", antialias=True)
    classes = [str(name) for name in digits.target_names]
    return _split(images, torch.tensor(digits.target), classes, "scikit-learn's digits", seed)


def load_folder(folder: Path, image_size: int, seed: int, max_pixels: int = MAX_PIXELS) -> Images:
    """The images under ``folder/CLASS/``, cropped to squares and resized, in RGB.

    Files that cannot be read are skipped and named on stderr.

    Raises:
        UserError: if the folder does not hold at least two classes of two images.
    """
    if not folder.is_dir():
        raise UserError(f"--data must be a folder with one subfolder per class, got {folder}")
    files = find_images(folder).classes
    classes = [name for name, paths in files.items() if paths]
    if len(classes) < 2:
        raise UserError(
            f"--data must hold at least 2 subfolders with images, one per class; {folder} has "
            f"{len(classes)}: {', '.join(classes) or 'none'}"
        )

    images, labels, broken = [], [], []
    size = (image_size, image_size)
    todo = [(label, path) for label, name in enumerate(classes) for path in files[name]]
    for label, path in tqdm(todo, desc="reading images", unit="image", leave=False, disable=None):
        try:
            image = ImageOps.fit(read_image(path, max_pixels), size, Image.Resampling.BICUBIC)
            images.append(torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255)
            labels.append(label)
        except OSError as error:
            broken.append(f"  {first_line(error)}")
    if broken:
        print(f"skipped {len(broken)} unreadable file(s):", *broken, sep="\n", file=sys.stderr)

    counts = np.bincount(labels, minlength=len(classes))
    few = [f"{name} ({count})" for name, count in zip(classes, counts, strict=True) if count < 2]
    if few:
        raise UserError(f"each class needs at least 2 readable images; too few in {', '.join(few)}")
    return _split(torch.stack(images), torch.tensor(labels), classes, str(folder), seed)


def _split(images: Tensor, labels: Tensor, classes: list[str], source: str, seed: int) -> Images:
    """A quarter of every class, drawn by the seed, becomes the test set."""
    is_test = torch.tensor(held_out(labels.tolist(), TEST_SHARE, seed))
    return Images(
        images[~is_test], labels[~is_test], images[is_test], labels[is_test], classes, source
    )
