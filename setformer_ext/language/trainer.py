"""transformers' Trainer, and the parameters that should not decay."""

from __future__ import annotations

import functools

from torch import nn
from transformers import Trainer

from ..weight_decay import undecayed


def respect_no_weight_decay() -> None:
    """Make every Trainer exempt from weight decay what modules name in ``no_weight_decay()``.

    By itself it decides by names and types of layers, and has no hook for more.
    """
    known = Trainer.get_decay_parameter_names

    @functools.wraps(known)
    def without_exempt(self: Trainer, model: nn.Module) -> list[str]:
        exempt = undecayed(model)
        left_out = {name for name, parameter in model.named_parameters() if id(parameter) in exempt}
        return [name for name in known(self, model) if name not in left_out]

    Trainer.get_decay_parameter_names = without_exempt  # type: ignore[method-assign]
