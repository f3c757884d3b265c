"""Loads the output of a training, to ask the model about images or texts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
from torch import Tensor, nn

from ...errors import UserError, first_line
from ..train.task import listed
from .predictors import PREDICTORS, Predictor

if TYPE_CHECKING:
    from .texts import TextPredictor

CARD = "card.json"
WEIGHTS = "model.safetensors"
LANGUAGE = ("mlm", "glue")
COMMON_KEYS = {"model": str, "model_options": dict, "classes": list}


def load_run(folder: Path) -> Predictor:
    """The model of a training's output folder, with its weights, in eval mode on the CPU.

    Raises:
        UserError: if there is no such training, it is not one on images, or its files are broken or
            do not belong together.
    """
    card = read_card(folder)
    if card["task"] in LANGUAGE:
        raise UserError(
            f"{folder}: a training of {card['task']}, expected one on images; this one takes --text"
        )
    with cards_explained(folder):
        for key, kind in COMMON_KEYS.items():
            if not isinstance(card[key], kind):
                raise TypeError(f"expected a {kind.__name__} under {key!r}, got {card[key]!r}")
        if not timm.is_model(card["model"]):  # timm would look for unknown names in its hub
            raise ValueError(f"timm knows no {card['model']!r}")
        predictor = PREDICTORS[card["task"]](card)
    load_weights(predictor.model, read_weights(folder / WEIGHTS), folder / WEIGHTS)
    predictor.model.eval()
    return predictor


def load_text_run(folder: Path) -> TextPredictor:
    """The same for a training on texts; the model is on a GPU if there is one.

    Raises:
        UserError: see :func:`load_run`.
    """
    card = read_card(folder)
    if card["task"] not in LANGUAGE:
        raise UserError(
            f"{folder}: a training of {card['task']}, expected one of {' or '.join(LANGUAGE)}; "
            "this one takes images"
        )
    from .texts import TEXT_PREDICTORS

    with cards_explained(folder):
        return TEXT_PREDICTORS[card["task"]](folder, card)


def read_card(folder: Path) -> dict[str, Any]:
    """The description of the model in a training's output folder.

    Raises:
        UserError: if there is no such training.
    """
    for name in (CARD, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder}: has no {name}; expected the --output folder of a `setformer train` "
                "that got as far as its first evaluation"
            )
    path = folder / CARD
    try:
        card = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not JSON ({first_line(error)})") from error
    if not isinstance(card, dict) or not isinstance(card.get("task"), str):
        raise UserError(f"{path}: expected an object with a str under 'task'")
    if card["task"] not in (*PREDICTORS, *LANGUAGE):
        known = ", ".join((*PREDICTORS, *LANGUAGE))
        raise UserError(f"{path}: task must be one of {known}, got {card['task']!r}")
    return card


@contextmanager
def cards_explained(folder: Path) -> Iterator[None]:
    """Turn errors that a wrong card causes into a UserError."""
    try:
        yield
    except KeyError as error:
        raise UserError(
            f"{folder / CARD}: lacks or does not know {error}; was it edited by hand, or written "
            "by an earlier version?"
        ) from error
    except (AssertionError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{folder / CARD}: no model can be made of it: {first_line(error)}"
        ) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a checkpoint in timm's forms (EMA's weights first).

    Raises:
        UserError: if there is no such file, or it is neither.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        return timm.models.load_state_dict(str(path))
    except Exception as error:  # torch and safetensors raise errors of any class
        raise UserError(f"{path}: not a file of weights ({first_line(error)})") from error


def load_weights(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Put weights into a model; all must fit, and none be missing. ``path`` is their file.

    Raises:
        UserError: if some are missing, too many, or of another shape.
    """
    expected = model.state_dict()
    problems = [f"lacks {name}" for name in expected if name not in weights]
    problems += [
        f"has {name}, which the model does not" for name in weights if name not in expected
    ]
    problems += [
        f"{name} is {list(weights[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if problems:
        raise UserError(f"{path}: these weights are of another model: {listed(problems)}")
    model.load_state_dict(weights)


def load_checkpoint(name: str, path: Path) -> Predictor:
    """A classifier from a file of weights alone; it reads images by timm's default for the name.

    Raises:
        UserError: if the name is not one of the backbone's sizes, or the weights do not fit it.
    """
    names = timm.list_models("setformer_*")
    if name not in names:
        raise UserError(f"--model must be one of {', '.join(names)}, got {name!r}")
    weights = read_weights(path)
    head = weights.get("head.fc.weight")
    num_classes = 0 if head is None else len(head)
    config = timm.get_pretrained_cfg(name).to_dict()
    card = {
        "model": name,
        "model_options": {"num_classes": num_classes},
        "classes": [f"class {i}" for i in range(num_classes)],
        **{key: config[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct")},
    }
    predictor = PREDICTORS["classify"](card)
    load_weights(predictor.model, weights, path)
    predictor.model.eval()
    return predictor
