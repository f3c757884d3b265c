"""transformers' Trainer, and the parameters that should not decay."""

from __future__ import annotations

import functools

from torch import nn
from transformers import Trainer

from ..weight_decay import undecayed


def respect_no_weight_decay() -> None:
    """Have every Trainer leave out of weight decay what modules exempt by ``no_weight_decay()``.

    By itself it goes by names and types of layers, and has no hook for anything else.
    """
    known = Trainer.get_decay_parameter_names

    @functools.wraps(known)
    def without_exempt(self: Trainer, model: nn.Module) -> list[str]:
        exempt = undecayed(model)
        left_out = {name for name, parameter in model.named_parameters() if id(parameter) in exempt}
        return [name for name in known(self, model) if name not in left_out]

    Trainer.get_decay_parameter_names = without_exempt  # type: ignore[method-assign]
