"""The training loop, whatever is trained."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, send_to_device
from torch import Tensor
from torch.utils.data import DataLoader

from ..errors import first_line
from .checkpoints import CheckpointError, Checkpoints, clear_partial, save_weights, write_atomically
from .evaluation import measure
from .journal import Journal
from .learner import Learner, make_accelerator
from .options import comparable
from .sampling import (
    EVALUATION,
    SAMPLE,
    STEP,
    Collate,
    Once,
    SeededDataset,
    Stream,
    seed_generators,
)
from .task import DataError, Task, TrainingError

LOSS_EVERY = 10  # steps between looks at the loss, each of which waits for the device


@dataclass
class Progress:
    """How far a training has come; with the weights, all that a checkpoint needs."""

    step: int = 0
    best: float | None = None
    history: list[dict[str, float]] = field(default_factory=list)  # one entry an evaluation
    losses: dict[str, float] = field(default_factory=dict)  # sums since the last evaluation
    passes: int = 0  # that those sums are of
    skipped: list[str] = field(default_factory=list)


def train(kind: type[Task], options: argparse.Namespace) -> Progress:
    """Train as the options say, from the start or from a checkpoint, and print what came out.

    Raises:
        TrainingError: for all that the user can put right.
    """
    return Training(kind(options), options).run()


class Training:
    """One training, in one of its processes: data, weights, progress, evaluation, checkpoints."""

    def __init__(self, task: Task, options: argparse.Namespace) -> None:
        self.task, self.options = task, options
        self.checkpoints = Checkpoints(options.output / "checkpoints")
        checkpoint = self._find_checkpoint()
        self.accelerator = make_accelerator(options.precision)
        self.rank, self.processes = (
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        self.train_data = SeededDataset(task.train, options.seed, SAMPLE, replace=True)
        self.eval_data = SeededDataset(task.eval, options.seed, EVALUATION, replace=False)
        if self.eval_data.size < self.processes:
            raise DataError(
                f"{self.eval_data.size} evaluation samples for {self.processes} processes; "
                "expected one each at least"
            )
        per_step = options.batch_size * self.processes * options.accumulate
        self.steps = options.steps or -(-options.epochs * self.train_data.size // per_step)
        self.eval_every = options.eval_every or max(
            1, options.steps // 10 if options.steps else round(self.train_data.size / per_step)
        )
        self.eval_loader = self._loader(
            self.eval_data,
            Once(self.eval_data.size, options.batch_size, self.rank, self.processes),
            persistent_workers=options.workers > 0,
        )
        self.learner = Learner(task, options, self.accelerator, self.steps)
        self.progress = Progress()
        self.sums: dict[str, Tensor] = {}  # this process's part of progress.losses
        self.shared = {  # what has to be as it was when a training goes on
            **comparable(options),
            "processes": self.processes,
            "training samples": self.train_data.size,
            "evaluation samples": self.eval_data.size,
        }
        if checkpoint is not None:
            self._restore(checkpoint)
        self.journal = Journal(
            options.output, self.accelerator.is_main_process, self.progress.step, self.steps
        )

    def run(self) -> Progress:
        """Train from where the progress is to the end."""
        progress, save_every = self.progress, self.options.save_every
        self.journal.say(self.task.describe())
        self.journal.say(
            f"{self.learner.num_parameters / 1e6:.1f} million parameters, {self.steps} steps on "
            f"{self.processes} x {self.accelerator.device.type}"
            + (f", going on after step {progress.step}" if progress.step else "")
        )
        if self.accelerator.is_main_process:
            self.task.prepare(self.options.output)
        batches = iter(self._train_loader())
        while progress.step < self.steps:
            self._step(batches)
            evaluate = progress.step % self.eval_every == 0 or progress.step == self.steps
            if evaluate:
                self._evaluate()
            if evaluate or (save_every and progress.step % save_every == 0):
                self._save()
        self.journal.finish(progress.history, self.task.monitor, progress.skipped)
        return progress

    def _step(self, batches: Iterator[Any]) -> None:
        progress = self.progress
        for index in range(self.options.accumulate):
            batch, failures = next(batches)
            self._note(failures)
            if batch is None:
                raise DataError("no training sample can be read")
            batch = send_to_device(batch, self.accelerator.device)
            seed_generators(self.options.seed, STEP, progress.step, index, self.rank)
            losses = self.learner.backward(batch, last=index == self.options.accumulate - 1)
            for name, value in losses.items():
                self.sums[name] = self.sums.get(name, 0) + value.double()
            progress.passes += 1
        self.learner.step(progress.step)
        progress.step += 1
        total = None
        if progress.step % LOSS_EVERY == 0:
            self._require_finite()
            total = float(sum(value.item() for value in losses.values()))
        self.journal.step(progress.step, total, self.learner.lr)

    def _evaluate(self) -> None:
        """Measure, remember, and export the weights if they are the best."""
        self._require_finite()
        progress = self.progress
        model = self.learner.evaluated()
        figures = measure(
            model, self.task.metrics(), self.eval_loader, self.accelerator, self._note
        )
        self.learner.model.train()
        passes = progress.passes * self.processes
        means = {name: value / passes for name, value in self._all_sums().items()}
        self.sums, progress.passes = {}, 0
        progress.history.append({"step": progress.step, **means, **figures})
        self.journal.evaluation(progress.history[-1], self.steps)
        value, best = figures[self.task.monitor], progress.best
        if best is None or value > best or best != best:  # NaN is no best
            progress.best = value
            if self.accelerator.is_main_process:
                output, card = self.options.output, json.dumps(self.task.card(), indent=2)
                write_atomically(output / "card.json", lambda file: file.write(card.encode()))
                save_weights(output / "model.safetensors", model.state_dict())

    def _save(self) -> None:
        self._require_finite()
        self.progress.losses = self._all_sums()
        self.progress.skipped = list(dict.fromkeys(gather_object(self.progress.skipped)))
        state = {
            "shared": self.shared,
            "progress": asdict(self.progress),
            **self.learner.state(),
        }
        if self.accelerator.is_main_process:
            self.checkpoints.save(self.progress.step, state)

    def _find_checkpoint(self) -> dict[str, Any] | None:
        output: Path = self.options.output
        if self.options.resume:
            clear_partial(output)
            return self.checkpoints.load(lambda text: print(f"{text}; trying the one before"))
        if self.checkpoints.paths() or (output / "model.safetensors").exists():
            raise TrainingError(
                f"--output: {output} holds a training already; "
                "go on with it by --resume, or give another folder"
            )
        return None

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        before = checkpoint["shared"]
        differing = [
            f"{name} was {before.get(name)}, is {self.shared.get(name)}"
            for name in sorted({*before, *self.shared})
            if before.get(name) != self.shared.get(name)
        ]
        if differing:
            raise TrainingError(
                f"--resume: {self.options.output} was trained otherwise: {'; '.join(differing)}; "
                "go on with what it had, or give another --output"
            )
        try:
            self.learner.load_state(checkpoint)
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{self.checkpoints.folder}: of another version of the model or of a package: "
                + first_line(error)
            ) from error
        self.progress = Progress(**checkpoint["progress"])
        share = float(self.rank == 0)  # the sums were those of all processes
        self.sums = {
            name: torch.tensor(share * value, dtype=torch.float64, device=self.accelerator.device)
            for name, value in self.progress.losses.items()
        }

    def _train_loader(self) -> DataLoader:
        """From the first sample that has not been trained on."""
        accumulate = self.options.accumulate
        stream = Stream(
            self.train_data.size,
            self.options.batch_size,
            self.options.seed,
            (self.progress.step * accumulate, self.steps * accumulate),
            self.rank,
            self.processes,
        )
        return self._loader(self.train_data, stream)

    def _loader(self, data: SeededDataset, batches: Stream | Once, **more: Any) -> DataLoader:
        return DataLoader(
            data,
            batch_sampler=batches,
            collate_fn=Collate(self.task.collate),
            num_workers=self.options.workers,
            pin_memory=self.accelerator.device.type == "cuda",
            **more,
        )

    def _all_sums(self) -> dict[str, float]:
        """The losses' sums over all processes, asked for in the same order in each."""
        return {
            name: self.accelerator.reduce(self.sums[name], "sum").item()
            for name in sorted(self.sums)
        }

    def _require_finite(self) -> None:
        for name, value in self.sums.items():
            if not value.isfinite():
                raise TrainingError(
                    f"the loss {name} is {value.item()} by step {self.progress.step}; "
                    "try a lower --lr, more --warmup or another --precision"
                )

    def _note(self, failures: list[str]) -> None:
        for failure in failures:
            if self.options.on_error == "stop":
                raise DataError(f"{failure} (--on-error skip: leave such samples out)")
            if failure not in self.progress.skipped:
                self.progress.skipped.append(failure)
