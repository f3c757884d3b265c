"""Training and testing a classifier."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from .data import Images

Network = TypeVar("Network", bound=nn.Module)

BATCH_SIZE = 64
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05


@dataclass
class History:
    """What happened in a training."""

    losses: list[float] = field(default_factory=list)  # one per step
    tested_at: list[int] = field(default_factory=list)  # steps
    accuracies: list[float] = field(default_factory=list)  # on the test set, at those steps
    seconds: list[float] = field(default_factory=list)  # one per step

    @property
    def accuracy(self) -> float:
        """The test accuracy at the end."""
        return self.accuracies[-1]

    @property
    def milliseconds_per_step(self) -> float:
        """The median over the steps."""
        return 1e3 * median(self.seconds)


def train(
    make_model: Callable[[], Network],
    images: Images,
    *,
    steps: int,
    seed: int,
    description: str,
    tests: int = 20,
) -> tuple[Network, History]:
    """Train for a number of steps, testing in between and at the end.

    The seed fixes weights, order and augmentation.
    """
    torch.manual_seed(seed)
    model = make_model()
    generator = torch.Generator().manual_seed(seed)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
    )
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
    )
    order = _batches(len(images.train), generator)
    history = History()
    test_every = max(1, steps // tests)
    with tqdm(total=steps, desc=description, unit="step", disable=None) as bar:
        for step in range(1, steps + 1):
            chosen = next(order)
            batch = _augment(images.train[chosen], generator)
            start = time.perf_counter()
            loss = F.cross_entropy(model(batch), images.train_labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            history.seconds.append(time.perf_counter() - start)
            history.losses.append(loss.item())
            tested = step % test_every == 0 or step == steps
            if tested:
                history.tested_at.append(step)
                history.accuracies.append(accuracy(model, images.test, images.test_labels))
            if history.accuracies:
                status = f"loss={history.losses[-1]:.2f}, test={history.accuracy:.1%}"
                bar.set_postfix_str(status, refresh=False)
                if bar.disable and tested:  # a log, in which a bar would be unreadable
                    print(f"{description}: step {step}/{steps}, {status}", file=sys.stderr)
            bar.update()
    return model, history


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images classified right."""
    model.eval()
    right = sum(
        int((model(batch).argmax(-1) == target).sum())
        for batch, target in zip(images.split(256), labels.split(256), strict=True)
    )
    model.train()
    return right / len(labels)


def _batches(count: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of indices, all of one size: rounds through the images in a new order."""
    indices = torch.empty(0, dtype=torch.int64)
    while True:
        while len(indices) < BATCH_SIZE:
            indices = torch.cat([indices, torch.randperm(count, generator=generator)])
        yield indices[:BATCH_SIZE]
        indices = indices[BATCH_SIZE:]


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:  # [B, channels, S, S]
    """Each image rotated, scaled and moved a little."""

    def uniform(limit: float) -> Tensor:
        return (2 * torch.rand(len(images), generator=generator) - 1) * limit

    angle, scale = uniform(math.radians(10)), 1 + uniform(0.1)
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    affine = torch.stack(
        [
            torch.stack([cosine, -sine, uniform(0.15)], -1),
            torch.stack([sine, cosine, uniform(0.15)], -1),
        ],
        dim=1,
    )
    places = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images, places, padding_mode="border", align_corners=False)
