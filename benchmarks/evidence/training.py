"""One training: a task, a mixer, a learning rate and a seed, and what came of it."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
    before = _reset_peak()
    losses, seconds = _fit(network, data.training, task, plan)
    mebibytes = (_peak() - before) / 2**20
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
    optimizer = torch.optim.AdamW(_groups(network), lr=plan.learning_rate)
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
        logits = network(batch.inputs, batch.mask)
        loss = F.cross_entropy(logits.flatten(0, -2), batch.labels.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), LARGEST_GRADIENT)
        optimizer.step()
        schedule.step()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    return losses, seconds


def _groups(network: nn.Module) -> list[dict[str, object]]:
    """Matrices decay; biases, norms and what a module exempts itself do not."""
    exempt = {
        f"{prefix}.{name}"
        for prefix, module in network.named_modules()
        if hasattr(module, "no_weight_decay")
        for name in module.no_weight_decay()
    }
    decays = {
        name: parameter.dim() >= 2 and name not in exempt
        for name, parameter in network.named_parameters()
    }
    return [
        {
            "params": [p for name, p in network.named_parameters() if decays[name] == decaying],
            "weight_decay": WEIGHT_DECAY if decaying else 0.0,
        }
        for decaying in (True, False)
    ]


def _batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Rounds through the samples in a new order each, in batches of one size."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % size].split(size)


@torch.no_grad()
def accuracy(network: nn.Module, samples: Samples, batch_size: int) -> float:
    """The share of answers that are right."""
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


def _reset_peak() -> int:
    """Let the peak of this process's memory begin anew; bytes in use now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def _peak() -> int:
    """Bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
