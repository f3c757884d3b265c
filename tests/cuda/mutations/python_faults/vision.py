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
    Fault(
        "no activation between the convolutions of the stem",
        "vision/blocks.py",
        "self.second(F.gelu(self.first(x.contiguous(memory_format=torch.channels_last))))",
        "self.second(self.first(x.contiguous(memory_format=torch.channels_last)))",
    ),
    Fault(
        "MLPs of the backbone with another activation",
        "vision/blocks.py",
        "F.gelu(self.conv_norm(self.conv(x)))",
        "F.relu(self.conv_norm(self.conv(x)))",
    ),
    Fault(
        "norms of the backbone with another epsilon",
        "vision/blocks.py",
        "self.attention_norm = nn.BatchNorm2d(dim)",
        "self.attention_norm = nn.BatchNorm2d(dim, 1e-3)",
    ),
    Fault(
        "dropout before the classifier is left out",
        "vision/backbone.py",
        "pool_type=global_pool, drop_rate=drop_rate",
        "pool_type=global_pool",
    ),
    Fault(
        "classifier pools by the mean whatever it is told",
        "vision/backbone.py",
        "pool_type=global_pool, drop_rate=drop_rate",
        "drop_rate=drop_rate",
    ),
    Fault(
        "recomputed blocks count a batch twice",
        "vision/blocks.py",
        "(nullcontext(), _statistics_kept(block))",
        "(nullcontext(), nullcontext())",
    ),
    Fault(
        "a model in training is fused",
        "vision/fusion.py",
        "if module.training]",
        "if False]",
    ),
    Fault(
        "one kind of norm is not fused",
        "vision/blocks.py",
        '{"expand": "expand_norm", "conv": "conv_norm"}',
        '{"expand": "expand_norm"}',
    ),
    Fault(
        "depthwise convolutions start as if each saw all channels",
        "vision/backbone.py",
        "fan_out = module.weight[0].numel() * module.out_channels / module.in_channels",
        "fan_out = 9 * module.out_channels",
    ),
    Fault(
        "images for the backbone are cut to another part",
        "vision/models.py",
        '"crop_pct": 0.9,',
        '"crop_pct": 0.875,',
    ),
    Fault(
        "images for the backbone are resized in another way",
        "vision/models.py",
        '"interpolation": "bicubic",',
        '"interpolation": "bilinear",',
    ),
    Fault(
        "stages are normed for one decoder only",
        "vision/segmentation.py",
        'if channels and decoder != "upernet" else',
        'if channels and decoder == "fpn" else',
    ),
    Fault(
        "logits are repeated instead of interpolated",
        "vision/segmentation.py",
        'logits = F.interpolate(logits, size, mode="bilinear")',
        "logits = F.interpolate(logits, size)",
    ),
    Fault(
        "no upright anchors",
        "vision/detection.py",
        "ASPECT_RATIOS = (0.5, 1.0, 2.0)",
        "ASPECT_RATIOS = (0.5, 1.0, 1.0)",
    ),
)
