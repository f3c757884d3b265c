"""What a step costs with each mixer: measured side by side, apart from the trainings, which run
beside one another."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from .memory import peak, reset_peak
from .mixers import options_of
from .network import make_network
from .tasks import TASKS
from .tasks.task import Samples
from .training import make_optimizer, step

FILE = Path(__file__).with_name("costs.json")
ROUNDS = 11


@dataclass(frozen=True)
class Cost:
    """Of a step on one core."""

    milliseconds: float  # median
    mebibytes: float  # that it needs at most, beyond the batch and the weights
    # Of SetAttention, when it was measured.
    options: Mapping[str, Any] = field(default_factory=dict)


def load(task: str) -> dict[str, Cost]:
    """The costs on record, by mixer, of the task and the mixers as they are now."""
    kept = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    of_task = kept.get(task, {})
    if of_task.get("recipe") != TASKS[task].recipe:
        return {}
    costs = {mixer: Cost(**cost) for mixer, cost in of_task["mixers"].items()}
    return {mixer: cost for mixer, cost in costs.items() if cost.options == _options(task, mixer)}


def measure(task: str, mixers: Sequence[str], folder: Path) -> None:
    """Measure all mixers of a task, in turn, and put it on record."""
    training = TASKS[task].load(folder).training
    batch = training.chosen(torch.arange(TASKS[task].batch_size))
    times = _milliseconds(task, mixers, batch)
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        memory = {mixer: pool.apply(_mebibytes, (task, mixer, batch)) for mixer in mixers}
    kept = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    costs = {
        mixer: asdict(Cost(times[mixer], memory[mixer], _options(task, mixer))) for mixer in mixers
    }
    kept[task] = {"recipe": TASKS[task].recipe, "mixers": costs}
    FILE.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def _milliseconds(task: str, mixers: Sequence[str], batch: Samples) -> dict[str, float]:
    torch.set_num_threads(1)
    networks = {mixer: _network(task, mixer) for mixer in mixers}
    optimizers = {mixer: make_optimizer(network, 1e-3) for mixer, network in networks.items()}
    seconds: dict[str, list[float]] = {mixer: [] for mixer in mixers}
    for _ in range(ROUNDS):
        for mixer, network in networks.items():
            start = time.perf_counter()
            step(network, optimizers[mixer], batch)
            seconds[mixer].append(time.perf_counter() - start)
    return {mixer: 1e3 * median(of_mixer[1:]) for mixer, of_mixer in seconds.items()}


def _mebibytes(task: str, mixer: str, batch: Samples) -> float:
    """In a process of its own, which has held nothing else."""
    torch.set_num_threads(1)
    network = _network(task, mixer)
    optimizer = make_optimizer(network, 1e-3)
    before = reset_peak()
    for _ in range(2):  # the optimizer has its moments from the first on
        step(network, optimizer, batch)
    return (peak() - before) / 2**20


def _network(task: str, mixer: str) -> nn.Module:
    torch.manual_seed(0)
    return make_network(TASKS[task], mixer, _options(task, mixer))


def _options(task: str, mixer: str) -> dict[str, Any]:
    return options_of(mixer, TASKS[task].references, {})
