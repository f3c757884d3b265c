"""The trained models of the three tasks, asked about one image of any size at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import timm
import torch
from timm.data import create_transform
from torch import Tensor, nn

from .. import vision  # noqa: F401  registers the backbone with timm
from .answers import Answer, Classification

if TYPE_CHECKING:
    from PIL import Image

TOP = 5  # classes that a classification tells


class Predictor(ABC):
    """A model rebuilt from a training's card, without its weights yet.

    Args:
        card: what ``Task.card()`` wrote.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: if no model can be made of the card.
    """

    model: nn.Module

    def __init__(self, card: dict[str, Any]) -> None:
        self.classes: list[str] = card["classes"]
        self.mean = torch.tensor(card["mean"]).view(-1, 1, 1)
        self.std = torch.tensor(card["std"]).view(-1, 1, 1)

    @abstractmethod
    def __call__(self, image: Image.Image, threshold: float = 0.5) -> Answer:
        """The answer about an RGB image; only detection has a use for the threshold."""

    def as_seen(self, pixels: Tensor) -> Tensor:  # [1 or 3, H, W], normalised -> [3, H, W]
        """What the network saw, in [0, 1]."""
        return (pixels * self.std + self.mean).clamp(0, 1).expand(3, -1, -1)


class Classifier(Predictor):
    """Any classifier that timm knows."""

    def __init__(self, card: dict[str, Any]) -> None:
        super().__init__(card)
        self.model = timm.create_model(card["model"], **card["model_options"])
        if self.model.num_classes != len(self.classes):
            raise ValueError(
                f"{len(self.classes)} classes, but the model has {self.model.num_classes}"
            )
        keys = ("input_size", "interpolation", "mean", "std", "crop_pct")
        self.transform = create_transform(**{key: card[key] for key in keys})
        self.mode = "L" if len(self.mean) == 1 else "RGB"

    @torch.no_grad()
    def __call__(self, image: Image.Image, threshold: float = 0.5) -> Classification:
        pixels = self.transform(image.convert(self.mode)).unsqueeze(0)
        top = self.model(pixels)[0].softmax(0).topk(min(TOP, len(self.classes)))
        return Classification([self.classes[i] for i in top.indices.tolist()], top.values)


PREDICTORS: dict[str, type[Predictor]] = {"classify": Classifier}
