"""What a model says about one image or text: as text, in JSON, as a mask, and in a table."""

from __future__ import annotations

import csv
import io
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

CORNERS = ("x0", "y0", "x1", "y1")


class Answer(ABC):
    """What a model says about one image or text."""

    @abstractmethod
    def text(self) -> str:
        """What the terminal shows, mostly one line."""

    @abstractmethod
    def json(self) -> dict[str, Any]:
        """The whole answer in JSON's types; coordinates in pixels of the image."""


class ImageAnswer(Answer):
    """What a model says about one image; it names classes."""

    classes: list[str]

    def mask(self) -> Image.Image | None:
        """What is said about each pixel, as a grey image of the image's size; None if nothing is.

        Values have 8 bits, or 16 if there are values above 255.
        """
        return None


@dataclass
class Classification(ImageAnswer):
    """The most likely classes, the likeliest first."""

    classes: list[str]
    probabilities: Tensor  # [K], descending

    def text(self) -> str:
        return _shares(self.classes, self.probabilities.tolist())

    def json(self) -> dict[str, Any]:
        pairs = zip(self.classes, self.probabilities.tolist(), strict=True)
        return {"classes": [{"name": name, "probability": p} for name, p in pairs]}


@dataclass
class Detection(ImageAnswer):
    """Objects, the surest first."""

    classes: list[str]  # all that the model knows
    boxes: Tensor  # [K, 4], x0, y0, x1, y1 in pixels
    labels: Tensor  # [K] int64, indices into classes
    scores: Tensor  # [K], descending
    masks: Tensor | None  # [K, H, W] bool
    best: tuple[str, float] | None = None  # the surest class and its score, if there are no objects

    def counts(self) -> list[tuple[int, int]]:
        """The classes of the objects with the number of each, the largest first."""
        return Counter(self.labels.tolist()).most_common()

    def text(self) -> str:
        found = ", ".join(f"{count} x {self.classes[label]}" for label, count in self.counts())
        return found or self.nothing()

    def nothing(self) -> str:
        """Says that nothing was found, and which class had the best score."""
        if self.best is None:
            return "nothing found"
        name, score = self.best
        return f"nothing found (best score {score:.2g}, {name})"

    def json(self) -> dict[str, Any]:
        names = [self.classes[label] for label in self.labels.tolist()]
        objects: list[dict[str, Any]] = [
            {"name": name, "score": score, "box": box}
            for name, score, box in zip(
                names, self.scores.tolist(), self.boxes.tolist(), strict=True
            )
        ]
        if self.masks is not None:
            for thing, mask in zip(objects, self.masks, strict=True):
                thing["segmentation"] = _run_lengths(mask)
        if self.best is None:
            return {"objects": objects}
        name, score = self.best
        return {"objects": objects, "best": {"name": name, "score": score}}

    def mask(self) -> Image.Image | None:
        """The number of the object at each pixel: 1 for the first and surest, which covers others;
        0 for none."""
        if self.masks is None:
            return None
        numbers = np.zeros(self.masks.shape[1:], dtype=np.int64)
        for number in range(len(self.masks), 0, -1):
            numbers[self.masks[number - 1].numpy()] = number
        return _grey(numbers)


@dataclass
class Segmentation(ImageAnswer):
    """One class for every pixel."""

    classes: list[str]  # all that the model knows
    labels: Tensor  # [H, W] int64, indices into classes
    first_label: int = 0  # of the first class in the training's own label files

    def present(self) -> list[tuple[int, float]]:
        """The classes in the image with their shares of the pixels, the largest first."""
        shares = self.labels.flatten().bincount(minlength=len(self.classes)) / self.labels.numel()
        order = shares.argsort(descending=True, stable=True)
        return [(label, float(shares[label])) for label in order.tolist() if shares[label] > 0]

    def text(self) -> str:
        present = self.present()
        return _shares(
            [self.classes[label] for label, _ in present], [share for _, share in present]
        )

    def json(self) -> dict[str, Any]:
        return {
            "classes": [
                {
                    "name": self.classes[label],
                    "share": share,
                    "segmentation": _run_lengths(self.labels == label),
                }
                for label, share in self.present()
            ]
        }

    def mask(self) -> Image.Image:
        """The labels, as the training's own label files have them."""
        return _grey(self.labels.numpy() + self.first_label)


@dataclass
class Number(Answer):
    """A number, such as how similar two texts are."""

    value: float

    def text(self) -> str:
        return f"{self.value:.3f}"

    def json(self) -> dict[str, Any]:
        return {"number": self.value}


@dataclass
class Filling(Answer):
    """The most likely words in place of each mask, the likeliest first."""

    filled: str  # the text with the likeliest words
    words: list[list[str]]  # [masks][K]
    probabilities: Tensor  # [masks, K], descending

    def text(self) -> str:
        return "\n  ".join([self.filled, *map(_shares, self.words, self.probabilities.tolist())])

    def json(self) -> dict[str, Any]:
        masks = zip(self.words, self.probabilities.tolist(), strict=True)
        words = [
            {"mask": place, "word": word, "probability": p}
            for place, mask in enumerate(masks, start=1)
            for word, p in zip(*mask, strict=True)
        ]
        return {"filled": self.filled, "words": words}


def as_csv(answers: list[dict[str, Any]]) -> str:
    """A table of answers in JSON's types, a row for each class, object or word, one at least.

    Columns about the whole are repeated for each of its parts; each coordinate has a column.
    """
    rows: list[dict[str, Any]] = []
    for answer in answers:
        whole = {key: value for key, value in answer.items() if not isinstance(value, list | dict)}
        parts = [part for value in answer.values() if isinstance(value, list) for part in value]
        for part in parts or [{}]:
            flat = {k: value for k, value in part.items() if k not in ("box", "segmentation")}
            rows.append(whole | flat | dict(zip(CORNERS, part.get("box", ()), strict=False)))
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue()


def _shares(names: Sequence[str], shares: Sequence[float]) -> str:
    return ", ".join(f"{name} {share:.1%}" for name, share in zip(names, shares, strict=True))


def _run_lengths(mask: Tensor) -> dict[str, Any]:  # [H, W] bool
    """COCO's compressed run lengths, which pycocotools.mask.decode reads."""
    from pycocotools import mask as coco

    encoded = coco.encode(np.asfortranarray(mask.to(torch.uint8).numpy()))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def _grey(values: np.ndarray) -> Image.Image:  # [H, W] integers from 0 to 65535
    from PIL import Image

    return Image.fromarray(values.astype(np.uint8 if values.max(initial=0) < 256 else np.uint16))
