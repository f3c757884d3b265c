"""transformers' Trainer, and the parameters that should not decay."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import nn
from transformers import Trainer

from ..weight_decay import undecayed


def respect_no_weight_decay() -> None:
    """Have every Trainer leave out of weight decay what modules exempt by ``no_weight_decay()``.

    By itself it goes by names and types of layers, and has no hook for anything else.
    """
    Trainer.get_decay_parameter_names = _without_exempt(Trainer.get_decay_parameter_names)  # type: ignore[method-assign, assignment]


def _without_exempt(
    get_decay_parameter_names: Callable[[Trainer, nn.Module], list[str]],
) -> Callable[[Trainer, nn.Module], list[str]]:
    @functools.wraps(get_decay_parameter_names)
    def wrapped(self: Trainer, model: nn.Module) -> list[str]:
        exempt = undecayed(model)
        left_out = {name for name, parameter in model.named_parameters() if id(parameter) in exempt}
        return [n for n in get_decay_parameter_names(self, model) if n not in left_out]

    return wrapped
