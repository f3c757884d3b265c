"""Trained models as functions of tensors alone, as ONNX has them."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from .loading import LANGUAGE, RunError, load_run, load_text_run, read_card

IMAGES = ((2, 96, 128), (1, 160, 64), (3, 131, 77))  # batch, height and width to try
TEXTS = ((2, 8), (1, 5))  # batch and tokens, beside the longest


class Network(ABC):
    """A model in eval mode on the CPU.

    Args:
        card: what ``Task.card()`` wrote.
    """

    model: nn.Module  # gives logits
    inputs: list[str]  # names of its arguments
    sizes: tuple[tuple[int, ...], ...]  # to try, the first to export with
    preprocessing: str  # what is done to images or texts

    def __init__(self, card: dict[str, Any]) -> None:
        self.card = card

    @abstractmethod
    def example(self, *size: int) -> tuple[Tensor, ...]:
        """Inputs of one of the sizes, made up."""

    @abstractmethod
    def dynamic_shapes(self) -> Any:
        """Which sizes may change, as ``torch.export.export`` takes them."""

    @property
    def metadata(self) -> dict[str, str]:
        """The card, each entry in JSON, and what is done to images or texts, in words."""
        entries = {name: json.dumps(value) for name, value in self.card.items()}
        return {"preprocessing": self.preprocessing, **entries}


class ImageNetwork(Network):
    """A classifier, [B, classes], or a segmenter, [B, classes, H, W], of images [B, C, H, W]."""

    def __init__(self, folder: Path, card: dict[str, Any]) -> None:
        super().__init__(card)
        self.model = load_run(folder).model
        self.inputs, self.sizes = ["images"], IMAGES
        self.channels = len(card["mean"])
        self.fixed = getattr(self.model, "pretrained_cfg", {}).get("fixed_input_size", False)
        if self.fixed:
            height, width = card["input_size"][1:]
            self.sizes = tuple((batch, height, width) for batch, *_ in IMAGES)
        if card["task"] == "classify":
            height, width = card["input_size"][1:]
            share = card["crop_pct"]
            size = (
                f"resized by {card['interpolation']} so that the central {height} x {width} are "
                f"{share:.3g} of the shorter side, and cropped to them"
            )
        else:
            size = f"the shorter side resized to {card['short_side'] or 'what it is'}"
        colours = "grey" if self.channels == 1 else "RGB"
        self.preprocessing = f"{colours} images, {size}; from 0 to 1, minus mean, divided by std"

    def example(self, *size: int) -> tuple[Tensor, ...]:
        batch, height, width = size
        return (torch.randn(batch, self.channels, height, width),)

    def dynamic_shapes(self) -> Any:
        return (
            {0: Dim.DYNAMIC} if self.fixed else {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},
        )


class TextNetwork(Network):
    """A classifier of texts, [B, classes or 1], or words for each place, [B, N, words]."""

    def __init__(self, folder: Path, card: dict[str, Any]) -> None:
        super().__init__(card)
        predictor = load_text_run(folder)
        self.inputs = [*predictor.tokenizer.model_input_names]
        self.model = Logits(predictor.model.to("cpu"), self.inputs)
        self.words = len(predictor.tokenizer)
        length = card.get("sequence_length")
        self.sizes = (*TEXTS, (3, length or 33))
        cut = f", cut to {length} tokens" if length else ""
        self.preprocessing = f"texts as the tokenizer of the training gives them{cut}, padded"

    def example(self, *size: int) -> tuple[Tensor, ...]:
        mask = torch.ones(size, dtype=torch.int64)
        mask[-1, size[1] // 2 + 1 :] = 0
        known = {
            "input_ids": torch.randint(self.words, size),
            "attention_mask": mask,
            "token_type_ids": torch.zeros(size, dtype=torch.int64),
        }
        return tuple(known[name] for name in self.inputs)

    def dynamic_shapes(self) -> Any:
        return {"inputs": tuple({0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for _ in self.inputs)}


class Logits(nn.Module):
    """A model of transformers, of tensors by their places."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, inputs, strict=True))).logits


def load_network(folder: Path) -> Network:
    """The model of a training's output folder.

    Raises:
        RunError: if the training cannot be used, or is of detection.
    """
    card = read_card(folder)
    if card["task"] in LANGUAGE:
        return TextNetwork(folder, card)
    if card["task"] == "detect":
        raise RunError(
            f"{folder}: a training of detect, and torch.export takes none of torchvision's "
            "detectors: how many boxes there are depends on what is found; expected a training of "
            f"classify, segment, {' or '.join(LANGUAGE)}"
        )
    return ImageNetwork(folder, card)
