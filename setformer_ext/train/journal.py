"""What a training tells: progress, TensorBoard's logs and the final table."""

from __future__ import annotations

import json
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from .checkpoints import CheckpointError, write_atomically

LISTED = 20  # broken samples named on the screen; metrics.json has them all


class Journal:
    """Tells what happens; only the main process speaks.

    Args:
        output: the training's folder; TensorBoard's logs go to ``logs`` in it.
        speaks: whether this is the main process.
        step: steps taken before; what was logged after them is forgotten.
        steps: of the whole training.
    """

    def __init__(self, output: Path, speaks: bool, step: int, steps: int) -> None:
        self.output, self.speaks = output, speaks
        self.bar = tqdm(
            total=steps, initial=step, unit="step", disable=None if speaks else True, leave=False
        )
        self.logs = output / "logs"
        self.writer = SummaryWriter(str(self.logs), purge_step=step + 1) if speaks else None

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self.speaks:
            self.bar.write(text)

    def step(self, step: int, loss: float | None, lr: float) -> None:
        """A step was taken; its loss is not always known."""
        self.bar.update()
        if loss is not None:
            self.bar.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.1e}", refresh=False)
            self._log({"step/loss": loss, "step/lr": lr}, step)

    def evaluation(self, entry: dict[str, float], steps: int) -> None:
        """Print and log an evaluation: its step, mean losses and metrics."""
        figures = {name: value for name, value in entry.items() if name != "step"}
        step = int(entry["step"])
        # Figures of single classes, "IoU/sky", may be hundreds: they go to the table at the end.
        short = (f"{name} {value:.4f}" for name, value in figures.items() if "/" not in name)
        self.say(f"step {step}/{steps}  " + "  ".join(short))
        self._log({f"evaluation/{name}": value for name, value in figures.items()}, step)

    def _log(self, figures: dict[str, float], step: int) -> None:
        if self.writer is None:
            return
        try:
            for name, value in figures.items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()  # so that what cannot be written is known here
        except OSError as error:
            raise CheckpointError.of_writing(self.logs, error) from error

    def finish(self, history: list[dict[str, float]], monitor: str, skipped: list[str]) -> None:
        """Print the table of the best and the last evaluation, and write ``metrics.json``."""
        self.bar.close()
        if self.writer is None:
            return
        self.writer.close()
        best = max(history, key=lambda entry: (entry[monitor] == entry[monitor], entry[monitor]))
        result = {
            "monitor": monitor,
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
                print(f"{name:<24}{best[name]:>12.4f}{last:>12.4f}")
        if skipped:
            print(f"\n{len(skipped)} broken samples were left out:")
            for failure in skipped[:LISTED]:
                print(f"  {failure}")
            if len(skipped) > LISTED:
                print(f"  and {len(skipped) - LISTED} more, see metrics.json")
        print(f"\nWritten to {self.output}: model.safetensors (the best), card.json, metrics.json")
