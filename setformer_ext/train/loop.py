"""The training loop, whatever is trained."""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader

from . import parallel
from .checkpoints import Checkpoints, clear_partial, save_weights, write_atomically
from .journal import Journal
from .optimization import make_optimizer, make_schedule
from .sampling import (
    EVALUATION,
    INITIALISATION,
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
    return Training(kind, options).run()


class Training:
    """One training: its data, model, optimizer and progress, in one of the processes."""

    def __init__(self, kind: type[Task], options: argparse.Namespace) -> None:
        self.options = options
        self.task = kind(options)
        self.checkpoints = Checkpoints(options.output / "checkpoints")
        checkpoint = self._find_checkpoint()
        self.accelerator = _accelerator(options.precision)
        self.rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device
        self._make_loaders(processes)
        self._make_model(processes)
        self.progress = Progress()
        self.sums: dict[str, Tensor] = {}
        if checkpoint is not None:
            self._restore(checkpoint)
        self.journal = Journal(
            options.output, self.accelerator.is_main_process, self.progress.step, self.steps
        )

    def _find_checkpoint(self) -> dict[str, Any] | None:
        if self.options.resume:
            clear_partial(self.options.output)
            return self.checkpoints.load(lambda text: print(f"{text}; trying the one before"))
        if self.checkpoints.paths() or (self.options.output / "model.safetensors").exists():
            raise TrainingError(
                f"--output: {self.options.output} holds a training already; "
                "go on with it by --resume, or give another folder"
            )
        return None

    def _make_loaders(self, processes: int) -> None:
        options, task = self.options, self.task
        samples = SeededDataset(task.train_dataset(), options.seed, SAMPLE, replace=True)
        evaluated = SeededDataset(task.eval_dataset(), options.seed, EVALUATION, replace=False)
        if evaluated.size < processes:
            raise DataError(f"{evaluated.size} evaluation samples for {processes} processes")
        per_step = options.batch_size * processes * options.accumulate
        self.steps = options.steps or -(-options.epochs * samples.size // per_step)
        self.eval_every = options.eval_every or max(
            1, options.steps // 10 if options.steps else round(samples.size / per_step)
        )
        self.shared = {  # what has to be as it was when a training goes on
            **_comparable(options),
            "processes": processes,
            "training samples": samples.size,
            "evaluation samples": evaluated.size,
        }
        self.common = {
            "collate_fn": Collate(task.collate),
            "num_workers": options.workers,
            "pin_memory": self.device.type == "cuda",
        }
        self.samples = samples
        self.eval_loader = DataLoader(
            evaluated,
            batch_sampler=Once(evaluated.size, options.batch_size, self.rank, processes),
            persistent_workers=options.workers > 0,
            **self.common,
        )

    def _train_loader(self) -> DataLoader:
        options = self.options
        passes = (self.progress.step * options.accumulate, self.steps * options.accumulate)
        stream = Stream(
            self.samples.size,
            options.batch_size,
            options.seed,
            passes,
            self.rank,
            self.accelerator.num_processes,
        )
        return DataLoader(self.samples, batch_sampler=stream, **self.common)

    def _make_model(self, processes: int) -> None:
        options = self.options
        seed_generators(options.seed, INITIALISATION)
        self.model = self.task.make_model()
        if options.gradient_checkpointing:
            _checkpoint_gradients(self.model)
        self.model.to(self.device).train()
        self.ema = (
            ModelEmaV3(self.model, decay=options.ema_decay, use_warmup=True)
            if options.ema_decay
            else None
        )
        self.evaluated = self.model if self.ema is None else self.ema.module
        self.wrapped = self.model
        if options.shard:
            # Processes evaluate different numbers of batches, which sharded weights do not allow.
            self.evaluated = deepcopy(self.model)
            parallel.shard(self.model)
            if self.ema is not None:
                parallel.shard(self.ema.module)
        elif processes > 1:
            self.wrapped = parallel.replicate(self.model, self.device, self.task.unused_parameters)
        self.optimizer = make_optimizer(self.model, options)
        self.stepper = self.accelerator.prepare_optimizer(self.optimizer)
        self.schedule = make_schedule(self.optimizer, options, self.steps)

    def run(self) -> Progress:
        """Train from where the progress is to the end."""
        progress = self.progress
        self.journal.say(self.task.describe())
        parameters = sum(p.numel() for p in self.evaluated.parameters())
        self.journal.say(
            f"{parameters / 1e6:.1f} million parameters, {self.steps} steps on "
            f"{self.accelerator.num_processes} x {self.device.type}"
            + (f", going on after step {progress.step}" if progress.step else "")
        )
        batches = iter(self._train_loader())
        while progress.step < self.steps:
            losses = self._step(batches)
            self._look(losses)
            evaluate = progress.step % self.eval_every == 0 or progress.step == self.steps
            if evaluate:
                self._evaluate()
            if evaluate or (
                self.options.save_every and progress.step % self.options.save_every == 0
            ):
                self._save()
        self.journal.finish(progress.history, self.task.monitor, progress.skipped)
        return progress

    def _step(self, batches: Any) -> dict[str, Tensor]:
        """One step of the optimizer; returns the losses of its last pass."""
        progress, accumulate = self.progress, self.options.accumulate
        self.schedule.step_update(progress.step)
        for index in range(accumulate):
            batch, failures = next(batches)
            self._note(failures)
            if batch is None:
                raise DataError("no training sample can be read")
            batch = send_to_device(batch, self.device)
            seed_generators(self.options.seed, STEP, progress.step, index, self.rank)
            last = index == accumulate - 1
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                with self.accelerator.autocast():
                    losses = self.task.losses(self.wrapped, batch)
                self.accelerator.backward(sum(losses.values()) / accumulate)
            for name, loss in losses.items():
                loss = loss.detach().double()
                self.sums[name] = self.sums[name] + loss if name in self.sums else loss
            progress.passes += 1
        if self.options.clip_grad:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.options.clip_grad)
        self.stepper.step()
        self.stepper.zero_grad()
        progress.step += 1
        if self.ema is not None:
            self.ema.update(self.model, progress.step)
        return losses

    def _look(self, losses: dict[str, Tensor]) -> None:
        step = self.progress.step
        loss = None
        if step % LOSS_EVERY == 0 or step == self.steps:
            loss = sum(value.item() for value in losses.values())
            self._require_finite()
        self.journal.step(step, loss, self.optimizer.param_groups[-1]["lr"])

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

    def _evaluate(self) -> None:
        """Measure, remember, and export the weights if they are the best."""
        self._require_finite()
        progress, task = self.progress, self.task
        if self.options.shard:
            weights = parallel.whole_state(self.model if self.ema is None else self.ema.module)
            self.evaluated.load_state_dict(weights)
        metrics = task.metrics()
        metrics.to(self.device)
        self.evaluated.eval()
        seen = 0
        with torch.no_grad():
            for batch, failures in self.eval_loader:
                self._note(failures)
                if batch is not None:
                    with self.accelerator.autocast():
                        metrics.update(self.evaluated, send_to_device(batch, self.device))
                    seen += 1
        if not sum(gather_object([seen])):
            raise DataError("no evaluation sample can be read")
        figures = metrics.compute()
        if self.evaluated is self.model:
            self.model.train()
        mean = {
            name: value / progress.passes / self.accelerator.num_processes
            for name, value in self._all_sums().items()
        }
        self.sums, progress.passes = {}, 0
        entry = {"step": progress.step, **mean, **figures}
        progress.history.append(entry)
        self.journal.evaluation(entry, self.steps)
        value = figures[task.monitor]
        if progress.best is None or value > progress.best or progress.best != progress.best:
            progress.best = value
            if self.accelerator.is_main_process:
                card = json.dumps(task.card(), indent=2).encode()
                write_atomically(self.options.output / "card.json", lambda file: file.write(card))
                save_weights(self.options.output / "model.safetensors", self.evaluated.state_dict())

    def _all_sums(self) -> dict[str, float]:
        """The losses' sums over all processes, in the same order in all."""
        return {
            name: self.accelerator.reduce(self.sums[name], "sum").item()
            for name in sorted(self.sums)
        }

    def _save(self) -> None:
        self._require_finite()
        progress = self.progress
        progress.losses = self._all_sums()
        progress.skipped = list(dict.fromkeys(gather_object(progress.skipped)))
        scaler = self.accelerator.scaler
        state = {
            "shared": self.shared,
            "progress": asdict(progress),
            "model": parallel.whole_state(self.model),
            "ema": None if self.ema is None else parallel.whole_state(self.ema.module),
            "optimizer": parallel.whole_optimizer_state(self.model, self.optimizer),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        if self.accelerator.is_main_process:
            self.checkpoints.save(progress.step, state)

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
        parallel.load_whole_state(self.model, checkpoint["model"])
        if self.ema is not None:
            parallel.load_whole_state(self.ema.module, checkpoint["ema"])
        parallel.load_whole_optimizer_state(self.model, self.optimizer, checkpoint["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(checkpoint["scaler"])
        self.progress = Progress(**checkpoint["progress"])
        if self.rank == 0:  # whose sums were those of all processes
            self.sums = {
                name: torch.tensor(value, dtype=torch.float64, device=self.device)
                for name, value in self.progress.losses.items()
            }
        else:
            self.sums = {
                name: torch.zeros((), dtype=torch.float64, device=self.device)
                for name in self.progress.losses
            }


MAY_DIFFER = {"command", "config", "on_error", "output", "resume", "run", "save_every", "workers"}


def _comparable(options: argparse.Namespace) -> dict[str, Any]:
    """The options that make the numbers; folders may have moved."""
    return {
        name: json.loads(json.dumps(value))
        for name, value in vars(options).items()
        if name not in MAY_DIFFER and not isinstance(value, Path)
    }


def _accelerator(precision: str) -> Accelerator:
    cpu = not torch.cuda.is_available()
    if precision == "fp16" and cpu:
        raise TrainingError("--precision: fp16 needs a GPU; expected no or bf16 on a CPU")
    return Accelerator(mixed_precision=precision, cpu=cpu)


def _checkpoint_gradients(model: nn.Module) -> None:
    able: Any = next((m for m in model.modules() if hasattr(m, "set_grad_checkpointing")), None)
    if able is None:
        raise TrainingError(
            f"--gradient-checkpointing: {type(model).__name__} cannot; leave the option out"
        )
    able.set_grad_checkpointing(True)
