"""Images and a class for each of their pixels, in the layout of ADEChallengeData2016."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset
from torchvision import tv_tensors

from ..errors import first_line
from ..images import read_image
from .lines import numbered_lines
from .task import DataError

IGNORED = -1  # the class of pixels that count neither in losses nor in metrics
UNKNOWN = -2
LABEL_MODES = ("L", "I", "I;16", "I;16B")  # Pillow's names of grey of 8 and of more bits
LARGEST_LABEL = 65535
LISTED = 5  # broken samples that a message names


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
            DataError: for a label of no class.
        """
        last = self.first + len(self.names) - 1
        table = np.full(LARGEST_LABEL + 1, UNKNOWN)
        table[self.first : last + 1] = np.arange(len(self.names))
        if self.ignored is not None:
            table[self.ignored] = IGNORED
        classes = table[labels]
        if classes.min(initial=0) == UNKNOWN:
            unknown = np.unique(labels[classes == UNKNOWN]).tolist()
            expected = f"{self.first} to {last}"
            if self.ignored is not None:
                expected += f", and {self.ignored} for no class"
            raise DataError(f"{path}: has the labels {_listed(unknown)}; expected {expected}")
        return classes


class Ade20k(Dataset[Any]):
    """``images/SPLIT/*.jpg``, each with an ``annotations/SPLIT/*.png`` of the same name.

    Args:
        root: holds images and annotations.
        split: "training" or "validation".
        transform: of an image [3, H, W] uint8 and a mask [H, W] int64 with classes or IGNORED.

    Raises:
        DataError: if there are no images.
    """

    def __init__(self, root: Path, split: str, transform: Callable[..., Any]) -> None:
        self.transform = transform
        self.labels = Labels((), None)
        self.folder = root / "annotations" / split
        images, annotations = _by_stem(root / "images" / split), _by_stem(self.folder)
        if not images:
            raise DataError(f"--data: no images in {root / 'images' / split}")
        # What lacks its other half stays, so that reading it names it.
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
        check_pair(image_path, label_path)
        image = torch.from_numpy(np.array(read_image(image_path))).permute(2, 0, 1)
        classes = torch.from_numpy(self.labels.to_classes(read_labels(label_path), label_path))
        return self.transform(tv_tensors.Image(image), tv_tensors.Mask(classes))

    def count(self) -> list[tuple[np.ndarray, str]]:
        """How many pixels have each label, [L] int64, and what is wrong, of each sample.

        JPEGs are not decoded, so it takes a small part of the time of an epoch.
        """
        with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
            return list(pool.map(_count, self.samples))


def look_over(
    root: Path, train: Ade20k, validation: Ade20k, ignored: int | None
) -> tuple[Labels, list[str]]:
    """Find out which classes there are, and check all samples.

    Returns:
        the labels, and what is wrong.

    Raises:
        DataError: if there are no two classes, or their names cannot be read.
    """
    counted = {data: data.count() for data in (train, validation)}
    totals = {data: _total([pixels for pixels, _ in counted[data]]) for data in counted}
    first = Labels((), ignored).first
    names = read_names(root, first)
    if names is None:
        found = np.flatnonzero(_total([*totals.values()]))
        names = [str(label) for label in range(first, max(found[found != ignored], default=-1) + 1)]
    if len(names) < 2 or len({*names}) < len(names):
        raise DataError(
            f"--data: {root} has the classes {', '.join(names) or 'none'}; "
            "expected two or more, each of its own name"
        )
    labels = Labels(tuple(names), ignored)
    failures = []
    for data, samples in counted.items():
        for (_, path), (pixels, failure) in zip(data.samples, samples, strict=True):
            if not failure:
                try:
                    labels.to_classes(np.flatnonzero(pixels), path)
                except DataError as error:
                    failure = str(error)
            failures += [failure] if failure else []
    seen = {*np.flatnonzero(totals[train]).tolist()} - {ignored}
    unseen = [name for label, name in enumerate(names, start=first) if label not in seen]
    if unseen:
        failures.append(f"{train.folder}: no pixel is of the classes {_listed(unseen)}")
    return labels, failures


