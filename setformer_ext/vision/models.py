"""The sizes of the backbone, registered with timm."""

from __future__ import annotations

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from .backbone import Setformer

# Our reading. Base has, within 5%, the parameters and FLOPs that the paper's abstract gives for
# Mask R-CNN and UPerNet on it; small has about the parameters of Swin-T, tiny about half and mini
# about a quarter of them. Few wide blocks: on the same multiply-adds they take less time than many
# narrow ones. All but mini are wide from stride 16 on: before, an image has so many tokens that the
# hidden channels of an MLP do not fit in a cache, and norms, GELU and depthwise convolutions wait
# for memory.
SIZES: dict[str, dict[str, Any]] = {
    "setformer_mini": {"dims": (64, 128, 256, 512), "depths": (1, 1, 3, 1)},
    "setformer_tiny": {"dims": (64, 192, 448, 640), "depths": (1, 1, 3, 1)},
    "setformer_small": {"dims": (64, 192, 640, 768), "depths": (1, 1, 4, 1)},
    "setformer_base": {"dims": (128, 256, 896, 896), "depths": (1, 1, 4, 1)},
}


default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": {
            "url": "",  # no weights are published
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "stem.first.conv",
            "classifier": "head.fc",
            "license": "mit",
        }
        for name in SIZES
    }
)


def _create(name: str, pretrained: bool, **options: Any) -> Setformer:
    return build_model_with_cfg(
        Setformer,
        name,
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **{**SIZES[name], **options},
    )


@register_model
def setformer_mini(pretrained: bool = False, **options: Any) -> Setformer:
    """SeTformer-Mini: 7.1 million parameters, 1.0 billion multiply-adds at 224 x 224."""
    return _create("setformer_mini", pretrained, **options)


@register_model
def setformer_tiny(pretrained: bool = False, **options: Any) -> Setformer:
    """SeTformer-Tiny: 15.0 million parameters, 2.1 billion multiply-adds at 224 x 224."""
    return _create("setformer_tiny", pretrained, **options)


@register_model
def setformer_small(pretrained: bool = False, **options: Any) -> Setformer:
    """SeTformer-Small: 29.8 million parameters, 4.3 billion multiply-adds at 224 x 224."""
    return _create("setformer_small", pretrained, **options)


@register_model
def setformer_base(pretrained: bool = False, **options: Any) -> Setformer:
    """SeTformer-Base: 52.6 million parameters, 8.4 billion multiply-adds at 224 x 224."""
    return _create("setformer_base", pretrained, **options)
