"""The trained models of the three tasks, asked about one image of any size at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import timm
import torch
from timm.data import create_transform
from torch import Tensor, nn
from torchvision.transforms.functional import to_tensor

from ...vision import detection, segmentation  # registers the backbone with timm, too
from ..images import middle
from ..train.ade20k import Labels
from .answers import Classification, Detection, ImageAnswer, Segmentation

if TYPE_CHECKING:
    from PIL import Image

TOP = 5  # classes in the answer of a classification


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
    def __call__(self, image: Image.Image, threshold: float = 0.5) -> ImageAnswer:
        """The answer about an RGB image; only detection uses the threshold."""

    def look(self, image: Image.Image) -> None:
        """Run the backbone once over a whole RGB image, so that its layers can be observed."""
        self(image)

    def size_seen(self, image: Image.Image) -> tuple[int, int] | None:
        """Height and width of the image within the backbone's input, without the padding."""
        return None

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
        pixels = self.transform(middle(image).convert(self.mode)).unsqueeze(0)
        top = self.model(pixels)[0].softmax(0).topk(min(TOP, len(self.classes)))
        return Classification([self.classes[i] for i in top.indices.tolist()], top.values)


class Detector(Predictor):
    """torchvision's detectors; they resize and normalise images themselves."""

    def __init__(self, card: dict[str, Any]) -> None:
        super().__init__(card)
        self.model = detection.from_card(card)
        self.heads: Any = getattr(self.model, "roi_heads", self.model)
        self.most = self.heads.detections_per_img

    @torch.no_grad()
    def __call__(self, image: Image.Image, threshold: float = 0.5) -> Detection:
        pixels = to_tensor(image)
        found = self._find(pixels, threshold, self.most)
        masks = found["masks"][:, 0] > 0.5 if "masks" in found else None
        labels, scores, best = found["labels"] - 1, found["scores"], None
        if len(scores) == 0:
            guess = self._find(pixels, 0.0, 1)
            if len(guess["scores"]):
                best = self.classes[int(guess["labels"]) - 1], float(guess["scores"])
        return Detection(self.classes, found["boxes"], labels, scores, masks, best)

    def look(self, image: Image.Image) -> None:
        self._find(to_tensor(image), 0.5, self.most)

    def _find(self, pixels: Tensor, threshold: float, most: int) -> dict[str, Tensor]:
        """The surest objects, at most `most`."""
        # Applied before the non-maximum suppression, in which boxes of lower scores change nothing.
        self.heads.score_thresh, self.heads.detections_per_img = threshold, most
        return self.model([pixels])[0]

    def size_seen(self, image: Image.Image) -> tuple[int, int] | None:
        transform: Any = self.model.transform
        size: tuple[int, int] = transform([to_tensor(image)])[0].image_sizes[0]
        return size


class Segmenter(Predictor):
    """A backbone and a decoder, over the whole image or over windows of it."""

    def __init__(self, card: dict[str, Any]) -> None:
        super().__init__(card)
        self.model = segmentation.from_card(card)
        self.short_side, self.window = card["short_side"], card["window"]
        # Older cards lack it; its default is 0.
        self.labels = Labels(tuple(self.classes), card.get("ignore_label", 0))

    def __call__(self, image: Image.Image, threshold: float = 0.5) -> Segmentation:
        return self._segment(image, self.window)

    def look(self, image: Image.Image) -> None:
        self._segment(image, window=0)

    @torch.no_grad()
    def _segment(self, image: Image.Image, window: int) -> Segmentation:
        pixels = (to_tensor(image) - self.mean) / self.std
        labels = segmentation.segment(self.model, pixels, self.short_side, window)
        return Segmentation(self.classes, labels, self.labels.first)


PREDICTORS: dict[str, type[Predictor]] = {
    "classify": Classifier,
    "detect": Detector,
    "segment": Segmenter,
}
