"""Decoders of segmentation-models-pytorch on any backbone of timm, for images of any size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import segmentation_models_pytorch as smp
import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

DECODERS: dict[str, Callable[..., Any]] = {
    "upernet": smp.UPerNet,
    "fpn": smp.FPN,
    "unet": smp.Unet,
}
LONGEST = 16_384  # pixels of a side, up to which images are enlarged
STRIDE = 32  # of the last feature maps
GROUPS = 32  # groups of channels that are normed together; fewer if a group had only one channel


class Segmenter(nn.Module):
    """A backbone and a decoder that give every pixel a score for each class.

    Args:
        backbone: name of a model of timm that has ``forward_intermediates``.
        num_classes: classes of the pixels.
        decoder: "upernet", "fpn" or "unet".
        backbone_options: for ``timm.create_model``.
        decoder_options: for the model of segmentation-models-pytorch, such as
            ``decoder_channels``.

    Shape:
        [B, 3, H, W], any H and W >= 1, to logits [B, num_classes, H, W].

    Raises:
        ValueError: for an unknown decoder; what timm and segmentation-models-pytorch raise for
            names and options that they do not know.
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        decoder: str = "upernet",
        backbone_options: Mapping[str, Any] | None = None,
        decoder_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if decoder not in DECODERS:
            raise ValueError(f"decoder: expected one of {', '.join(DECODERS)}, got {decoder!r}")
        # The getter keeps the backbone whole, with its layers' names and depths.
        options = {"feature_cls": "getter", **(backbone_options or {}), **(decoder_options or {})}
        model = DECODERS[decoder](
            f"tu-{backbone}", encoder_weights=None, classes=num_classes, **options
        )
        self.encoder, self.decoder = model.encoder, model.decoder
        self.head = model.segmentation_head
        # Stages of pre-norm blocks end in sums without a norm; of the decoders only UPerNet norms
        # them.
        self.norms = nn.ModuleList(
            LayerNorm2d(channels) if channels and decoder != "upernet" else nn.Identity()
            for channels in self.encoder.out_channels[1:]
        )
        _norm_each_image_alone(self.decoder)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        # The decoders double the sizes of maps, so sizes must be multiples of the strides. Padded
        # with repeated borders: a constant would add an edge that the image does not have.
        x = F.pad(x, (0, -width % STRIDE, 0, -height % STRIDE), mode="replicate")
        image, *features = self.encoder(x)
        features = [norm(map_) for norm, map_ in zip(self.norms, features, strict=True)]
        return self.head(self.decoder([image, *features]))[..., :height, :width]

    @property
    def backbone(self) -> nn.Module:
        """timm's model, without its classifier."""
        return self.encoder.model.model


def from_card(card: Mapping[str, Any]) -> Segmenter:
    """The model that a card of ``setformer train segment`` describes, without its weights.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: if no model can be made of the card.
    """
    return Segmenter(
        card["model"],
        len(card["classes"]),
        card["decoder"],
        card["model_options"],
        card["decoder_options"],
    )


def enlargement(size: Sequence[int], short_side: int) -> float:
    """The factor that brings the shorter side to a length, 1 where that is 0.

    Limited so that the longer side stays within ``LONGEST``: an image of one line of pixels would
    else grow to gigabytes.
    """
    if not short_side:
        return 1.0
    return min(short_side / min(size), max(LONGEST, max(size)) / max(size))


def segment(
    model: nn.Module,
    image: Tensor,  # [3, H, W], normalised
    short_side: int = 0,
    window: int = 0,
) -> Tensor:  # [H, W] int64
    """The likeliest class of each pixel of an image, at the image's own size.

    Args:
        model: gives logits [B, classes, H, W], in eval mode.
        image: any H and W >= 1.
        short_side: length to which the image's shorter side is brought first; 0 for its own.
        window: side of the square windows, overlapping by a third or more, whose logits are
            averaged; 0 for the whole image at once.
    """
    size = image.shape[-2:]
    x = image.unsqueeze(0)
    factor = enlargement(size, short_side)
    if factor != 1:
        target = [max(1, round(side * factor)) for side in size]
        x = F.interpolate(x, target, mode="bilinear", antialias=True)
    logits = _over_windows(model, x, window) if window else model(x)
    logits = logits.float()
    if logits.shape[-2:] != size:
        logits = F.interpolate(logits, size, mode="bilinear")
    return logits[0].argmax(0)


def _over_windows(model: nn.Module, x: Tensor, window: int) -> Tensor:  # [1, 3, H, W]
    height, width = x.shape[-2:]
    total, count = torch.zeros(()), torch.zeros(1, 1, height, width, device=x.device)
    for top in _starts(height, window):
        for left in _starts(width, window):
            place = (..., slice(top, top + window), slice(left, left + window))
            logits = model(x[place]).float()
            if not total.ndim:
                total = logits.new_zeros(1, logits.shape[1], height, width)
            total[place] += logits
            count[place] += 1
    return total / count


def _starts(length: int, window: int) -> list[int]:
    """The starts of windows that cover the length and overlap by at least a third of a window."""
    steps = -(-max(length - window, 0) // max(1, 2 * window // 3))
    return [round(i * (length - window) / steps) for i in range(steps + 1)] if steps else [0]


def _norm_each_image_alone(module: nn.Module) -> None:
    """Put GroupNorm in place of BatchNorm, and of GroupNorm with a single channel in each group.

    Statistics over the few images that fit in memory are poor, do not exist for one image pooled to
    a single pixel, and depend on the number of processes.
    """
    for name, child in module.named_children():
        if isinstance(child, (nn.BatchNorm2d, nn.GroupNorm)):
            channels = len(child.weight)
            groups = math.gcd(2 * GROUPS, channels) // 2 or 1
            setattr(module, name, nn.GroupNorm(groups, channels))
        else:
            _norm_each_image_alone(child)
