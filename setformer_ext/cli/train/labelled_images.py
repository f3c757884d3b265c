"""Images in one folder per class, checked before any training on them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from ..files import visible
from ..image_folder import ImageFolder, find_images
from ..images import middle, read_image
from .sampling import transformed
from .task import DataError, listed, named


class LabelledImages(Dataset[Any]):
    """A dataset of transformed images, each with the index of its class.

    Args:
        folder: the files.
        classes: names, in the order of their indices.
        mode: Pillow's mode of the images: L or RGB.
        max_pixels: see :func:`setformer_ext.cli.images.read_image`.
    """

    def __init__(
        self, folder: ImageFolder, classes: Sequence[str], mode: str, max_pixels: int
    ) -> None:
        index = {name: place for place, name in enumerate(classes)}
        # As strings: a million Path objects would be large in every worker.
        self.samples = [(str(path), index[name]) for path, name in folder.samples()]
        self.mode, self.max_pixels = mode, max_pixels
        self.transform: Callable[..., Any] = lambda image: image

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        image = middle(read_image(Path(path), self.max_pixels)).convert(self.mode)
        return transformed(path, self.transform, image), label


def find_data(options: argparse.Namespace) -> tuple[ImageFolder, ImageFolder]:
    """The images to train and to evaluate on: --data's train and val, or a --val-share of it.

    Raises:
        DataError: for fewer than two classes with images, or a class without training images.
    """
    data: Path = options.data
    if options.val_share is None:
        layout = f"train/CLASS/*.jpg and val/CLASS/*.jpg in {data}, or CLASS/*.jpg and --val-share"
        train, val = (find_classes(data / split, layout) for split in ("train", "val"))
    else:
        for split in (data / "train", data / "val", data / "test"):
            if split.is_dir() and visible(split)[0]:
                raise DataError(
                    f"--val-share: expected a folder of classes, but {split} has folders itself; "
                    "give it as --data, or leave --val-share out"
                )
        train, val = find_classes(data, "CLASS/*.jpg in it").split(options.val_share, options.seed)
    unknown = sorted({*val.classes} - {*train.classes})
    if unknown:
        raise DataError(f"--data: {train.name} lacks classes of {val.name}: {', '.join(unknown)}")
    if len(train.classes) < 2:
        raise DataError(
            f"--data: {train.name} has one class, {next(iter(train.classes))}; expected two or more"
        )
    return train, val


def classes_without_images(classes: Sequence[str], *folders: ImageFolder) -> list[str]:
    """Says which classes each of the two folders lacks."""
    return [
        f"{folder.name} has no images of these classes: {', '.join(empty)}"
        for folder in folders
        if (empty := [name for name in classes if not folder.classes.get(name)])
    ]


def files_left_out(*folders: ImageFolder) -> list[str]:
    """Says which files are not read."""
    return named([path for folder in folders for path in folder.others], "no images or in no class")


def find_classes(folder: Path, layout: str) -> ImageFolder:
    """The images of a folder of classes.

    Raises:
        DataError: if there are none; names the expected layout.
    """
    if not folder.is_dir():
        raise DataError(f"--data: there is no folder {folder}; expected {layout}")
    found = find_images(folder)
    if not found.classes:
        raise DataError(f"--data: {folder} has no folders, one for each class")
    if not found.samples():
        raise DataError(
            f"--data: no images in the {len(found.classes)} folders of {folder}"
            + (f"; by their endings these are none: {listed(found.others)}" if found.others else "")
        )
    return found
