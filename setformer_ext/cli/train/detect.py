"""Detection of objects by boxes, and by masks, in images annotated in COCO's format."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision
from torchvision.transforms import v2

from ...vision.detection import ANCHOR_SIZES, DETECTORS, from_card
from ..images import add_annotated, add_max_pixels
from .backbones import MODEL_ERRORS, add_flip, add_network, load_backbone, require_backbone
from .coco import Coco
from .options import add_keys_and_values, add_option, fraction, number, positive
from .task import Batch, DataError, Metrics, Task, TrainingError, blaming, in_lists, listed


class AveragePrecision(Metrics):
    """COCO's average precision of boxes and of masks: the mean over IoU 0.5 to 0.95, at 0.5, at
    0.75."""

    def __init__(self, masks: bool) -> None:
        self.masks = masks
        kinds = ("bbox", "segm") if masks else ("bbox",)
        self.metric = MeanAveragePrecision(
            iou_type=kinds, backend="pycocotools", sync_on_compute=False
        )
        self.metric.warn_on_many_detections = False

    def update(self, model: nn.Module, batch: Batch) -> None:
        images, targets = batch
        # Images go one by one: in a batch they are padded to one size, and attention sees the
        # padding, so that answers would depend on the other images.
        answers = [model([image])[0] for image in images]
        known = [
            {"boxes": t["boxes"], "labels": t["labels"], "iscrowd": t["crowd"].long()}
            for t in targets
        ]
        if self.masks:
            for target, thing in zip(targets, known, strict=True):
                thing["masks"] = target["masks"].bool()
            for answer in answers:
                answer["masks"] = answer["masks"][:, 0] > 0.5
        self.metric.update(*send_to_device((answers, known), "cpu"))

    def compute(self) -> dict[str, float]:
        # torchmetrics gathers image by image, and fails if processes have different numbers of
        # images.
        for name, images in self.metric.metric_state.items():
            setattr(self.metric, name, gather_object(images))
        result = self.metric.compute()
        prefixes = {"": "bbox_", "mask_": "segm_"} if self.masks else {"": ""}
        return {
            f"{own}{name}": result[f"{theirs}{key}"].item()
            for own, theirs in prefixes.items()
            for name, key in (("mAP", "map"), ("AP50", "map_50"), ("AP75", "map_75"))
        }


class ScaleJitter(v2.ScaleJitter):
    """torchvision's, but no side shrinks to 0 pixels."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {"size": tuple(max(side, 1) for side in super().make_params(flat_inputs)["size"])}


