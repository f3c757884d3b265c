"""Trained models as functions of tensors only, as ONNX needs them."""

from __future__ import annotations

import io
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._pytree import tree_leaves
from torchvision.ops import box_iou

from ...onnx import export, export_traced
from .loading import LANGUAGE, load_run, load_text_run, read_card

IMAGES = ((2, 96, 128), (1, 160, 64), (3, 131, 77))  # batch, height and width to try
TEXTS = ((2, 8), (1, 5))  # batch and tokens to try, in addition to the longest
TOLERANCE = 1e-4  # of the largest logit
ROUNDING = 10  # times the error of torch's own float32, if that is more


class Network(ABC):
    """A model in eval mode on the CPU. Its only result are logits, unless it is a detector.

    Args:
        card: what ``Task.card()`` wrote.
    """

    model: nn.Module  # takes and returns tensors
    inputs: list[str]  # names of its arguments
    outputs = ["logits"]  # and of its results
    sizes: tuple[tuple[int, ...], ...]  # sizes to try; the model is exported with the first
    preprocessing: str  # what is done to images or texts
    unit = "of the largest logit"  # of the numbers that compare returns

    def __init__(self, card: dict[str, Any]) -> None:
        self.card = card

    @property
    def metadata(self) -> dict[str, str]:
        """The card, each entry in JSON, and what is done to images or texts, in words."""
        entries = {name: json.dumps(value) for name, value in self.card.items()}
        return {"preprocessing": self.preprocessing, **entries}

    @abstractmethod
    def example(self, *size: int) -> tuple[Tensor, ...]:
        """Made-up inputs of one of the sizes."""

    @abstractmethod
    def dynamic_shapes(self) -> Any:
        """Which sizes may change, in the exporter's form."""

    def to_onnx(self) -> Any:
        """The model as an ``onnx.ModelProto``, for any sizes. It may have more outputs after its
        own, which only ``compare`` needs."""
        return export(
            self.model,
            self.example(*self.sizes[0]),
            dynamic_shapes=self.dynamic_shapes(),
            input_names=self.inputs,
            output_names=self.outputs,
            verbose=False,
        ).model_proto

    @torch.no_grad()
    def compare(self, inputs: tuple[Tensor, ...], answers: list[Tensor]) -> tuple[float, float]:
        """The difference of another runtime's answers from torch's, and the allowed difference."""
        doubled = (x.double() if x.is_floating_point() else x for x in inputs)
        exact = deepcopy(self.model).double()(*doubled)
        return _difference(answers[0], self.model(*inputs), exact)


def _difference(answer: Tensor, expected: Tensor, exact: Tensor) -> tuple[float, float]:
    """The difference of an answer from torch's, as a share of the largest entry, and the allowed
    one; the shapes must be equal."""
    if answer.shape != expected.shape:
        return math.inf, 0.0
    finite = expected.isfinite()  # logits of classes that do not exist are -inf
    if not torch.equal(answer[~finite], expected[~finite]):
        return math.inf, 0.0
    answer, expected, exact = answer[finite], expected[finite], exact[finite]
    if not expected.numel():
        return 0.0, TOLERANCE
    scale = float(expected.abs().max()) or 1.0
    rounding = float((exact - expected).abs().max()) / scale
    difference = float((answer - expected).abs().max()) / scale
    return difference, max(TOLERANCE, ROUNDING * rounding)


class Images(Network):
    """A classifier, [B, classes], or a segmenter, [B, classes, H, W], of images [B, C, H, W]."""

    inputs = ["images"]

    def __init__(self, folder: Path, card: dict[str, Any]) -> None:
        super().__init__(card)
        self.model, self.sizes = load_run(folder).model, IMAGES
        self.channels = len(card["mean"])
        if card["task"] == "classify":
            height, width = card["input_size"][1:]
            size = (
                f"resized by {card['interpolation']} so that the central {height} x {width} are "
                f"{card['crop_pct']:.3g} of the shorter side, and cropped to them"
            )
        else:
            size = f"the shorter side resized to {card['short_side'] or 'what it is'}"
            if card["window"]:
                size += f", in overlapping windows of {card['window']}"
        self.fixed = getattr(self.model, "pretrained_cfg", {}).get("fixed_input_size", False)
        if self.fixed:
            self.sizes = tuple((batch, height, width) for batch, *_ in IMAGES)
        colours = "grey" if self.channels == 1 else "RGB"
        self.preprocessing = f"{colours} images, {size}; from 0 to 1, minus mean, divided by std"

    def example(self, *size: int) -> tuple[Tensor, ...]:
        batch, height, width = size
        return (torch.randn(batch, self.channels, height, width),)

    def dynamic_shapes(self) -> Any:
        return (dict.fromkeys((0,) if self.fixed else (0, 2, 3), Dim.DYNAMIC),)


class Texts(Network):
    """A classifier of texts, [B, classes or 1], or words for each place, [B, N, words]."""

    def __init__(self, folder: Path, card: dict[str, Any]) -> None:
        super().__init__(card)
        predictor = load_text_run(folder)
        self.inputs = [*predictor.tokenizer.model_input_names]
        self.model = _OfTexts(predictor.model.to("cpu"), self.inputs).eval()
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


