"""The learning rate and weight decay of each parameter."""

from __future__ import annotations

import argparse
import logging
from collections import defaultdict
from typing import Any

import torch
from timm.optim import param_groups_layer_decay
from timm.scheduler import CosineLRScheduler
from torch import nn

from ...weight_decay import undecayed
from .task import TrainingError


def make_optimizer(model: nn.Module, options: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW with ``--lr``, ``--weight-decay`` and ``--layer-decay``."""
    groups = parameter_groups(model, options.weight_decay, options.layer_decay)
    return torch.optim.AdamW(groups, lr=options.lr, weight_decay=options.weight_decay)


def make_schedule(
    optimizer: torch.optim.Optimizer, options: argparse.Namespace, steps: int
) -> CosineLRScheduler:
    """Half a cosine down to 0 over all steps, after a linear rise over ``--warmup`` of them."""
    # For a training of one step timm warns that the schedule has no effect.
    logging.getLogger("timm.scheduler.cosine_lr").setLevel(logging.ERROR)
    return CosineLRScheduler(
        optimizer,
        t_initial=steps,
        warmup_t=int(options.warmup * steps),
        warmup_lr_init=options.lr / max(1, int(options.warmup * steps)),
        t_in_epochs=False,
    )


def parameter_groups(
    model: nn.Module, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """Groups for an optimizer; one-dimensional and exempted parameters do not decay.

    With a layer decay below 1, ``lr_scale`` falls from the backbone's last layer to its first. The
    backbone is the outermost module with timm's ``group_matcher``: the whole of a classifier, or a
    part of a detector, whose other parts learn at the full rate.

    Raises:
        TrainingError: for a layer decay if there is no such module.
    """
    scales: dict[int, float] = {}  # by the id of a parameter
    if layer_decay < 1:
        backbone = next((m for m in model.modules() if hasattr(m, "group_matcher")), None)
        if backbone is None:
            raise TrainingError(
                f"--layer-decay: {type(model).__name__} does not say what its layers are "
                "(timm's group_matcher); leave the option out"
            )
        for layer in param_groups_layer_decay(backbone, layer_decay=layer_decay):
            scales |= {id(p): layer["lr_scale"] for p in layer["params"]}
    exempt = undecayed(model)
    groups: dict[tuple[bool, float], list[nn.Parameter]] = defaultdict(list)
    for name, p in model.named_parameters():
        if p.requires_grad:
            decays = p.ndim > 1 and not name.endswith(".bias") and id(p) not in exempt
            groups[decays, scales.get(id(p), 1.0)].append(p)
    return [
        {"params": parameters, "weight_decay": weight_decay * decays, "lr_scale": scale}
        for (decays, scale), parameters in groups.items()
    ]