def check_pair(image: Path, label: Path) -> None:
    """Check that both files exist and are of the same size, upright.

    Raises:
        DataError, OSError: naming the file.
    """
    if not image.exists():
        raise DataError(f"{label}: is without an image; expected {image.parent / label.stem}.jpg")
    if not label.exists():
        raise DataError(f"{image}: is without labels; expected {label}")
    with _opened(label) as labels:
        size = labels.size
    expected = _size(image)
    if size != expected:
        raise DataError(
            f"{label}: is {size[0]} x {size[1]}, "
            f"but its image {image} is {expected[0]} x {expected[1]}"
        )


def read_labels(path: Path) -> np.ndarray:  # [H, W] integers
    """The labels of a grey image.

    Raises:
        DataError: for one of colours, or of a palette.
        OSError: if it cannot be decoded; the message names it.
    """
    with _opened(path) as image:
        if image.mode not in LABEL_MODES:
            remedy = "; if its indices are, save np.asarray(Image.open(FILE))"
            raise DataError(
                f"{path}: is of Pillow's mode {image.mode}; expected grey whose values are the "
                f"labels{remedy if image.mode == 'P' else ''}"
            )
        labels = np.asarray(image)
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
        try:
            indices = [int(row[heading.index("Idx")]) for row in rows[1:]]
            names = [row[heading.index("Name")].split(",")[0].strip() for row in rows[1:]]
        except (IndexError, ValueError) as error:
            raise DataError(
                f"{path}: a row that does not fit its heading ({first_line(error)})"
            ) from error
        if indices != [*range(first, first + len(indices))]:
            raise DataError(f"{path}: expected Idx {first}, {first + 1}, ... in this order")
        return names
    path = root / "classes.txt"
    return [line.strip() for line in _lines(path)] if path.exists() else None


def _count(sample: tuple[Path, Path]) -> tuple[np.ndarray, str]:
    try:
        check_pair(*sample)
        return np.bincount(read_labels(sample[1]).ravel()), ""
    except (DataError, OSError) as error:
        return np.empty(0, dtype=np.int64), first_line(error)


def _total(counts: list[np.ndarray]) -> np.ndarray:
    """The sum of arrays of different lengths."""
    total = np.zeros(max(map(len, counts), default=0), dtype=np.int64)
    for pixels in counts:
        total[: len(pixels)] += pixels
    return total


def _by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise DataError(
            f"--data: there is no folder {folder}; expected images/training, images/validation, "
            f"annotations/training and annotations/validation in {folder.parent.parent}"
        )
    known = Image.registered_extensions()
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in known and not path.name.startswith("."):
            if path.stem in found:
                raise DataError(f"{path}: has the same name as {found[path.stem]}; remove one")
            found[path.stem] = path
    return found


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image to look into; what Pillow raises meanwhile becomes an OSError naming the file."""
    try:
        with Image.open(path) as image:
            yield image
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise OSError(f"{path}: not an image of a kind that Pillow reads") from error
    except Exception as error:  # decoders raise what they like
        raise OSError(f"{path}: a broken image ({first_line(error)})") from error


def _size(path: Path) -> tuple[int, int]:
    """Width and height as read_image gives them; only PNGs have to be decoded for it."""
    with _opened(path) as image:
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        return (image.height, image.width) if turned else image.size


def _lines(path: Path) -> list[str]:
    problems: list[str] = []
    lines = [line for _, line in numbered_lines(path, problems) if line.strip()]
    if problems:
        raise DataError(problems[0])
    return lines


def _listed(values: Sequence[object]) -> str:
    shown = ", ".join(map(str, values[:LISTED]))
    return shown + (f" and {len(values) - LISTED} more" if len(values) > LISTED else "")
