"""One training: a task, a mixer, a learning rate and a seed, and what came of it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from setformer_ext.weight_decay import undecayed

from .memory import peak, reset_peak
from .network import make_network
from .records import Plan, Run
from .tasks import TASKS
from .tasks.task import IGNORED, Samples, Task

WEIGHT_DECAY = 0.05
WARMUP = 0.1  # share of the steps
LARGEST_GRADIENT = 1.0
LAST_STEPS = 50  # whose mean loss is recorded


def train(plan: Plan, folder: Path) -> Run:
    """Train, validate, and test. The seed draws weights and order; data are the same for all."""
    torch.set_num_threads(1)
    task = TASKS[plan.task]
    data = task.load(folder)
    torch.manual_seed(plan.seed)
    network = make_network(task, plan.mixer, plan.options)
    before = reset_peak()
    losses, seconds = _fit(network, data.training, task, plan)
    mebibytes = (peak() - before) / 2**20
    return Run(
        plan,
        steps=task.steps,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        loss=sum(losses[-LAST_STEPS:]) / len(losses[-LAST_STEPS:]),
        validation=accuracy(network, data.validation, task.batch_size),
        test=None if plan.study else accuracy(network, data.test, task.batch_size),
        milliseconds=1e3 * median(seconds),
        mebibytes=mebibytes,
    )


def _fit(
    network: nn.Module, samples: Samples, task: Task, plan: Plan
) -> tuple[list[float], list[float]]:
    """The loss and the seconds of each step."""
    optimizer = make_optimizer(network, plan.learning_rate)
    warmup = max(1, round(WARMUP * task.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / task.steps)),
    )
    order = _batches(len(samples.labels), task.batch_size, plan.seed)
    losses, seconds = [], []
    for _ in range(task.steps):
        batch = samples.chosen(next(order))
        start = time.perf_counter()
        losses.append(step(network, optimizer, batch))
        schedule.step()
        seconds.append(time.perf_counter() - start)
    return losses, seconds


def make_optimizer(network: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW. Matrices decay; biases, norms and what a module exempts itself do not."""
    exempt = undecayed(network)
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in network.parameters():
        groups[parameter.dim() >= 2 and id(parameter) not in exempt].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": WEIGHT_DECAY},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=learning_rate,
    )


def step(network: nn.Module, optimizer: torch.optim.Optimizer, batch: Samples) -> float:
    """One step; its loss."""
    logits = network(batch.inputs, batch.mask)
    loss = F.cross_entropy(logits.flatten(0, -2), batch.labels.flatten(), ignore_index=IGNORED)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), LARGEST_GRADIENT)
    optimizer.step()
    return loss.item()


def _batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Rounds through the samples in a new order each, in batches of one size."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % size].split(size)


@torch.no_grad()
def accuracy(network: nn.Module, samples: Samples, batch_size: int) -> float:
    """The share of answers that are right, of those that are asked for."""
    network.eval()
    right = asked = 0
    for indices in torch.arange(len(samples.labels)).split(batch_size):
        batch = samples.chosen(indices)
        labels = batch.labels.flatten()
        answers = network(batch.inputs, batch.mask).flatten(0, -2).argmax(-1)
        right += int((answers == labels).sum())  # IGNORED is no answer
        asked += int((labels != IGNORED).sum())
    network.train()
    return right / asked
