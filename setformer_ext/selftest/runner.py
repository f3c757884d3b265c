"""Runs the tasks, here or in a process of their own that may crash or hang."""

import json
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing
from typing import IO

import torch

from . import behaviour_checks, benchmark, cuda_checks, definition_checks
from .outcome import Outcome, Task, execute

# One task's, with starting Python, loading torch and compiling the PTX for a newer GPU.
SECONDS = 600
SECONDS_TO_END = 10  # of a process that has closed its stdout
MOST_LOST_PROCESSES = 5


def all_tasks(device: torch.device, quick: bool) -> list[Task]:
    """Every task for this device, the same list in every process."""
    return [
        *definition_checks.tasks(quick),
        *behaviour_checks.tasks(quick),
        *(cuda_checks.tasks() if device.type == "cuda" else []),
        *benchmark.tasks(device, quick),
    ]


def run_here(device: torch.device, quick: bool) -> Iterator[Outcome]:
    """In this process."""
    for task in all_tasks(device, quick):
        yield execute(task, device)


def run_apart(device: torch.device, quick: bool) -> Iterator[Outcome]:
    """In a process that is replaced when it crashes, hangs or has lost the GPU."""
    names = [task.name for task in all_tasks(device, quick)]
    lost = position = 0
    while position < len(names):
        if lost == MOST_LOST_PROCESSES:
            error = f"not run: {lost} processes were lost before"
            yield from (Outcome(name, error=error) for name in names[position:])
            return
        start = position
        with closing(_Worker(device, quick, start)) as worker:
            while position < len(names):
                outcome = worker.next_outcome()
                if outcome is None and position > start and worker.status() == 0:
                    break  # it ended because it lost the GPU, after telling of that task
                if outcome is None:
                    lost += 1
                    yield Outcome(names[position], error=worker.how_it_was_lost())
                    position += 1
                    break
                yield outcome
                position += 1


def _command(device: torch.device, quick: bool, start: int) -> list[str]:
    # with this process's path: a source folder that one happens to be in is not this package
    code = (
        f"import sys; sys.path = {sys.path!r}; "
        f"from {__name__} import work; work({str(device)!r}, {quick!r}, {start!r})"
    )
    return [sys.executable, "-c", code]


class _Worker:
    """`work` below in a process of its own, with what it writes to stderr kept."""

    def __init__(self, device: torch.device, quick: bool, start: int) -> None:
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            _command(device, quick, start),
            stdout=subprocess.PIPE,
            stderr=self.errors,
            encoding="utf-8",
            errors="replace",
        )
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True).start()

    def _read(self, stdout: IO[str]) -> None:
        for line in stdout:
            if line.startswith(MARK):
                self.lines.put(line.removeprefix(MARK))
        self.lines.put("")

    def next_outcome(self) -> Outcome | None:
        """The next task's outcome; None if the process was lost over it."""
        try:
            line = self.lines.get(timeout=SECONDS)
        except queue.Empty:
            return None
        return Outcome.from_json(json.loads(line)) if line else None

    def status(self) -> int | None:
        """What the process ended with; None if it still runs."""
        try:
            return self.process.wait(timeout=SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            return None

    def how_it_was_lost(self) -> str:
        """Its status, or that it hung, and the end of what it wrote to stderr."""
        status = self.status()
        how = f"no result within {SECONDS} s"
        if status is not None:
            how = f"the process ended with status {status}"
        self.errors.seek(0)
        wrote = self.errors.read()[-2000:].strip()
        return f"{how}; it wrote:\n{wrote}" if wrote else how

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.errors.close()


MARK = "setformer_ext selftest: "  # before each outcome, for others may write to stdout too


def work(name: str, quick: bool, start: int) -> None:
    """The tasks from `start` on, each outcome a line of stdout, until the device is lost."""
    device = torch.device(name)
    for task in all_tasks(device, quick)[start:]:
        outcome = execute(task, device)
        print(MARK + json.dumps(outcome.to_json()), flush=True)
        if outcome.error and not _works(device):
            return


def _works(device: torch.device) -> bool:
    """After some errors of a kernel every call fails until the process ends."""
    try:
        return torch.ones(2, device=device).sum().item() == 2
    except RuntimeError:
        return False
