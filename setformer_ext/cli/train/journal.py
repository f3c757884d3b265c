"""The output of a training: progress, TensorBoard's logs and the final table."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from .checkpoints import CheckpointError, write_atomically
from .task import Task

LOSS_EVERY = 10  # steps between looks at the loss, each of which waits for the device
LONG = 5.0  # seconds after which a look at the loss costs little in comparison
LINE_EVERY = 60.0  # seconds between the lines of a log
T = TypeVar("T")
LISTED = 20  # broken samples named on the screen; metrics.json names all


def make_bar(**settings: Any) -> tqdm:
    """A bar of steps or batches, which goes away when it is closed."""
    layout = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
    # Some terminals report a size of 0 x 0 letters, for which tqdm would show nothing.
    size = shutil.get_terminal_size()
    settings |= {"ncols": size.columns, "nrows": size.lines}
    return tqdm(bar_format=layout, leave=False, **settings)


class Journal:
    """Reports what happens; only the main process prints.

    On a terminal a bar shows how far the training is; elsewhere, as in a log, occasional lines do.

    Args:
        output: the training's folder; TensorBoard's logs go to ``logs`` in it.
        speaks: whether this is the main process.
        step: steps taken before; anything logged after that step is dropped.
        steps: of the whole training.
        samples: the number in a step, of all processes.
    """

    def __init__(self, output: Path, speaks: bool, step: int, steps: int, samples: int) -> None:
        self.output, self.speaks = output, speaks
        self.first, self.steps, self.samples = step, steps, samples
        # The time left follows from the mean time of all steps, evaluations included.
        disable = None if speaks else True
        self.bar = make_bar(total=steps, initial=step, smoothing=0, disable=disable)
        self.began = time.monotonic()
        self.next_line = self.began
        self.unseen, self.seconds = 0, 0.0  # steps since the last look at the loss; what they took
        self.logs = output / "logs"
        self.writer = SummaryWriter(str(self.logs), purge_step=step + 1) if speaks else None

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self.speaks:
            with self.bar.external_write_mode():
                print(text, flush=True)

    def step(self, step: int, losses: dict[str, Tensor], lr: float, began: float) -> None:
        """Note that a step was taken; from time to time wait for the device and print its figures.

        Args:
            step: its number, from 1 on.
            losses: its losses, scalars.
            lr: its learning rate.
            began: when it began, by time.monotonic.
        """
        if self.writer is None:
            return
        self.unseen += 1
        logged = step % LOSS_EVERY == 0
        seen = logged or self.seconds > LONG
        loss = sum(value.item() for value in losses.values()) if seen else math.nan
        self.seconds += time.monotonic() - began
        if seen:
            speed = self.unseen * self.samples / self.seconds
            self.unseen, self.seconds = 0, 0.0
            figures = {
                "loss": f"{loss:.4g}",
                "lr": f"{lr:.1e}",
                "samples/s": tqdm.format_sizeof(speed),
            }
            self.bar.set_postfix(figures, refresh=False)
            told = "  ".join(f"{name} {value}" for name, value in figures.items())
            text = f"step {step}/{self.steps}  {told}  {self._time_left(step)} left"
            self.next_line = self._line(text, self.next_line)
        self.bar.update()
        if logged:
            self._log({"step/loss": loss, "step/lr": lr}, step)

    def evaluating(self, batches: DataLoader[T]) -> Iterator[T]:
        """The batches of an evaluation, with a bar or lines that show how many are done."""
        # Most evaluations end before the first line is due. They do not share the time of the next
        # line with the steps, whose lines frequent evaluations would suppress.
        next_line = time.monotonic() + LINE_EVERY
        bar = make_bar(iterable=batches, desc="evaluation", disable=self.bar.disable)
        for number, batch in enumerate(bar, start=1):
            yield batch
            next_line = self._line(f"evaluation: batch {number}/{len(batches)}", next_line)

    def evaluation(self, entry: dict[str, float]) -> None:
        """Print and log an evaluation: its step, mean losses and metrics."""
        figures = {name: value for name, value in entry.items() if name != "step"}
        step = int(entry["step"])
        # There may be hundreds of figures for single classes ("IoU/sky"): only the final table has
        # them.
        short = (f"{name} {value:.4f}" for name, value in figures.items() if "/" not in name)
        self.say(f"step {step}/{self.steps}  " + "  ".join(short))
        self._log({f"evaluation/{name}": value for name, value in figures.items()}, step)

    def close(self) -> None:
        """Take the bar away."""
        self.bar.close()

    def _line(self, text: str, due: float) -> float:
        """Print `text` if there is no bar and a line is due; returns when the next one is due."""
        if not self.bar.disable or time.monotonic() < due:
            return due
        self.say(text)
        return time.monotonic() + LINE_EVERY

    def _time_left(self, step: int) -> str:
        each = (time.monotonic() - self.began) / (step - self.first)
        return tqdm.format_interval(each * (self.steps - step))

    def _log(self, figures: dict[str, float], step: int) -> None:
        if self.writer is None:
            return
        try:
            for name, value in figures.items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()  # so that an error of writing appears here
        except OSError as error:
            raise CheckpointError.of_writing(self.logs, error) from error

    def finish(self, history: list[dict[str, float]], task: Task, skipped: list[str]) -> None:
        """Print the table of the best and the last evaluation, and write ``metrics.json``."""
        self.close()
        if self.writer is None:
            return
        self.writer.close()
        best = task.best(history)
        result = {
            "monitor": task.monitor,
            "best": best,
            "last": history[-1],
            "history": history,
            "skipped": skipped,
        }
        text = json.dumps(result, indent=2)
        write_atomically(self.output / "metrics.json", lambda file: file.write(text.encode()))
        print(f"\n{'':<24}{'best':>12}{'last':>12}")
        for name, last in history[-1].items():
            if name == "step":
                print(f"{name:<24}{best[name]:>12}{last:>12}")
            else:
                print(f"{name:<24}{best.get(name, math.nan):>12.4f}{last:>12.4f}")
        if skipped:
            print(f"\n{len(skipped)} broken samples were left out:")
            for failure in skipped[:LISTED]:
                print(f"  {failure}")
            if len(skipped) > LISTED:
                print(f"  and {len(skipped) - LISTED} more, see metrics.json")
        print(f"\nWritten to {self.output}: model.safetensors (the best), card.json, metrics.json")
