"""Weights to start from."""

from __future__ import annotations

from pathlib import Path

import timm
from torch import nn

from ...errors import first_line
from .task import TrainingError


def require_weights(path: Path | None) -> None:
    """Refuse what is no file before the data are read, which may take long.

    Raises:
        TrainingError: if there is no such file.
    """
    if path is not None and not path.is_file():
        raise TrainingError(f"--pretrained: cannot read weights from {path}: there is no such file")


def load_pretrained(model: nn.Module, path: Path) -> None:
    """Load weights, but for a classifier of another number of classes.

    Raises:
        TrainingError: if the file cannot be read or is of another model.
    """
    try:
        state = timm.models.load_state_dict(str(path))
    except Exception as error:  # each format has errors of its own
        reason = first_line(error)
        raise TrainingError(f"--pretrained: cannot read weights from {path}: {reason}") from error
    own = model.state_dict()
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    names = (classifier,) if isinstance(classifier, str) else classifier
    heads = [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]
    if any(name in state and state[name].shape != own[name].shape for name in heads):
        state = {name: tensor for name, tensor in state.items() if name not in heads}
    wrong = [name for name in own if name not in state and name not in heads]
    wrong += [name for name in state if name not in own or state[name].shape != own[name].shape]
    if wrong:
        listed = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise TrainingError(
            f"--pretrained: {path} holds weights of another model: "
            f"missing, unknown or of another shape are {listed}"
        )
    model.load_state_dict(state, strict=False)
