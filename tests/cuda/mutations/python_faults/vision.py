"""Faults in the vision models."""

from __future__ import annotations

from ..seeding import Seeded as Fault

VISION = (
    Fault(
        "stochastic depth does not scale what it keeps",
        "vision/blocks.py",
        "DropPath(drop_path)",
        "DropPath(drop_path, scale_by_keep=False)",
    ),
    Fault(
        "defaults win over the options of the backbone's attention",
        "vision/backbone.py",
        "ATTENTION_OPTIONS | (attention_options or {})",
        "(attention_options or {}) | ATTENTION_OPTIONS",
    ),
    Fault(
        "windows leave out the end of an image",
        "vision/segmentation.py",
        "steps = -(-max(length - window, 0) // max(1, 2 * window // 3))",
        "steps = max(length - window, 0) // max(1, 2 * window // 3)",
    ),
    Fault(
        "images to segment are shrunk without antialiasing",
        "vision/segmentation.py",
        'F.interpolate(x, target, mode="bilinear", antialias=True)',
        'F.interpolate(x, target, mode="bilinear")',
    ),
    Fault(
        "boxes in bfloat16 under autocast",
        "vision/detection.py",
        "(model.rpn.head, model.roi_heads.box_predictor, model.roi_heads.mask_predictor)",
        "(model.rpn.head, model.roi_heads.mask_predictor)",
    ),
    Fault(
        "feature lists lack the coarsest stage",
        "vision/models.py",
        '"out_indices": (0, 1, 2, 3)',
        '"out_indices": (0, 1, 2)',
    ),
)
