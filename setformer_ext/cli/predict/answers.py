"""What a model says about one image, as text and as JSON."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Answer(ABC):
    """What a model says about one image."""

    @abstractmethod
    def text(self) -> str:
        """One line for the terminal."""

    @abstractmethod
    def json(self) -> dict[str, Any]:
        """The whole answer in JSON's types; coordinates in pixels of the image."""


@dataclass
class Classification(Answer):
    """The most likely classes, the likeliest first."""

    names: list[str]
    probabilities: Tensor  # [K], falling

    def text(self) -> str:
        return ", ".join(f"{name} {p:.1%}" for name, p in self._pairs())

    def json(self) -> dict[str, Any]:
        return {"classes": [{"name": name, "probability": p} for name, p in self._pairs()]}

    def _pairs(self) -> list[tuple[str, float]]:
        return list(zip(self.names, self.probabilities.tolist(), strict=True))


@dataclass
class Detection(Answer):
    """Objects, the surest first."""

    classes: list[str]  # all that the model knows
    boxes: Tensor  # [K, 4], x0, y0, x1, y1 in pixels
    labels: Tensor  # [K] int64, indices into classes
    scores: Tensor  # [K], falling
    masks: Tensor | None  # [K, H, W] bool
    best: tuple[str, float] | None = None  # the surest class and its score, if there are no objects

    def text(self) -> str:
        counts = Counter(self.classes[label] for label in self.labels.tolist())
        found = ", ".join(f"{count} x {name}" for name, count in counts.most_common())
        return found or self.nothing()

    def nothing(self) -> str:
        """That there are no objects, and what came next to one."""
        if self.best is None:
            return "nothing found"
        name, score = self.best
        return f"nothing found (best score {score:.2g}, {name})"

    def json(self) -> dict[str, Any]:
        objects = [
            {"name": self.classes[label], "score": score, "box": box}
            for label, score, box in zip(
                self.labels.tolist(), self.scores.tolist(), self.boxes.tolist(), strict=True
            )
        ]
        for thing, mask in zip(objects, () if self.masks is None else self.masks, strict=False):
            thing["segmentation"] = _run_lengths(mask)
        if self.best is None:
            return {"objects": objects}
        name, score = self.best
        return {"objects": objects, "best": {"name": name, "score": score}}


@dataclass
class Segmentation(Answer):
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
        return ", ".join(f"{self.classes[label]} {share:.1%}" for label, share in self.present())

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


def _run_lengths(mask: Tensor) -> dict[str, Any]:  # [H, W] bool
    """COCO's compressed run lengths, which pycocotools.mask.decode reads."""
    from pycocotools import mask as coco

    encoded = coco.encode(np.asfortranarray(mask.to(torch.uint8).numpy()))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}
