"""torchvision's detectors on the feature maps of any backbone that timm knows."""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import timm
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

STRIDES = [4, 8, 16, 32]
ANCHOR_SIZES = (32, 64, 128, 256, 512)  # pixels, one for each level of the pyramid
ASPECT_RATIOS = (0.5, 1.0, 2.0)


class Pyramid(nn.Module):
    """A backbone's stages, each normed, with a feature pyramid on top.

    Stages of pre-norm blocks end in sums without a norm: their scales differ between stages and
    grow with depth. So each stage gets a norm before the pyramid.

    Args:
        body: timm's model with ``features_only``, or any module with its ``feature_info``.
        extra_blocks: makes the levels above the last stage.
        out_channels: width of all levels.
        first: the first stage that the pyramid takes.
        norm_layer: makes a norm after each of the pyramid's convolutions; by default there is none.

    Shape:
        images [B, 3, H, W] to a dictionary of levels, [B, out_channels, H / stride, W / stride]
        each, sizes rounded up.
    """

    def __init__(
        self,
        body: Any,
        extra_blocks: nn.Module,
        out_channels: int,
        first: int = 0,
        norm_layer: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        channels = body.feature_info.channels()[first:]
        self.body, self.first, self.out_channels = body, first, out_channels
        self.norms = nn.ModuleList(LayerNorm2d(width) for width in channels)
        self.fpn = FeaturePyramidNetwork(channels, out_channels, extra_blocks, norm_layer)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        stages = self.body(x)[self.first :]
        normed = (norm(stage) for norm, stage in zip(self.norms, stages, strict=True))
        return self.fpn(OrderedDict((str(i), level) for i, level in enumerate(normed)))


def make_body(backbone: str | nn.Module, **options: Any) -> nn.Module:
    """The last four feature maps of a model of timm, at strides 4, 8, 16 and 32.

    Args:
        backbone: a name that timm knows, or a module that is returned as it is.
        options: for ``timm.create_model``.

    Raises:
        ValueError: if its feature maps are at other strides.
    """
    body: Any = backbone
    if isinstance(backbone, str):
        # The getter keeps the model whole, with its layers' names and depths; its final norm and
        # classifier are cut off.
        options = {"feature_cls": "getter", "out_indices": (-4, -3, -2, -1), **options}
        body = timm.create_model(backbone, features_only=True, **options)
    strides = body.feature_info.reduction()
    if strides != STRIDES:
        raise ValueError(f"backbone: expected feature maps at strides {STRIDES}, got {strides}")
    return body


def mask_rcnn(
    backbone: str | nn.Module,
    num_classes: int,
    *,
    anchor_sizes: Sequence[int] = ANCHOR_SIZES,
    pyramid_channels: int = 256,
    group_norm: bool = False,
    backbone_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> MaskRCNN:
    """Mask R-CNN: boxes, classes and masks; the heads are those of the paper.

    Args:
        backbone: name of a model of timm, or a module with ``feature_info``, as ``features_only``
            gives it; four feature maps at strides 4, 8, 16 and 32.
        num_classes: without background; labels are 1 ... num_classes.
        anchor_sizes: side of the square anchors in pixels of the resized image, for strides 4, 8,
            16, 32 and 64; each comes with aspect ratios 0.5, 1 and 2.
        pyramid_channels: width of the pyramid's levels, and so of the heads' convolutions.
        group_norm: norm the convolutions of pyramid and heads in groups of channels, and give the
            box head four convolutions: for training from scratch, without a pretrained backbone (He
            et al., Rethinking ImageNet Pre-training, 2019).
        backbone_options: for ``timm.create_model``.
        options: of torchvision's MaskRCNN, such as min_size, max_size, box_detections_per_img;
            image_mean and image_std are by default the backbone's.

    The model takes a list of images [3, H, W] in [0, 1], of any sizes, and in training a list of
    targets: boxes [N, 4] (x0, y0, x1, y1), labels [N] int64, masks [N, H, W] uint8. It returns
    losses by name, or in eval mode for each image boxes [K, 4], labels [K], scores [K] and masks
    [K, 1, H, W] in [0, 1]. Images of one call are padded to one size, and a backbone that looks
    over the whole image sees the padding: for answers that do not depend on the other images,
    call it with images of one size, or one by one.

    Raises:
        TypeError: for an option that torchvision does not have.
        ValueError: for feature maps at other strides, or another number of anchor sizes.
    """
    body = make_body(backbone, **(backbone_options or {}))
    if group_norm:
        head = MaskRCNNHeads(pyramid_channels, [256] * 4, dilation=1, norm_layer=_group_norm)
        options = {"mask_head": head, **options}
    return _rcnn(MaskRCNN, body, num_classes, anchor_sizes, pyramid_channels, group_norm, options)


def faster_rcnn(
    backbone: str | nn.Module,
    num_classes: int,
    *,
    anchor_sizes: Sequence[int] = ANCHOR_SIZES,
    pyramid_channels: int = 256,
    group_norm: bool = False,
    backbone_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> FasterRCNN:
    """Faster R-CNN: :func:`mask_rcnn` without masks."""
    body = make_body(backbone, **(backbone_options or {}))
    return _rcnn(FasterRCNN, body, num_classes, anchor_sizes, pyramid_channels, group_norm, options)


def retinanet(
    backbone: str | nn.Module,
    num_classes: int,
    *,
    anchor_sizes: Sequence[int] = ANCHOR_SIZES,
    pyramid_channels: int = 256,
    group_norm: bool = False,
    backbone_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> RetinaNet:
    """RetinaNet: boxes in one pass, from strides 8 to 128; else like :func:`faster_rcnn`.

    The anchors of a level have the size given for it, times 1, 2^(1/3) and 2^(2/3).
    """
    _require_known(RetinaNet, options)
    anchors = _anchors(anchor_sizes, per_octave=3)
    body = make_body(backbone, **(backbone_options or {}))
    top = LastLevelP6P7(pyramid_channels, pyramid_channels)
    norm_layer = _group_norm if group_norm else None
    model = RetinaNet(
        Pyramid(body, top, pyramid_channels, 1, norm_layer),
        num_classes + 1,  # labels start at 1 in all these detectors; class 0 stays empty
        anchor_generator=anchors,
        **{**_normalisation(body), **options},
    )
    model.transform = _resizing(model.transform)
    if group_norm:
        count = model.anchor_generator.num_anchors_per_location()[0]
        model.head = RetinaNetHead(pyramid_channels, count, num_classes + 1, _group_norm)
    model.head.classification_head.register_forward_hook(_without_background)
    model.head.register_forward_hook(_to_float32)
    return model


DETECTORS: dict[str, Callable[..., nn.Module]] = {
    "mask_rcnn": mask_rcnn,
    "faster_rcnn": faster_rcnn,
    "retinanet": retinanet,
}


def from_card(card: Mapping[str, Any]) -> nn.Module:
    """The detector that a card of ``setformer train detect`` describes, without its weights.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: if no model can be made of the card.
    """
    return DETECTORS[card["detector"]](
        card["model"],
        len(card["classes"]),
        backbone_options=card["model_options"],
        **card["detector_options"],
    )


def _rcnn(
    kind: type[Any],
    body: nn.Module,
    num_classes: int,
    anchor_sizes: Sequence[int],
    pyramid_channels: int,
    group_norm: bool,
    options: Mapping[str, Any],
) -> Any:
    _require_known(kind, options)
    norm_layer = _group_norm if group_norm else None
    if group_norm:
        # As in torchvision's second version, but with another norm, and as wide as the pyramid.
        width = pyramid_channels
        head = FastRCNNConvFCHead((width, 7, 7), [width] * 4, [1024], norm_layer)
        options = {"box_head": head, **options}
    model = kind(
        Pyramid(body, LastLevelMaxPool(), pyramid_channels, norm_layer=norm_layer),
        num_classes + 1,
        rpn_anchor_generator=_anchors(anchor_sizes),
        **{**_normalisation(body), **options},
    )
    model.transform = _resizing(model.transform)
    for head in (model.rpn.head, model.roi_heads.box_predictor, model.roi_heads.mask_predictor):
        if head is not None:
            head.register_forward_hook(_to_float32)
    return model


class Resizing(GeneralizedRCNNTransform):
    """torchvision's resizing, but no side shrinks to 0 pixels: a thin image is thickened first."""

    def resize(
        self, image: Tensor, target: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:  # image [3, H, W]
        size = image.shape[-2:]
        least = max(size) // self.max_size + 1  # pixels; resizing leaves at least one of them
        if min(size) < least:
            thicker = [max(side, least) for side in size]
            image = F.interpolate(image[None], thicker)[0]
            if target is not None:
                target["boxes"] = resize_boxes(target["boxes"], size, thicker)
            if target is not None and "masks" in target:
                target["masks"] = F.interpolate(target["masks"][:, None], thicker)[:, 0]
        return super().resize(image, target)


def _resizing(known: Any) -> Resizing:
    return Resizing(known.min_size, known.max_size, known.image_mean, known.image_std)


def _group_norm(channels: int) -> nn.GroupNorm:
    """A norm of groups of 8 channels, as in 32 groups of 256 channels."""
    return nn.GroupNorm(channels // math.gcd(channels, 8), channels)


def _require_known(kind: type[Any], options: Mapping[str, Any]) -> None:
    """Refuse unknown options: torchvision's constructors ignore keywords that they do not know."""
    for name in options.keys() - inspect.signature(kind).parameters.keys():
        raise TypeError(f"{kind.__name__}: unexpected keyword argument {name!r}")


def _anchors(anchor_sizes: Sequence[int], per_octave: int = 1) -> AnchorGenerator:
    """Anchors of ``per_octave`` sizes for each level, from its own to less than twice its own."""
    if len(anchor_sizes) != 5:
        raise ValueError(
            f"anchor_sizes: expected five, one for each level of the pyramid, got {anchor_sizes}"
        )
    factors = [2 ** (i / per_octave) for i in range(per_octave)]
    sizes = [[round(size * factor) for factor in factors] for size in anchor_sizes]
    return AnchorGenerator(sizes, [ASPECT_RATIOS] * 5)


def _normalisation(body: nn.Module) -> dict[str, Any]:
    """The mean and deviation of images in the backbone's pretrained configuration."""
    config = getattr(getattr(body, "model", body), "pretrained_cfg", {})
    return {f"image_{key}": config[key] for key in ("mean", "std") if key in config}


def _without_background(module: nn.Module, inputs: Any, logits: Tensor) -> Tensor:
    """A forward hook: no object gets class 0, even if a model has not learned that yet."""
    if not module.training:
        logits = logits.clone()
        logits[..., 0] = -math.inf
    return logits


def _to_float32(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    """A forward hook: torchvision keeps boxes in the type of these outputs, and with the 8 bits of
    bfloat16 those at the far side of an image would be off by 4 pixels."""
    return tree_map(lambda output: output.float(), outputs)
