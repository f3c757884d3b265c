"""Images and a class for each of their pixels, in the layout of ADEChallengeData2016."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors

from ...errors import first_line
from ..files import visible
from ..images import MAX_PIXELS, annotated_size, is_image, opened, read_image
from .lines import numbered_lines
from .sampling import transformed
from .task import NO_IMAGES, DataError, blaming, listed, named

IGNORED = -1  # the class of pixels that do not count, neither in losses nor in metrics
UNKNOWN = -2
LABEL_MODES = ("L", "I", "I;16", "I;16B")  # Pillow's names for grey of 8 bits and of more
LARGEST_LABEL = 65535
LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")  # formats that may change what they store
LISTED = 5  # labels or classes that a message names


@dataclass(frozen=True)
class Labels:
    """Which class each label of the files stands for.

    Args:
        names: the classes, in the order of their labels.
        ignored: the label of pixels without a class, None if there is none. The classes have the
            labels 0, 1, ...; or 1, 2, ... if 0 is ignored, as in ADE20K.
    """

    names: tuple[str, ...]
    ignored: int | None

    @property
    def first(self) -> int:
        """The label of the first class."""
        return 1 if self.ignored == 0 else 0

    def to_classes(self, labels: np.ndarray, path: Path) -> np.ndarray:  # [H, W] -> [H, W] int64
        """Classes 0, 1, ... and IGNORED.

        Raises:
            DataError: for a label without a class.
        """
        last = self.first + len(self.names) - 1
        table = np.full(LARGEST_LABEL + 1, UNKNOWN)
        table[self.first : last + 1] = np.arange(len(self.names))
        if self.ignored is not None:
            table[self.ignored] = IGNORED
        classes = table[labels]
        if classes.min(initial=0) == UNKNOWN:
            unknown = listed(np.unique(labels[classes == UNKNOWN]).tolist(), LISTED, ", ")
            expected = f"{self.first} to {last}"
            if self.ignored is not None:
                expected += f", and {self.ignored} for no class"
            raise DataError(f"{path}: has the labels {unknown}; expected {expected}")
        return classes


class Ade20k(Dataset[Any]):
    """``images/SPLIT/*.jpg``, each with an ``annotations/SPLIT/*.png`` of the same name.

    Args:
        root: holds images and annotations.
        split: "training" or "validation".
        transform: of an image [3, H, W] uint8 and a mask [H, W] int64 with classes or IGNORED.
        annotated, max_pixels: see :func:`setformer_ext.cli.images.annotated_size`.

    Raises:
        DataError: if there are no images.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        transform: Callable[..., Any],
        annotated: str | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.transform, self.annotated, self.max_pixels = transform, annotated, max_pixels
        self.labels = Labels((), None)
        self.folder = root / "annotations" / split
        images, others = _by_stem(root / "images" / split)
        annotations, more = _by_stem(self.folder)
        self.notes = named([*others, *more], NO_IMAGES)
        if not images:
            raise DataError(f"--data: no images in {root / 'images' / split}")
        # Files without a partner are kept, so that reading them raises an error that names them.
        self.samples = [
            (
                images.get(stem, root / "images" / split / f"{stem}.jpg"),
                annotations.get(stem, self.folder / f"{stem}.png"),
            )
            for stem in sorted({*images, *annotations})
        ]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        image_path, label_path = self.samples[index]
        upright = self._check_pair(image_path, label_path)
        pixels = np.array(read_image(image_path, self.max_pixels, upright))
        classes = self.labels.to_classes(read_labels(label_path, self.max_pixels), label_path)
        return transformed(
            image_path,
            self.transform,
            tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1)),
            tv_tensors.Mask(torch.from_numpy(classes)),
        )

    def find_labels(self) -> list[tuple[list[int], str]]:
        """The labels in each sample, and what is wrong with the sample.

        JPEGs are not decoded, so this takes a small part of the time of an epoch.
        """
        with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
            return list(pool.map(self._find_labels, self.samples))

    def _find_labels(self, sample: tuple[Path, Path]) -> tuple[list[int], str]:
        try:
            self._check_pair(*sample)
            counts = np.bincount(read_labels(sample[1], self.max_pixels).ravel())
            return np.flatnonzero(counts).tolist(), ""
        except (DataError, OSError) as error:
            return [], first_line(error)

    def _check_pair(self, image: Path, label: Path) -> bool:
        """Check that both files exist and are of the same size.

        Returns:
            whether the labels belong to the image turned upright, rather than as it is stored.

        Raises:
            DataError, OSError: naming the file.
        """
        if not image.exists():
            expected = image.parent / label.stem
            raise DataError(f"{label}: is without an image; expected {expected}.jpg")
        if not label.exists():
            raise DataError(f"{image}: is without labels; expected {label}")
        with opened(label, self.max_pixels) as labels:
            size = labels.size
        needed, upright = annotated_size(image, size, self.annotated, self.max_pixels)
        if size != needed:
            raise DataError(
                f"{label}: is {size[0]} x {size[1]}, "
                f"but its image {image} is {needed[0]} x {needed[1]}"
            )
        return upright


def look_over(
    root: Path, train: Ade20k, validation: Ade20k, ignored: int | None
) -> tuple[Labels, list[str]]:
    """Find the classes that occur, and check all samples.

    Returns:
        the labels, and a list of what is wrong.

    Raises:
        DataError: if there are fewer than two classes, or their names cannot be read.
    """
    found = {data: data.find_labels() for data in (train, validation)}
    used = {
        data: {label for labels, _ in samples for label in labels} - {ignored}
        for data, samples in found.items()
    }
    first = Labels((), ignored).first
    names = read_names(root, first)
    if names is None:
        last = max(used[train] | used[validation], default=-1)
        names = [str(label) for label in range(first, last + 1)]
    if len(names) < 2 or len({*names}) < len(names):
        raise DataError(
            f"--data: {root} has the classes {', '.join(names) or 'none'}; "
            "expected two or more, each of its own name"
        )
    labels = Labels(tuple(names), ignored)
    failures = []
    for data, samples in found.items():
        for (_, path), (present, failure) in zip(data.samples, samples, strict=True):
            if not failure:
                try:
                    labels.to_classes(np.array(present, dtype=np.int64), path)
                except DataError as error:
                    failure = str(error)
            failures += [failure] if failure else []
    unseen = [name for label, name in enumerate(names, start=first) if label not in used[train]]
    if unseen:
        named_classes = listed(unseen, LISTED, ", ")
        failures.append(f"{train.folder}: no pixel is of the classes {named_classes}")
    return labels, failures


def read_labels(path: Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:  # [H, W] integers
    """The labels of a grey image.

    Raises:
        DataError: for an image with colours, a palette or lossy compression.
        OSError: if it cannot be decoded; the message names it.
    """
    with opened(path, max_pixels) as image:
        mode, labels = image.mode, np.asarray(image)
        kind = "JPEG" if image.info.get("compression") == "jpeg" else image.format
    if kind in LOSSY:
        raise DataError(
            f"{path}: is a {kind}, which may change labels; expected PNG, or what else keeps them"
        )
    if mode not in LABEL_MODES:
        remedy = "; if its indices are, save np.asarray(Image.open(FILE))"
        raise DataError(
            f"{path}: is of Pillow's mode {mode}; expected grey whose values are the "
            f"labels{remedy if mode == 'P' else ''}"
        )
    if labels.min(initial=0) < 0 or labels.max(initial=0) > LARGEST_LABEL:
        raise DataError(f"{path}: expected labels from 0 to {LARGEST_LABEL}")
    return labels


def read_names(root: Path, first: int) -> list[str] | None:
    """The classes' names from ``objectInfo150.txt`` or ``classes.txt``, None if there is neither.

    The former is ADE20K's own: columns separated by tabs, ``Idx`` and ``Name`` among them. The
    latter has a name on each line, in the order of the labels.

    Args:
        root: the folder where they are.
        first: the label of the first class.

    Raises:
        DataError: if the file cannot be understood.
    """
    path = root / "objectInfo150.txt"
    if path.exists():
        rows = [line.split("\t") for line in _lines(path)]
        heading = [title.strip() for title in rows[0]] if rows else []
        if not {"Idx", "Name"} <= {*heading}:
            raise DataError(f"{path}: expected columns Idx and Name, separated by tabs")
        where = f"{path}: a row that does not fit its heading"
        with blaming(where, IndexError, ValueError, kind=DataError):
            indices = [int(row[heading.index("Idx")]) for row in rows[1:]]
            names = [row[heading.index("Name")].split(",")[0].strip() for row in rows[1:]]
        if indices != [*range(first, first + len(indices))]:
            raise DataError(f"{path}: expected Idx {first}, {first + 1}, ... in this order")
        return names
    path = root / "classes.txt"
    return [line.strip() for line in _lines(path)] if path.exists() else None


def _by_stem(folder: Path) -> tuple[dict[str, Path], list[Path]]:
    """The images, by the name that each shares with its labels; and files that are no images."""
    if not folder.is_dir():
        raise DataError(
            f"--data: there is no folder {folder}; expected images/training, images/validation, "
            f"annotations/training and annotations/validation in {folder.parent.parent}"
        )
    found: dict[str, Path] = {}
    files = visible(folder)[1]
    for path in filter(is_image, files):
        if path.stem in found:
            raise DataError(f"{path}: has the same name as {found[path.stem]}; remove one")
        found[path.stem] = path
    return found, [path for path in files if not is_image(path)]


def _lines(path: Path) -> list[str]:
    problems: list[str] = []
    lines = [line for _, line in numbered_lines(path, problems) if line.strip()]
    if problems:
        raise DataError(problems[0])
    return lines
