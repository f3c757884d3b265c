"""Classification of images in one folder per class, as in ImageNet."""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch.nn.functional as F
from PIL import Image
from timm.data import Mixup, auto_augment, create_transform, resolve_data_config
from torch import Tensor, nn
from torch.utils.data import default_collate
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from ..images import add_max_pixels
from .backbones import (
    MODEL_ERRORS,
    add_flip,
    add_network,
    freeze_norms,
    load_pretrained,
    require_network,
)
from .labelled_images import LabelledImages, classes_without_images, files_left_out, find_data
from .options import add_option, fraction, not_negative, number, positive
from .task import EVAL_LOSS, Batch, DataError, Metrics, Task, TrainingError, blaming


class Accuracy(Metrics):
    """The loss, and shares of images whose class is the likeliest, or among the five likeliest."""

    def __init__(self, num_classes: int) -> None:
        self.top1 = MulticlassAccuracy(num_classes, top_k=1, average="micro")
        self.top5 = MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro")
        self.loss = MeanMetric(nan_strategy=math.inf)  # by default NaN would be left out
        self.num_classes = num_classes

    def update(self, model: nn.Module, batch: Batch) -> None:
        images, labels = batch
        logits = model(images).float()
        self.loss.update(F.cross_entropy(logits, labels), weight=len(labels))
        self.top1.update(logits, labels)
        self.top5.update(logits, labels)

    def compute(self) -> dict[str, float]:
        figures = {EVAL_LOSS: self.loss.compute().item(), "top1": self.top1.compute().item()}
        if self.num_classes >= 5:  # of fewer classes all are among the first five
            figures["top5"] = self.top5.compute().item()
        return figures


