"""The message about a training whose numbers have become infinite or NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_hook

from ...errors import first_line
from .task import TrainingError


def diverged(what: str, step: int) -> TrainingError:
    """The error that ends such a training; ``what`` says what is wrong with the loss."""
    return TrainingError(
        f"the loss {what} by step {step}; try a lower --lr, more --warmup or another --precision"
    )


def require_finite(losses: dict[str, Tensor], model: nn.Module, step: int) -> None:
    """Check losses, scalars on any device, and this process's part of the weights.

    Raises:
        TrainingError: if one of them is not finite.
    """
    for name, value in losses.items():
        if not value.isfinite():
            raise diverged(f"{name} is {value.item()}", step)
    names, weights = zip(*model.named_parameters(), strict=True)
    finite = [(w.to_local() if isinstance(w, DTensor) else w).isfinite().all() for w in weights]
    if not torch.stack(finite).all():  # waits for the device only once
        raise diverged(f"is lost: the weights {names[finite.index(False)]} are not finite", step)


@contextmanager
def explained(
    losses: dict[str, Tensor], model: nn.Module, step: int, again: Callable[[], object] | None
) -> Iterator[None]:
    """If a model fails because its numbers are not finite, raise that error instead of its own.

    Args:
        losses, model, step: as in :func:`require_finite`.
        again: repeats the call of the model, if that is possible, to look inside it: weights may be
            finite, but not what a layer got from the layer before.
    """
    try:
        yield
    except (TrainingError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        require_finite(losses, model, step)
        layer = None if again is None else _first_layer_not_finite(again)
        if layer is None:
            raise
        reason = f"is lost: the results of {layer} are not finite ({first_line(error)})"
        raise diverged(reason, step) from error


def _first_layer_not_finite(call: Callable[[], object]) -> str | None:
    found = []

    def look(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor) and not output.isfinite().all():
            found.append(type(module).__name__)

    hook = register_module_forward_hook(look)
    try:
        with suppress(Exception), torch.no_grad():  # it fails again
            call()
    finally:
        hook.remove()
    return found[0] if found else None
