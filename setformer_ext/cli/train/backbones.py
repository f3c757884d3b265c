"""What the trainings on images share: the options of a network and of its images, and weights to
start from."""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
from timm.layers import freeze_batch_norm_2d
from torch import nn

from ... import vision  # noqa: F401 (registers the models)
from .options import add_keys_and_values, add_option, fraction
from .task import TrainingError, blaming, listed

# Errors of timm, torchvision and others if the options of a model do not fit.
MODEL_ERRORS = (TypeError, ValueError, RuntimeError, AssertionError, AttributeError)


def add_network(
    parser: argparse._ActionsContainer,
    model: str = "backbone: a name",
    pretrained: str = "the backbone's weights to start from, of a classifier",
) -> None:
    """Declare ``--model``, ``--model-options``, ``--pretrained``, the weights to start from, and
    ``--freeze-batch-norm``."""
    add_option(parser, "--model", str, "setformer_tiny", f"{model} that timm knows")
    purpose = "for timm.create_model, such as drop_path_rate=0.1"
    add_keys_and_values(parser, "--model-options", purpose)
    add_option(parser, "--pretrained FILE", Path, help=pretrained)
    parser.add_argument(
        "--freeze-batch-norm",
        action="store_true",
        help="keep the backbone's batch norms as --pretrained has them: for fine-tuning on so few "
        "images a batch that their own statistics are poor",
    )


def add_flip(parser: argparse._ActionsContainer) -> None:
    """Declare ``--flip``."""
    add_option(parser, "--flip PROBABILITY", fraction, 0.5, "of mirroring left and right")


def require_network(options: argparse.Namespace) -> None:
    """Refuse an unknown network or missing weights, before the data are read.

    Raises:
        TrainingError: for a name that timm does not know, if the file of weights does not exist, or
            if norms shall be frozen that no file has.
    """
    path = options.pretrained
    if path is not None and not path.is_file():
        raise TrainingError(f"--pretrained: cannot read weights from {path}: there is no such file")
    if options.freeze_batch_norm and path is None:
        raise TrainingError(
            "--freeze-batch-norm: expected with --pretrained, whose statistics it keeps; "
            "add that, or leave this out"
        )
    if not timm.is_model(options.model):
        pattern = f"*{options.model}*"
        close = [*timm.list_models(f"setformer{pattern}"), *timm.list_models(pattern)][:5]
        hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() has them"
        raise TrainingError(f"--model: timm knows no {options.model!r}; {hint}")


def require_backbone(options: argparse.Namespace) -> None:
    """Refuse what :func:`require_network` refuses, and a ``--scale-jitter`` without any factor.

    Raises:
        TrainingError: as there, or if the lower bound is above the upper one.
    """
    require_network(options)
    if options.scale_jitter and options.scale_jitter[0] > options.scale_jitter[1]:
        low, high = options.scale_jitter
        raise TrainingError(f"--scale-jitter: expected LOW <= HIGH, got {low} {high}")


def load_backbone(body: nn.Module, options: argparse.Namespace) -> None:
    """Load the backbone's part of a classifier's weights, if weights are given, and freeze its
    norms, if that is asked for.

    Raises:
        TrainingError: if the file cannot be read or is of another model.
    """
    if options.pretrained is None:
        return
    whole = timm.create_model(options.model, **dict(options.model_options))
    load_pretrained(whole, options.pretrained)
    state = whole.state_dict()
    body.load_state_dict({name: state[name] for name in body.state_dict()})
    freeze_norms(body, options)


def freeze_norms(model: nn.Module, options: argparse.Namespace) -> None:
    """With ``--freeze-batch-norm`` make batch norms constants, in training too."""
    if options.freeze_batch_norm:
        freeze_batch_norm_2d(model)


def load_pretrained(model: nn.Module, path: Path) -> None:
    """Load weights, except those of a classifier for another number of classes. Frozen batch norms
    were saved without their numbers of batches.

    Raises:
        TrainingError: if the file cannot be read or is of another model.
    """
    with blaming(f"--pretrained: cannot read weights from {path}", Exception):
        state = timm.models.load_state_dict(str(path))  # each format has errors of its own
    own = model.state_dict()
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    names = (classifier,) if isinstance(classifier, str) else classifier
    heads = [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]
    if any(name in state and state[name].shape != own[name].shape for name in heads):
        state = {name: tensor for name, tensor in state.items() if name not in heads}
    spare = {*heads, *(name for name in own if name.endswith(".num_batches_tracked"))}
    wrong = [name for name in own if name not in state and name not in spare]
    wrong += [name for name in state if name not in own or state[name].shape != own[name].shape]
    if wrong:
        raise TrainingError(
            f"--pretrained: {path} holds weights of another model: "
            f"missing, unknown or of another shape are {listed(wrong, separator=', ')}"
        )
    model.load_state_dict(state, strict=False)
