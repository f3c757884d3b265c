"""The training loop, whatever is trained."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, send_to_device
from torch import Tensor
from torch.utils.data import DataLoader

from .checkpoints import Checkpoints, clear_partial, save_weights, write_atomically
from .divergence import explained, require_finite
from .evaluation import measure
from .journal import LOSS_EVERY, Journal
from .learner import Learner, make_accelerator
from .options import comparable, differences, total_steps
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
from .task import EVAL_LOSS, TRAIN_LOSS, DataError, Task, TrainingError, blaming


@dataclass
class Progress:
    """How far a training has come; with the weights, all that a checkpoint needs."""

    step: int = 0
    best: float | None = None  # the monitored figure of the best evaluation
    history: list[dict[str, float]] = field(default_factory=list)  # one entry an evaluation
    losses: dict[str, float] = field(default_factory=dict)  # sums since the last evaluation
    passes: int = 0  # the number of terms of those sums
    skipped: list[str] = field(default_factory=list)


def train(kind: type[Task], options: argparse.Namespace) -> Progress:
    """Train as the options say, from the start or from a checkpoint, and print the results.

    Raises:
        TrainingError: for everything that the user can correct.
    """
    training = Training(kind(options), options)
    with closing(training.journal):
        return training.run()


class Training:
    """One training, in one of its processes: data, weights, progress, evaluation, checkpoints."""

    def __init__(self, task: Task, options: argparse.Namespace) -> None:
        self.task, self.options = task, options
        self.checkpoints = Checkpoints(options.output / "checkpoints")
        checkpoint = self._find_checkpoint()
        self.accelerator = make_accelerator(options.precision)
        self.rank, self.processes = self.accelerator.process_index, self.accelerator.num_processes
        self.train_data = SeededDataset(task.train, options.seed, SAMPLE, replace=True)
        self.eval_data = SeededDataset(task.eval, options.seed, EVALUATION, replace=False)
        if self.eval_data.size < self.processes:
            raise DataError(
                f"{self.eval_data.size} evaluation samples for {self.processes} processes; "
                "expected one each at least"
            )
        self.shared = {  # what must not change when a training is resumed
            **comparable(options),
            "processes": self.processes,
            "training samples": self.train_data.size,
            "evaluation samples": self.eval_data.size,
        }
        self.steps = total_steps(self.shared)
        per_step = options.batch_size * self.processes * options.accumulate
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
        self.extended = ""  # the message about a training that is made longer
        if checkpoint is not None:
            self._restore(checkpoint)
        self.journal = Journal(
            options.output,
            self.accelerator.is_main_process,
            self.progress.step,
            self.steps,
            per_step,
        )

    def run(self) -> Progress:
        """Train from the current progress to the end."""
        progress, save_every = self.progress, self.options.save_every
        self.journal.say(self.task.describe())
        self.journal.say(
            f"{self.learner.num_parameters / 1e6:.1f} million parameters, {self.steps} steps on "
            f"{self.processes} x {self.accelerator.device.type}"
            + (f", going on after step {progress.step}{self.extended}" if progress.step else "")
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
        self.journal.finish(progress.history, self.task, progress.skipped)
        return progress

    def _step(self, batches: Iterator[Any]) -> None:
        progress, learner, began = self.progress, self.learner, time.monotonic()
        for index in range(self.options.accumulate):
            batch, failures = next(batches)
            self._note(failures)
            if batch is None:
                raise DataError("no training sample can be read")
            batch = send_to_device(batch, self.accelerator.device)
            seed_generators(self.options.seed, STEP, progress.step, index, self.rank)
            with explained(self.sums, learner.model, progress.step, learner.again(batch)):
                losses = learner.backward(batch, last=index == self.options.accumulate - 1)
            for name, value in losses.items():
                self.sums[name] = self.sums.get(name, 0) + value.double()
            progress.passes += 1
        learner.step(progress.step)
        progress.step += 1
        if progress.step % LOSS_EVERY == 0:
            require_finite(self.sums, learner.model, progress.step)
        self.journal.step(progress.step, losses, learner.lr, began)

    def _evaluate(self) -> None:
        """Measure, remember, and export the weights if they are the best."""
        progress = self.progress
        require_finite(self.sums, self.learner.model, progress.step)
        model = self.learner.evaluated()
        figures = measure(
            model,
            self.task.metrics(),
            self.journal.evaluating(self.eval_loader),
            self.accelerator,
            self._note,
            partial(explained, self.sums, model, progress.step),
        )
        self.learner.model.train()
        passes = progress.passes * self.processes
        means = {name: value / passes for name, value in self._all_sums().items()}
        self.sums, progress.passes = {}, 0
        if EVAL_LOSS not in figures:
            means[TRAIN_LOSS] = sum(means.values())
        entry = {"step": progress.step, **means, **figures}
        progress.history.append(entry)
        self.journal.evaluation(entry)
        if self.task.best(progress.history) is entry:
            progress.best = entry[self.task.monitor]
            if self.accelerator.is_main_process:
                output, card = self.options.output, json.dumps(self.task.card(), indent=2)
                write_atomically(output / "card.json", lambda file: file.write(card.encode()))
                save_weights(output / "model.safetensors", model.state_dict())

    def _save(self) -> None:
        require_finite(self.sums, self.learner.model, self.progress.step)
        self.progress.losses = self._all_sums()
        self.progress.skipped = list(dict.fromkeys(gather_object(self.progress.skipped)))
        progress = asdict(self.progress)
        state = {"shared": self.shared, "progress": progress, **self.learner.state()}
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
        before, step = checkpoint["shared"], checkpoint["progress"]["step"]
        differing = differences(before, self.shared)
        if differing:
            raise TrainingError(
                f"--resume: {self.options.output} was trained otherwise: {'; '.join(differing)}; "
                "go on with what it had, or give another --output"
            )
        planned = total_steps(before)
        if planned != self.steps and not step == planned < self.steps:
            raise TrainingError(
                f"--resume: {self.options.output} is at step {step} of {planned}, and its learning "
                f"rate falls along a cosine of {planned} steps; take these first, then --epochs or "
                f"--steps may ask for more, but never for fewer; got {self.steps} steps"
            )
        where = f"{self.checkpoints.folder}: of another version of the model or of a package"
        with blaming(where, KeyError, RuntimeError, ValueError):
            self.learner.load_state(checkpoint)
        self.progress = Progress(**checkpoint["progress"])
        if planned != self.steps:
            rates = f"from {self.learner.lr:.1e} to {self.learner.lr_of(step):.1e}"
            self.extended = (
                f", of {self.steps} steps instead of {planned}: "
                f"the learning rate goes {rates} now, and down the cosine of {self.steps} steps"
            )
        share = float(self.rank == 0)  # the saved sums are those of all processes
        self.sums = {
            name: torch.tensor(share * value, dtype=torch.float64, device=self.accelerator.device)
            for name, value in self.progress.losses.items()
        }

    def _train_loader(self) -> DataLoader:
        """The training batches, from the first sample that has not been trained on."""
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
        """The sums of the losses over all processes, in the same order in each."""
        return {
            name: self.accelerator.reduce(self.sums[name], "sum").item()
            for name in sorted(self.sums)
        }

    def _note(self, failures: list[str]) -> None:
        for failure in failures:
            if self.options.on_error == "stop":
                raise DataError(f"{failure} (--on-error skip: leave such samples out)")
            if failure not in self.progress.skipped:
                self.progress.skipped.append(failure)
