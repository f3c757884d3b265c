"""Runs the tasks, here or in a process of their own that may crash or hang."""

import math
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from dataclasses import replace

import torch

from .outcome import SECTIONS, SMOKE, Kernels, Outcome, Task, execute, short
from .tasks import SECONDS, all_tasks, deadline
from .worker import LostError, Worker

# The remaining tasks are given up when lost processes have cost MOST_LOST_SECONDS in all, or when
# one process was lost and nothing has passed within MOST_SECONDS_WITHOUT_SUCCESS of the start of
# the first task. (A task that has already begun then gets SECONDS_OF_LAST_CHANCE more.) If every
# kernel hangs, these limits and those of processes.py, worker.py and report.py add up to less than
# 60 s, which a test checks.
MOST_LOST_SECONDS = 180
MOST_SECONDS_WITHOUT_SUCCESS = 15
SECONDS_OF_LAST_CHANCE = 5

# Runs a task, with backward or forward only, within a number of seconds.
Do = Callable[[Task, bool, float], Outcome]


def run_here(
    device: torch.device, quick: bool, sections: Collection[str] = SECTIONS
) -> Iterator[Outcome]:
    """Run the tasks in this process, which can do nothing more once it has lost the GPU."""
    lost = False

    def do(task: Task, backward: bool, most: float) -> Outcome:
        nonlocal lost
        if lost:
            return Outcome(task.name, not_run=f"this process has lost {device}")
        outcome = execute(task, device, backward)
        lost = outcome.lost
        return outcome

    yield from run_tasks(all_tasks(device, quick, sections), do)


def run_apart(
    device: torch.device, quick: bool, sections: Collection[str] = SECTIONS
) -> Iterator[Outcome]:
    """Run the tasks in a process that is replaced when it crashes, hangs or has lost the GPU."""
    with closing(Workers(device, quick)) as workers:
        yield from run_tasks(all_tasks(device, quick, sections), workers.do)


def run_tasks(tasks: list[Task], do: Do) -> Iterator[Outcome]:
    """The outcome of each task; for a task that can only fail, why it was not run."""
    experience = Experience()
    for task in tasks:
        reason, note = experience.why_not(task), ""
        if reason:
            outcome = Outcome(task.name, not_run=reason)
        else:
            broken = experience.broken(task, "backward") if task.backward else ""
            outcome = do(task, not broken, experience.seconds_left())
            note = f"forward only: {broken}" if broken else ""
        outcome = replace(outcome, section=task.section, note=note)
        experience.learn(task, outcome)
        yield outcome


class Experience:
    """What the outcomes so far say about the remaining tasks."""

    def __init__(self) -> None:
        self._began: float | None = None  # when the first task began, after its process had started
        self._raised: dict[Kernels, bool] = {}  # False: returned numbers, right or wrong
        self._lost, self._lost_seconds, self._any_passed = 0, 0.0, False
        self._gave_up = ""

    def learn(self, task: Task, outcome: Outcome) -> None:
        """Take in one outcome."""
        now = time.monotonic()
        if self._began is None:
            self._began = now - outcome.seconds
        if task.smoke is not None:
            self._raised[task.smoke] = bool(outcome.error or outcome.not_run)
        self._any_passed |= outcome.status == "ok"
        if not outcome.lost:
            return
        self._lost += 1
        self._lost_seconds += outcome.seconds
        since = now - self._began
        if not self._any_passed and since > MOST_SECONDS_WITHOUT_SUCCESS:
            self._gave_up = f"nothing passed in {since:.0f} s"
        elif self._lost_seconds > MOST_LOST_SECONDS:
            self._gave_up = f"{self._lost} processes and {self._lost_seconds:.0f} s were lost"

    def seconds_left(self) -> float:
        """Seconds until the remaining tasks are given up."""
        if self._began is None or not self._lost or self._any_passed:
            return math.inf
        end = self._began + MOST_SECONDS_WITHOUT_SUCCESS + SECONDS_OF_LAST_CHANCE
        return end - time.monotonic()

    def why_not(self, task: Task) -> str:
        """Why the task can only fail; empty if it may pass."""
        if self._gave_up:
            return self._gave_up
        if task.smoke is not None and task.smoke.direction == "backward":
            forward = task.smoke._replace(direction="forward")
            return "its forward failed" if self._raised.get(forward) else ""
        reason = self.broken(task, "forward")
        if not reason and task.backward and task.forward_only is None:
            reason = self.broken(task, "backward")
        return reason

    def broken(self, task: Task, direction: str) -> str:
        """Says that all smoke checks in this direction failed for a type that the task needs."""
        for dtype in task.needs:
            raised = [x for kernels, x in self._raised.items() if kernels[1:] == (dtype, direction)]
            if raised and all(raised):
                return f"all smoke checks of {short(dtype)}, {direction} failed"
        return ""


class Workers:
    """Runs tasks in another process, and has a second one start up, in case the first is lost."""

    def __init__(self, device: torch.device, quick: bool) -> None:
        self._device, self._quick = device, quick
        self._current: Worker | None = None
        self._next: Worker | None = None
        self._blocking = False
        self._slowness = 0.0  # of the first process; later ones are started in advance
        self._why_none = ""

    def do(self, task: Task, backward: bool, most: float) -> Outcome:
        """Run a task; there is an outcome whatever happens to the process."""
        if self._why_none:
            return Outcome(task.name, not_run=self._why_none)
        limit = deadline(task.section, self._device)
        if limit > SECONDS[task.section]:
            most = math.inf  # kernels must be compiled first, or this is a CPU
        end = time.monotonic() + most
        blocking = self._device.type == "cuda" and task.section == SMOKE
        if self._current is not None and blocking != self._blocking:
            self._drop()
        try:
            worker = self._current or self._start(blocking, most)
        except LostError as how:
            self._why_none = f"no process could take {self._device}"
            self._drop()
            return Outcome(task.name, error=f"{self._why_none}: {how}", lost=True)
        start = time.monotonic()
        seconds = min(limit * self._slowness, end - start)
        outcome: Outcome
        try:
            outcome = worker.ask((task.name, backward), seconds)
        except LostError as how:
            outcome = Outcome(task.name, error=str(how), lost=True)
        if outcome.lost:
            self._drop()
            outcome = replace(outcome, seconds=time.monotonic() - start)
        return outcome

    def _start(self, blocking: bool, most: float) -> Worker:
        self._current = worker = self._next or Worker(self._device, self._quick)
        self._blocking, self._next = blocking, None
        worker.take_device(blocking, most)
        self._slowness = self._slowness or worker.slowness
        self._next = Worker(self._device, self._quick)
        return worker

    def _drop(self) -> None:
        if self._current is not None:
            self._current.close()
        self._current = None

    def close(self) -> None:
        """End both processes."""
        self._drop()
        if self._next is not None:
            self._next.close()
