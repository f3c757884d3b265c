"""Models of transformers whose attention has references: SeTformer, or switched to SeT."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    PreTrainedModel,
    ViTImageProcessor,
)
from transformers.utils import logging

from ... import language
from ...errors import UserError, first_line
from ...language.references import References
from ...language.saved import SavedError, load_saved
from ...language.switch import NAME
from ...modules import SetAttention
from .plans import Layer, choose_block, first_calls, normalised, plans_of

if TYPE_CHECKING:
    from PIL import Image


def load_encoder(folder: Path) -> PreTrainedModel:
    """A saved model without its head, in eval mode; with SeT attention if it was saved with that.

    Raises:
        UserError: if there is none, or its references were not saved with it.
    """
    logging.set_verbosity_error()  # no warnings about the head that is left out
    logging.disable_progress_bar()
    language.register()
    try:
        config = load_saved(AutoConfig.from_pretrained, folder)
        switched = {"attn_implementation": NAME} if hasattr(config, NAME) else {}
        load = AutoModel.from_pretrained
        model, found = load_saved(load, folder, output_loading_info=True, **switched)
    except SavedError as error:
        raise UserError(
            "RUN: expected the --output of setformer train mlm or glue, or a folder that "
            f"save_pretrained wrote: {error}"
        ) from error
    missing = sorted(key for key in found["missing_keys"] if f".{NAME}." in key)
    if missing:
        raise UserError(f"{folder}: its weights lack references, such as {missing[0]}")
    return model.eval()


def find_layer(
    model: PreTrainedModel, layer: int, folder: Path
) -> tuple[SetAttention | References, str]:
    """The attention of a layer (from 1, or -1 for the last), and the layer's name.

    Raises:
        UserError: if there is no such layer, or none has references.
    """
    attentions = [m for m in model.modules() if isinstance(m, SetAttention | References)]
    if not attentions:
        raise UserError(
            f"{folder}: only SeT attention has references to explain, and this "
            f"{type(model).__name__} has none; train one with attention='set', or a model of "
            f"transformers with attn_implementation={NAME!r}"
        )
    index = choose_block("--layer", layer, len(attentions))
    return attentions[index], f"layer {index + 1} of {len(attentions)}"


def require_input(model: PreTrainedModel, name: str, other: str) -> None:
    """Raises UserError for a model whose main input has another name."""
    if model.main_input_name != name:
        raise UserError(
            f"{type(model).__name__} reads {model.main_input_name}, not {name}; expected {other}"
        )


def observe_image(folder: Path, layer: int, image: Image.Image) -> tuple[Layer, str]:
    """What a layer of a vision encoder does with the patches of an image, and the layer's name.

    Raises:
        UserError: if there is no such encoder or layer, or it does not split images into patches.
    """
    model = load_encoder(folder)
    require_input(model, "pixel_values", "a --text")
    attention, name = find_layer(model, layer, folder)
    try:
        pixels, seen = _prepare(folder, model.config, image)
        (call,) = first_calls([attention], lambda: model(pixel_values=pixels))
    except (ValueError, RuntimeError) as error:  # such as another number of pixels or channels
        raise UserError(f"{folder}: {first_line(error)}") from error
    plans = plans_of(attention, call)
    sides = _pair(getattr(model.config, "patch_size", max(seen.shape)))
    grid = (seen.shape[1] // sides[0], seen.shape[2] // sides[1])
    patches = grid[0] * grid[1]
    if not 0 < patches <= plans.shape[1]:
        raise UserError(
            f"{folder}: expected a model with a token for each patch of an image, got "
            f"{plans.shape[1]} tokens for {patches} patches"
        )
    # Tokens without a place, such as [CLS], come first.
    plans = normalised(plans[:, plans.shape[1] - patches :])
    covered = (grid[0] * sides[0], grid[1] * sides[1])
    return Layer(plans, grid, seen, covered), name


def _prepare(folder: Path, config: Any, image: Image.Image) -> tuple[Tensor, Tensor]:
    """The model's input [1, channels, height, width], and that image in [0, 1]."""
    try:
        processor = AutoImageProcessor.from_pretrained(folder)
    except OSError:  # the model was saved without it
        height, width = _pair(getattr(config, "image_size", 224))
        processor = ViTImageProcessor(size={"height": height, "width": width})
        print(
            f"setformer explain: {folder} has no preprocessor_config.json: the image is made "
            f"{height} x {width}, of mean {processor.image_mean} and std {processor.image_std}; "
            "where the training did otherwise, save its image processor there",
            file=sys.stderr,
        )
    pixels = processor(images=image, return_tensors="pt")["pixel_values"]
    seen = pixels[0]
    if processor.do_normalize:
        mean, std = (
            torch.tensor(x).view(-1, 1, 1) for x in (processor.image_mean, processor.image_std)
        )
        seen = seen * std + mean
    return pixels, seen.clamp(0, 1).expand(3, -1, -1)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width; configurations may give one number for both."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width
