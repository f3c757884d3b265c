"""One model in several processes, by DDP or FSDP2, and the model's complete state from either."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from .task import TrainingError

SHARD_PARAMETERS = 1_000_000  # gathered at once at least, so that a message is worth it
WHOLE = StateDictOptions(full_state_dict=True)  # for states that are not split among processes
T = TypeVar("T")
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)  # mostly without a forward of their own


def from_main_process(make: Callable[[], T]) -> T:
    """The result of ``make`` in the main process, or its TrainingError, given to all processes."""
    made: list[Any] = [None, None]
    if PartialState(cpu=not torch.cuda.is_available()).is_main_process:
        try:
            made[0] = make()
        except TrainingError as error:
            made[1] = error
    result, failure = broadcast_object_list(made)
    if failure is not None:
        raise failure
    return result


def replicate(model: nn.Module, device: torch.device) -> nn.Module:
    """The model in DDP."""
    # DDP warns about gradients of channels-last convolutions; copying those of 3 x 3 filters is
    # cheap.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def shard(model: nn.Module) -> None:
    """Split the parameters among all processes; they are gathered for a few blocks at a time
    (FSDP2).

    The smallest modules of at least SHARD_PARAMETERS are each gathered at once. All other
    parameters are gathered with the root, and so are those that several modules share, because all
    of these modules need them.
    """
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    _shard_inside(model, {parameter for parameter, count in owners.items() if count > 1})
    fully_shard(model)


def _shard_inside(module: nn.Module, common: set[int]) -> int:
    """Shard what is big enough among the descendants; returns the number of parameters left."""
    left = sum(p.numel() for p in module.parameters(recurse=False))
    for child in module.children():
        rest = _shard_inside(child, common)
        # FSDP2 gathers in forward, but timm's feature getters call another method of the backbone.
        called = not isinstance(child, CONTAINERS) and not hasattr(child, "forward_intermediates")
        apart = called and not any(id(p) in common for p in child.parameters())
        if rest >= SHARD_PARAMETERS and apart:
            fully_shard(child)
            rest = 0
        left += rest
    return left


def load_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Load what torch's ``get_optimizer_state_dict`` gave with :data:`WHOLE`."""
    options = StateDictOptions(full_state_dict=True, strict=False)  # some may have no gradient yet
    set_optimizer_state_dict(model, optimizer, state, options=options)
    for name, parameter in model.named_parameters():
        if name not in state["state"]:
            optimizer.state.pop(parameter, None)