class _OfTexts(nn.Module):
    """A model of transformers, called with tensors by position."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, inputs, strict=True))).logits


class Objects(Network):
    """A detector of one image [3, H, W] at a time: boxes [K, 4], labels [K] from 1 on, scores [K],
    and masks [K, 1, H, W] if it has them, the surest first.

    Another runtime may keep other objects where scores are nearly equal, which is frequent for
    noise and for models with little training. So objects are not compared, but the outputs of all
    heads, on the boxes that the other runtime has chosen before each head.
    """

    inputs = ["image"]
    sizes = tuple((height, width) for _, height, width in IMAGES)
    unit = "of the largest output of a head"
    preprocessing = "an RGB image of any size, from 0 to 1; label 1 is the first of the classes"

    def __init__(self, folder: Path, card: dict[str, Any]) -> None:
        super().__init__(card)
        masks = ["masks"] if card["detector"] == "mask_rcnn" else []
        self.outputs = ["boxes", "labels", "scores", *masks]
        self.detector = load_run(folder).model.eval()
        self.model = _WithInsides(self.detector, self.outputs).eval()
        self.compared = self.others = 0

    def example(self, *size: int) -> tuple[Tensor, ...]:
        return (torch.rand(3, *size),)

    def dynamic_shapes(self) -> Any:
        return {"image": {1: "height", 2: "width"}} | {x: {0: "objects"} for x in self.outputs}

    def to_onnx(self) -> Any:
        import onnx

        file = io.BytesIO()
        export_traced(
            self.model,
            self.example(*self.sizes[0]),
            file,
            dynamic_axes=self.dynamic_shapes(),
            input_names=self.inputs,
            output_names=self.outputs,
        )
        made = onnx.load_model_from_string(file.getvalue())
        for inside in made.graph.output[len(self.outputs) :]:
            inside.type.tensor_type.ClearField("shape")  # it would only fit the example
        return made

    @torch.no_grad()
    def compare(self, inputs: tuple[Tensor, ...], answers: list[Tensor]) -> tuple[float, float]:
        objects = self.detector([*inputs])[0]
        expected = [objects[name] for name in self.outputs]
        found, insides = answers[: len(self.outputs)], answers[len(self.outputs) :]
        count = len(found[0])
        for answer, tensor in zip(found, expected, strict=True):
            if answer.shape != (count, *tensor.shape[1:]) or not answer.isfinite().all():
                return math.inf, 0.0
        self._count_others(found, expected)
        exact = deepcopy(self.detector).double()
        pairs = [
            _difference(*of_one)
            for of_one in zip(
                insides,
                _heads(self.detector, inputs[0], insides),
                _heads(exact, inputs[0].double(), insides),
                strict=True,
            )
        ]
        return next((pair for pair in pairs if not pair[0] <= pair[1]), max(pairs))

    def _count_others(self, found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
        """Count torch's objects, and those of them that the other runtime does not have."""
        boxes, labels, scores, *_ = expected
        self.compared += len(boxes)
        same = (
            (box_iou(boxes, found[0]) > 0.9)
            & (labels[:, None] == found[1])
            & ((scores[:, None] - found[2]).abs() < 0.01)
        )  # [K, K']
        self.others += int((~same.any(1)).sum())
        counted = f"{self.others} of {self.compared} objects in noise"
        self.unit = f"of the largest output of a head and in {counted}"


class _WithInsides(nn.Module):
    """A detector of torchvision for one image. Returns its results as a tuple, followed by what
    :func:`_heads` gives for the boxes that the detector itself chooses."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        seen: list[Tensor] = []
        dense, parts = _parts(self.model)
        hooks = [
            head.register_forward_hook(lambda _, given, made: seen.extend(tree_leaves(made)))
            for head in (dense, *(predictor for *_, predictor in parts))
        ]
        hooks += [
            pool.register_forward_hook(lambda _, given, made: seen.append(given[1][0]))
            for pool, *_ in parts
        ]
        try:
            found = self.model([image])[0]
        finally:
            for hook in hooks:
                hook.remove()
        return (*(found[name] for name in self.names), *seen)


def _parts(detector: Any) -> tuple[nn.Module, list[tuple[nn.Module, ...]]]:
    """The head that looks at all places; and pool, head and predictor of each one for boxes."""
    if not hasattr(detector, "roi_heads"):
        return detector.head, []
    boxes = detector.roi_heads
    kinds = ("box", "mask") if boxes.has_mask() else ("box",)
    names = ("roi_pool", "head", "predictor")
    return detector.rpn.head, [tuple(getattr(boxes, f"{k}_{n}") for n in names) for k in kinds]


def _heads(detector: Any, image: Tensor, insides: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of all heads for an image [3, H, W]; before those of a head that looks into
    boxes, the boxes.

    Args:
        insides: the same from another runtime; the boxes are taken from it.
    """
    dense, parts = _parts(detector)
    images, _ = detector.transform([image])
    features = detector.backbone(images.tensors)
    made = tree_leaves(dense([*features.values()]))
    for pool, head, predictor in parts:
        boxes = insides[len(made)].to(image.dtype)
        made += [boxes, *tree_leaves(predictor(head(pool(features, [boxes], images.image_sizes))))]
    return made


def load_network(folder: Path) -> Network:
    """The model of a training's output folder.

    Raises:
        UserError: if the training cannot be used.
    """
    card = read_card(folder)
    if card["task"] in LANGUAGE:
        return Texts(folder, card)
    return Objects(folder, card) if card["task"] == "detect" else Images(folder, card)
