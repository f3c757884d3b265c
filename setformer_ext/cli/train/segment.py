"""Semantic segmentation: a class for each pixel, in ADE20K's layout."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix
from torchvision.transforms import v2
from torchvision.tv_tensors import Image, Mask

from ...vision.segmentation import DECODERS, enlargement, from_card, segment
from ..images import add_annotated, add_max_pixels
from .ade20k import IGNORED, LARGEST_LABEL, Ade20k, look_over
from .backbones import MODEL_ERRORS, add_flip, add_network, load_backbone, require_backbone
from .options import add_keys_and_values, add_option, not_negative, number, positive
from .task import Batch, DataError, Metrics, Task, TrainingError, blaming, in_lists, listed

LISTED = 5  # problems of the data in one message


class IntersectionOverUnion(Metrics):
    """Mean IoU and pixel accuracy over all pixels, and the IoU of each class in the truth.

    The mean is over classes in the truth or in the answers: their IoU is defined.

    Args:
        classes: their names.
        short_side, window: see :func:`setformer_ext.vision.segmentation.segment`.
    """

    def __init__(self, classes: Sequence[str], short_side: int, window: int) -> None:
        self.classes, self.short_side, self.window = classes, short_side, window
        self.confusion = MulticlassConfusionMatrix(len(classes), ignore_index=IGNORED)

    def update(self, model: nn.Module, batch: Batch) -> None:
        for image, truth in zip(*batch, strict=True):
            self.confusion.update(segment(model, image, self.short_side, self.window), truth)

    def compute(self) -> dict[str, float]:
        counts = self.confusion.compute().double()  # [truth, answer]
        right, truth = counts.diagonal(), counts.sum(1)
        union = truth + counts.sum(0) - right
        figures = {
            "mIoU": (right / union)[union > 0].mean().item(),
            "pixel_accuracy": (right.sum() / counts.sum()).item(),
        }
        for i, name in enumerate(self.classes):
            if truth[i] > 0:
                figures[f"IoU/{name}"] = (right[i] / union[i]).item()
        return figures


class Segment(Task):
    """``DATA/images/{training,validation}`` and ``DATA/annotations/{training,validation}``."""

    name = "segment"
    monitor = "mIoU"
    defaults = {"batch_size": 16}
    train: Ade20k
    eval: Ade20k
    collate = staticmethod(in_lists)

    @staticmethod
    def add_options(parser: argparse._ArgumentGroup) -> None:
        add = partial(add_option, parser)
        add(
            "--data DIR",
            Path,
            help="holds images/ and annotations/, each with training/ and validation/, and the "
            "classes' names in objectInfo150.txt (ADE20K's) or classes.txt (one a line)",
            required=True,
        )
        add(
            "--ignore-label LABEL",
            _label_or_none,
            0,
            "of pixels without a class, or none; the classes are 1, 2, ... if it is 0, else "
            "0, 1, ...",
        )
        add_annotated(parser)
        add_max_pixels(parser)
        add_network(parser)
        add("--decoder", str, "upernet", choices=tuple(DECODERS))
        purpose = "for segmentation-models-pytorch, such as decoder_channels=128"
        add_keys_and_values(parser, "--decoder-options", purpose)
        size = "images are resized so that their shorter side is S; 0 for their own size"
        add("--short-side S", number(int, 0), 512, size)
        add(
            "--window S",
            number(int, 0),
            0,
            "evaluate and predict by overlapping windows of S x S, as large images need; 0 for "
            "whole images",
        )
        crop = "train on random crops of S x S, or of height and width"
        add("--crop S", positive, [512], crop, nargs="+")
        scaling = "of images scaled by a random factor"
        add("--scale-jitter LOW HIGH", number(float, 0.01), [0.5, 2.0], scaling)
        add_flip(parser)
        parser.add_argument(
            "--photometric",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="distort brightness, contrast, saturation and hue at random (default: yes)",
        )
        add("--dice WEIGHT", not_negative, 0.0, "of the Dice loss beside the cross entropy")

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        require_backbone(options)
        if len(options.crop) > 2:
            raise TrainingError(f"--crop: expected one or two numbers, got {len(options.crop)}")
        config = timm.get_pretrained_cfg(options.model).to_dict()
        self.mean, self.std = list(config["mean"]), list(config["std"])
        reading = (options.annotated, options.max_pixels)
        self.train = Ade20k(options.data, "training", self._augmentation(), *reading)
        self.eval = Ade20k(options.data, "validation", plain(self.mean, self.std), *reading)
        self.labels, self.failures = look_over(
            options.data, self.train, self.eval, options.ignore_label
        )
        if self.failures and options.on_error == "stop":
            raise DataError(f"{listed(self.failures, LISTED)} (--on-error skip: go on without)")
        self.train.labels = self.eval.labels = self.labels
        self.dice = smp.losses.DiceLoss("multiclass", ignore_index=IGNORED)

    def _augmentation(self) -> Callable[..., Any]:
        options = self.options
        crop = options.crop * 2 if len(options.crop) == 1 else options.crop
        fill = {Image: [round(255 * value) for value in self.mean], Mask: IGNORED}
        steps = [
            v2.RandomCrop(crop, pad_if_needed=True, fill=fill),
            v2.RandomHorizontalFlip(options.flip),
            *([v2.RandomPhotometricDistort()] if options.photometric else []),
            plain(self.mean, self.std),
        ]
        return partial(_augment, options.short_side, options.scale_jitter, v2.Compose(steps))

    def describe(self) -> str:
        text = (
            f"{len(self.train)} training and {len(self.eval)} evaluation images of "
            f"{len(self.labels.names)} classes"
        )
        failures = [listed(self.failures, LISTED)] if self.failures else []
        return "; ".join([text, *failures, *self.train.notes, *self.eval.notes])

    def make_model(self) -> nn.Module:
        options = self.options
        with blaming(f"--model, --decoder: {options.model}", *MODEL_ERRORS):
            model = from_card(self.card())
        load_backbone(model.backbone, options)
        return model

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        images, classes = map(torch.stack, batch)  # [B, 3, H, W], [B, H, W]
        logits = model(images).float()  # [B, classes, H, W]
        # The mean would be 0 / 0 in a batch that has only ignored pixels.
        sum_ = F.cross_entropy(logits, classes, ignore_index=IGNORED, reduction="sum")
        losses = {"cross_entropy": sum_ / (classes != IGNORED).sum().clamp(min=1)}
        if self.options.dice:
            losses["dice"] = self.options.dice * self.dice(logits, classes)
        return losses

    def metrics(self) -> Metrics:
        options = self.options
        return IntersectionOverUnion(self.labels.names, options.short_side, options.window)

    def card(self) -> dict[str, Any]:
        options = self.options
        return {
            "task": self.name,
            "model": options.model,
            "model_options": dict(options.model_options),
            "decoder": options.decoder,
            "decoder_options": dict(options.decoder_options),
            "classes": list(self.labels.names),
            "ignore_label": options.ignore_label,
            "mean": self.mean,
            "std": self.std,
            "short_side": options.short_side,
            "window": options.window,
        }


def _augment(
    short_side: int, jitter: tuple[float, float], rest: Callable[..., Any], image: Image, mask: Mask
) -> tuple[Tensor, Tensor]:
    """A random view of an image [3, H, W] and its mask [H, W]."""
    factor = random.uniform(*jitter) * enlargement(mask.shape, short_side)
    size = [max(1, round(side * factor)) for side in mask.shape]
    return rest(v2.functional.resize(image, size), v2.functional.resize(mask, size))


def plain(mean: Sequence[float], std: Sequence[float]) -> v2.Transform:
    """An image and its mask without augmentation; the image is normalised."""
    scaled = v2.ToDtype(torch.float32, scale=True)  # masks stay integers
    return v2.Compose([scaled, v2.Normalize(mean, std), v2.ToPureTensor()])


def _label_or_none(text: str) -> int | None:
    return None if text == "none" else number(int, 0, LARGEST_LABEL)(text)