class Classify(Task):
    """Images in ``DATA/train/CLASS/`` and ``DATA/val/CLASS/``, or in ``DATA/CLASS/``."""

    name = "classify"
    monitor = "top1"
    train: LabelledImages
    eval: LabelledImages
    collate = staticmethod(default_collate)

    @staticmethod
    def add_options(parser: argparse._ArgumentGroup) -> None:
        add = partial(add_option, parser)
        layout = "holds train/CLASS/*.jpg and val/CLASS/*.jpg, or with --val-share CLASS/*.jpg"
        add("--data DIR", Path, help=layout, required=True)
        held_out = "of the images of every class in --data, drawn by --seed, to evaluate on"
        add("--val-share SHARE", number(float, 0.001, 0.999), help=held_out)
        add_max_pixels(parser)
        weights = "weights to start from; the classifier is left out if it is of other classes"
        add_network(parser, "any classifier", weights)
        size = "images are S x S (default: what the model says of itself, mostly 224)"
        add("--input-size S", positive, help=size)
        add("--in-chans", int, 3, "1 for grey, 3 for colours", choices=(1, 3))
        crop = "least share of an image's area that a random crop has"
        add("--crop-scale SHARE", number(float, 0.01, 1), 0.08, crop)
        add_flip(parser)
        add("--auto-augment POLICY", str, "rand-m9-mstd0.5-inc1", "timm's name of it, or none")
        add("--color-jitter", not_negative, 0.4, "strength, without a policy")
        add("--random-erasing PROBABILITY", fraction, 0.25)
        add("--mixup ALPHA", not_negative, 0.8, "0 for none")
        add("--cutmix ALPHA", not_negative, 1.0, "0 for none")
        add("--label-smoothing", fraction, 0.1)

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        require_network(options)
        train, val = find_data(options)
        self.classes = [*train.classes]
        self.without = classes_without_images(self.classes, train, val)
        if self.without and options.on_error == "stop":
            raise DataError(f"--data: {'; '.join(self.without)} (--on-error skip: go on without)")
        self.notes = [*self.without, *files_left_out(train, val)]
        mode = "L" if options.in_chans == 1 else "RGB"
        self.train = LabelledImages(train, self.classes, mode, options.max_pixels)
        self.eval = LabelledImages(val, self.classes, mode, options.max_pixels)
        if options.batch_size % 2 and (options.mixup or options.cutmix):
            raise TrainingError(
                f"--batch-size: expected an even number, got {options.batch_size}: --mixup and "
                "--cutmix pair the images; give them as 0, or another size"
            )
        given = dict(options.model_options)
        for name, source in (("num_classes", "the folders"), ("in_chans", "--in-chans")):
            if name in given:
                raise TrainingError(f"--model-options: {name} comes from {source}; leave it out")
        self.model_options = {
            **given,
            "num_classes": len(self.classes),
            "in_chans": options.in_chans,
        }
        self.config = self._data_config()
        self._make_transforms()
        self.mixup = (
            Mixup(
                options.mixup,
                options.cutmix,
                label_smoothing=options.label_smoothing,
                num_classes=len(self.classes),
            )
            if options.mixup or options.cutmix
            else None
        )

    def _make_transforms(self) -> None:
        options = self.options
        common = {key: self.config[key] for key in ("input_size", "interpolation", "mean", "std")}
        operations = auto_augment.NAME_TO_OP
        posterize = {name: _posterize for name in operations if "Posterize" in name}
        where = f"--auto-augment: {options.auto_augment!r}"
        with (
            patch.dict(operations, posterize),
            blaming(where, AssertionError, KeyError, ValueError),
        ):
            self.train.transform = create_transform(
                **common,
                is_training=True,
                scale=(options.crop_scale, 1.0),
                hflip=options.flip,
                auto_augment=None if options.auto_augment == "none" else options.auto_augment,
                color_jitter=options.color_jitter or None,
                re_prob=options.random_erasing,
            )
        self.eval.transform = create_transform(**common, crop_pct=self.config["crop_pct"])

    def _data_config(self) -> dict[str, Any]:
        """The model's data configuration, at this size and with this many channels."""
        pretrained = timm.get_pretrained_cfg(self.options.model).to_dict()
        config = resolve_data_config(pretrained_cfg=pretrained)
        channels = self.options.in_chans
        size = self.options.input_size
        if size and pretrained.get("fixed_input_size"):
            self.model_options.setdefault("img_size", size)
        config["input_size"] = (channels, *((size, size) if size else config["input_size"][1:]))
        if channels == 1:
            for name in ("mean", "std"):
                config[name] = (sum(config[name]) / len(config[name]),)
        return config

    def describe(self) -> str:
        size = "x".join(str(s) for s in self.config["input_size"])
        return (
            f"{len(self.train)} training and {len(self.eval)} evaluation images of "
            f"{len(self.classes)} classes, read as {size}" + "".join(f"; {s}" for s in self.notes)
        )

    def make_model(self) -> nn.Module:
        with blaming(f"--model-options: {self.options.model}", *MODEL_ERRORS):
            model = timm.create_model(self.options.model, **self.model_options)
        if self.options.pretrained is not None:
            load_pretrained(model, self.options.pretrained)
        freeze_norms(model, self.options)
        return model

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        images, labels = batch  # [B, C, H, W], [B]
        if self.mixup is not None and len(images) % 2 == 0:  # mixup pairs images
            images, labels = self.mixup(images, labels)  # labels: [B, classes]
            return {"cross_entropy": F.cross_entropy(model(images).float(), labels)}
        smoothing = self.options.label_smoothing
        logits = model(images).float()
        return {"cross_entropy": F.cross_entropy(logits, labels, label_smoothing=smoothing)}

    def metrics(self) -> Metrics:
        return Accuracy(len(self.classes))

    def card(self) -> dict[str, Any]:
        return {
            "task": self.name,
            "model": self.options.model,
            "model_options": self.model_options,
            "classes": self.classes,
            **{k: self.config[k] for k in ("input_size", "interpolation", "mean", "std")},
            "crop_pct": self.config["crop_pct"],
        }


def _posterize(image: Image.Image, bits_to_keep: int, **more: Any) -> Image.Image:
    """timm's, but it also allows 0 bits, which gives black, and which Pillow refuses from 13 on."""
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep, **more)