class Detect(Task):
    """``DATA/train2017``, ``DATA/val2017`` and ``DATA/annotations/instances_*2017.json``."""

    name = "detect"
    monitor = "mAP"
    defaults = {"batch_size": 2, "epochs": 36, "lr": 1e-4}
    train: Coco
    eval: Coco
    collate = staticmethod(in_lists)

    @staticmethod
    def add_options(parser: argparse._ArgumentGroup) -> None:
        add = partial(add_option, parser)
        layout = "holds train2017/, val2017/ and annotations/instances_{train,val}2017.json"
        add("--data DIR", Path, help=layout, required=True)
        kinds = tuple(DETECTORS)
        add("--detector", str, "mask_rcnn", "the others find boxes only", choices=kinds)
        add_network(parser)
        add(
            "--min-size S",
            number(int, 32),
            [800],
            "images are resized so that their shorter side is S; of several, a random one while "
            "training and then the last",
            nargs="+",
        )
        add("--max-size S", number(int, 32), 1333, "but their longer side no longer than S")
        add(
            "--anchor-sizes S",
            positive,
            list(ANCHOR_SIZES),
            "about the objects' sizes in pixels once resized, for the five levels of the pyramid",
            nargs=5,
        )
        add("--pyramid-channels C", positive, 256, "width of the pyramid and of the heads on it")
        parser.add_argument(
            "--group-norm",
            action="store_true",
            help="norm the convolutions of pyramid and heads in groups, and give the box head "
            "four: for training without --pretrained",
        )
        purpose = "for torchvision's detector, such as box_detections_per_img=300"
        add_keys_and_values(parser, "--detector-options", purpose)
        add(
            "--scale-jitter LOW HIGH",
            number(float, 0.01),
            help="train on random squares of min-size, of images scaled by a random factor of "
            "what would fit; 0.1 2 is usual where there is no pretraining (default: none)",
        )
        add_flip(parser)
        mirroring = "of mirroring up and down, as for aerial images"
        add("--vertical-flip PROBABILITY", fraction, 0.0, mirroring)
        parser.add_argument(
            "--photometric",
            action="store_true",
            help="distort brightness, contrast, saturation and hue at random",
        )
        add_annotated(parser)
        add_max_pixels(parser)

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        require_backbone(options)
        self.masks = options.detector == "mask_rcnn"
        if min(options.min_size) > options.max_size:
            raise TrainingError(
                f"--min-size: expected at most --max-size, {options.max_size}, "
                f"got {min(options.min_size)}"
            )
        data: Path = options.data
        self.train = read_split(options, data, "train2017", self.masks, crowds=False)
        used = {t["label"] for things in self.train.objects.values() for t in things}
        names = enumerate(self.train.classes, start=1)
        self.unused = [name for label, name in names if label not in used]
        if self.unused and options.on_error == "stop":
            raise DataError(
                f"--data: instances_train2017.json has no object of {', '.join(self.unused)} "
                "(--on-error skip: go on without)"
            )
        classes = self.train.classes
        self.eval = read_split(options, data, "val2017", self.masks, crowds=True, classes=classes)
        self.train.transform = self._augmentation()
        self.eval.transform = plain()

    def _augmentation(self) -> v2.Transform:
        """A random view of an image and of what is in it."""
        options, steps = self.options, []
        if options.photometric:
            steps.append(v2.RandomPhotometricDistort())
        if options.scale_jitter:
            size = (options.min_size[-1],) * 2
            steps.append(ScaleJitter(size, tuple(options.scale_jitter)))
            steps.append(v2.RandomCrop(size, pad_if_needed=True))
        steps += [
            v2.RandomHorizontalFlip(options.flip),
            v2.RandomVerticalFlip(options.vertical_flip),
            v2.ToDtype(torch.float32, scale=True),
            v2.SanitizeBoundingBoxes(labels_getter=_labels),
            v2.ToPureTensor(),
        ]
        return v2.Compose(steps)

    def describe(self) -> str:
        counts = [sum(map(len, data.objects.values())) for data in (self.train, self.eval)]
        text = (
            f"{len(self.train)} training and {len(self.eval)} evaluation images with {counts[0]} "
            f"and {counts[1]} objects of {len(self.train.classes)} classes"
        )
        if self.unused:
            text += f"; no object to train on of {', '.join(self.unused)}"
        problems = self.train.problems + self.eval.problems
        if problems:
            text += f"; {len(problems)} records were left out: {listed(problems)}"
        for data in (self.train, self.eval):
            text += "".join(f"; {data.file.name}: {note}" for note in data.notes)
        return text

    def make_model(self) -> nn.Module:
        options = self.options
        with blaming(f"--model: {options.model}", *MODEL_ERRORS):
            model: Any = from_card(self.card())
        load_backbone(model.backbone.body.model, options)
        return model

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        images, targets = batch  # a list of [3, H, W], of different sizes
        return model(images, targets)

    def metrics(self) -> Metrics:
        return AveragePrecision(self.masks)

    def card(self) -> dict[str, Any]:
        options = self.options
        config = timm.get_pretrained_cfg(options.model).to_dict()
        return {
            "task": self.name,
            "detector": options.detector,
            "model": options.model,
            "model_options": dict(options.model_options),
            "detector_options": {
                "anchor_sizes": options.anchor_sizes,
                "pyramid_channels": options.pyramid_channels,
                "group_norm": options.group_norm,
                "min_size": options.min_size,
                "max_size": options.max_size,
                "image_mean": config["mean"],
                "image_std": config["std"],
                **dict(options.detector_options),
            },
            "classes": self.train.classes,
            "mean": config["mean"],
            "std": config["std"],
        }


def read_split(
    options: argparse.Namespace, data: Path, split: str, masks: bool, **more: Any
) -> Coco:
    """The images and objects of COCO's layout in a folder; ``more`` are arguments of Coco."""
    return Coco(
        data / split,
        data / "annotations" / f"instances_{split}.json",
        masks=masks,
        skip=options.on_error == "skip",
        annotated=options.annotated,
        max_pixels=options.max_pixels,
        **more,
    )


def plain() -> v2.Transform:
    """An image to evaluate on, as it is."""
    return v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])


def _labels(sample: Any) -> tuple[Tensor, Tensor]:
    """The parts of a target that SanitizeBoundingBoxes reduces to the boxes that it keeps."""
    target = sample[1]
    return target["labels"], target["crowd"]
