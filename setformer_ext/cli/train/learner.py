"""The weights of a training and the objects that change them, in one of its processes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3, distribute_bn
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)

from . import parallel
from .optimization import make_optimizer, make_schedule
from .sampling import INITIALISATION, seed_generators
from .task import Batch, Task, TrainingError


class Learner:
    """A model, its moving average and its optimizer.

    Args:
        task: makes the model and knows its losses.
        options: those of all trainings.
        accelerator: the processes, their device and precision.
        steps: of the whole training.
    """

    def __init__(
        self, task: Task, options: argparse.Namespace, accelerator: Accelerator, steps: int
    ) -> None:
        if options.shard and accelerator.num_processes == 1:
            raise TrainingError(
                "--shard: there is one process, expected several; "
                "start them by torchrun --nproc-per-node N -m setformer_ext train ..."
            )
        self.task, self.options, self.accelerator = task, options, accelerator
        seed_generators(options.seed, INITIALISATION)
        self.model = task.make_model()
        if options.gradient_checkpointing:
            _checkpoint_gradients(self.model)
        self.model.to(accelerator.device).train()
        self.ema = None
        if options.ema_decay:
            # Sharded weights cannot be averaged together with buffers, which are whole.
            self.ema = ModelEmaV3(
                self.model, decay=options.ema_decay, use_warmup=True, foreach=not options.shard
            )
        self.averaged: nn.Module = self.model if self.ema is None else self.ema.module
        self.whole = self.averaged
        self.parallel = self.model
        if options.shard:
            # Processes evaluate different numbers of batches, which sharded weights do not allow.
            self.whole = deepcopy(self.averaged)
            parallel.shard(self.model)
            if self.averaged is not self.model:
                parallel.shard(self.averaged)
        elif accelerator.num_processes > 1:
            self.parallel = parallel.replicate(self.model, accelerator.device)
        self.optimizer = make_optimizer(self.model, options)
        self.stepper = accelerator.prepare_optimizer(self.optimizer)  # scales the losses in fp16
        self.schedule = make_schedule(self.optimizer, options, steps)

    def backward(self, batch: Batch, last: bool) -> dict[str, Tensor]:
        """Add the gradients of a pass, ``last`` for the last of a step; returns the losses."""
        with nullcontext() if last else self.accelerator.no_sync(self.parallel):
            losses = self._losses(self.parallel, batch)
            self.accelerator.backward(sum(losses.values()) / self.options.accumulate)
        return {name: loss.detach() for name, loss in losses.items()}

    def again(self, batch: Batch) -> Callable[[], object] | None:
        """A function that repeats the losses in this process alone; None for sharded weights."""
        return None if self.options.shard else partial(self._losses, self.model, batch)

    def _losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        with self.accelerator.autocast():
            return self.task.losses(model, batch)

    def step(self, number: int) -> None:
        """Take step ``number``, from 0 on."""
        self.schedule.step_update(number)
        if self.options.clip_grad:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.options.clip_grad)
        self.stepper.step()
        self.stepper.zero_grad()
        if self.ema is not None:
            self.ema.update(self.model, number + 1)

    def evaluated(self) -> nn.Module:
        """The model to evaluate: the average if there is one, complete and equal in each process,
        also in the statistics of batch norms, which are those of the first process's batches."""
        if self.whole is not self.averaged:
            self.whole.load_state_dict(get_model_state_dict(self.averaged, options=parallel.WHOLE))
        if self.accelerator.num_processes > 1:
            distribute_bn(self.whole, self.accelerator.num_processes)
        return self.whole.eval()

    def state(self) -> dict[str, Any]:
        """The complete state, for :meth:`load_state`; all processes must call this."""
        whole, scaler = parallel.WHOLE, self.accelerator.scaler
        ema = None if self.ema is None else get_model_state_dict(self.averaged, options=whole)
        return {
            "model": get_model_state_dict(self.model, options=whole),
            "ema": ema,
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer, options=whole),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from the point where :meth:`state` was called."""
        set_model_state_dict(self.model, state["model"], options=parallel.WHOLE)
        if self.ema is not None:
            set_model_state_dict(self.averaged, state["ema"], options=parallel.WHOLE)
        parallel.load_optimizer_state(self.model, self.optimizer, state["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def lr_of(self, number: int) -> float:
        """The learning rate that the schedule gives step ``number``."""
        self.schedule.step_update(number)
        return self.lr

    @property
    def lr(self) -> float:
        """The largest of the groups' learning rates."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.whole.parameters())


def make_accelerator(precision: str) -> Accelerator:
    """The processes that torchrun or accelerate started, on GPUs if there are any.

    Raises:
        TrainingError: for a precision that the device does not have.
    """
    cpu = not torch.cuda.is_available()
    if precision == "fp16" and cpu:
        raise TrainingError("--precision: fp16 needs a GPU; expected no or bf16 on a CPU")
    return Accelerator(mixed_precision=precision, cpu=cpu)


def _checkpoint_gradients(model: nn.Module) -> None:
    for module in model.modules():
        # options of timm and of transformers
        for switch in ("set_grad_checkpointing", "gradient_checkpointing_enable"):
            if hasattr(module, switch):
                getattr(module, switch)()
                return
    raise TrainingError(
        f"--gradient-checkpointing: {type(model).__name__} cannot; leave the option out"
    )
