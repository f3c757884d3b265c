"""Parameters and multiply-adds of the backbone, alone and below the usual detector and segmenter.

    python benchmarks/vision/model_sizes.py

prints a table in Markdown, with what the paper's abstract says of setformer_base beside it: with
Mask R-CNN 38% fewer parameters and 29% fewer FLOPs than FocalNet-B (111.4 M, 507 G at 1280 x 800),
with UPerNet 33% fewer parameters than NAT-Base (123 M). The exit status is 1 if one is off by more
than 5%.

Multiply-adds are half of what torch's FlopCounterMode counts: products of matrices, convolutions
and SeT attention. Nothing is computed: all tensors are on the meta device. Mask R-CNN is counted as
in detection papers, where 1000 proposals go through the box head and 100 through the mask head, for
80 classes; UPerNet has the layout of mmsegmentation, for 150 classes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import TimmBackboneConfig, UperNetConfig, UperNetForSemanticSegmentation

from setformer_ext.vision.detection import mask_rcnn
from setformer_ext.vision.models import SIZES

TOLERANCE = 5  # per cent


@dataclass
class Figure:
    """A counted number, in millions (parameters) or billions (multiply-adds), and its target."""

    model: str
    unit: str
    counted: float
    target: float | None = None

    @property
    def deviation(self) -> float | None:
        """In per cent of the target."""
        return None if self.target is None else 100 * (self.counted / self.target - 1)

    def row(self) -> str:
        if self.target is None or self.deviation is None:
            return f"| {self.model} | {self.counted:.1f} {self.unit} | | |"
        return (
            f"| {self.model} | {self.counted:.1f} {self.unit} | {self.target:.1f} "
            f"| {self.deviation:+.1f}% |"
        )


def count() -> list[Figure]:
    """All figures."""
    with torch.device("meta"), torch.no_grad():
        figures = [figure for name in SIZES for figure in _classifier(name)]
        return [*figures, *_mask_rcnn(), _upernet()]


def _classifier(name: str) -> list[Figure]:
    model = timm.create_model(name).eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224))
    return [_parameters(name, model), _multiply_adds(f"{name}, 224 x 224", counter)]


def _mask_rcnn() -> list[Figure]:
    """Part by part: which boxes there are depends on the images' content, so not on this device."""
    model = mask_rcnn("setformer_base", num_classes=80).eval()
    heads = model.roi_heads
    with FlopCounterMode(display=False) as counter:
        levels = model.backbone(torch.empty(1, 3, 800, 1280))
        model.rpn.head(list(levels.values()))
        heads.box_predictor(heads.box_head(torch.empty(1000, 256, 7, 7)))
        heads.mask_predictor(heads.mask_head(torch.empty(100, 256, 14, 14)))
    name = "Mask R-CNN on setformer_base"
    return [
        _parameters(name, model, 111.4 * (1 - 0.38)),
        _multiply_adds(f"{name}, 1280 x 800", counter, 507 * (1 - 0.29)),
    ]


def _upernet() -> Figure:
    backbone: dict[str, Any] = {
        "backbone": "setformer_base",
        "use_pretrained_backbone": False,
        "out_indices": (0, 1, 2, 3),
    }
    layout: dict[str, Any] = {
        "num_labels": 150,
        "hidden_size": 512,
        "pool_scales": [1, 2, 3, 6],
        "auxiliary_in_channels": SIZES["setformer_base"]["dims"][2],
        "auxiliary_channels": 256,
        "auxiliary_num_convs": 1,
        "auxiliary_concat_input": False,
    }
    config = UperNetConfig(backbone_config=TimmBackboneConfig(**backbone), **layout)
    model = UperNetForSemanticSegmentation(config)
    return _parameters("UPerNet on setformer_base", model, 123 * (1 - 0.33))


def _parameters(name: str, model: nn.Module, target: float | None = None) -> Figure:
    return Figure(name, "M", sum(p.numel() for p in model.parameters()) / 1e6, target)


def _multiply_adds(name: str, counter: FlopCounterMode, target: float | None = None) -> Figure:
    return Figure(name, "G", counter.get_total_flops() / 2e9, target)


def main() -> int:
    figures = count()
    print("| model | parameters (M), multiply-adds (G) | target | deviation |")
    print("| --- | --: | --: | --: |")
    for figure in figures:
        print(figure.row())
    wrong = [f.model for f in figures if abs(f.deviation or 0) > TOLERANCE]
    for name in wrong:
        print(f"{name}: off by more than {TOLERANCE}%", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
