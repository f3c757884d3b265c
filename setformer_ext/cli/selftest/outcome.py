"""A task of the selftest, and what came of it."""

import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .tolerance import Comparison

SMOKE, SPEED, CHECKS = SECTIONS = ("smoke", "speed", "checks")  # in the order they run in


class SkippedError(Exception):
    """Raised by a task that this machine cannot run; the message says why."""


@dataclass(frozen=True)
class Timing:
    """Medians in milliseconds by competitor; a competitor that failed has none."""

    label: str  # shape, type and direction
    milliseconds: dict[str, float]


Check = Callable[[torch.device], Iterable[Comparison | Timing]]


class Kernels(NamedTuple):
    """The kernels that a smoke check runs."""

    family: str  # resident, streaming, cluster or shares
    dtype: torch.dtype
    direction: str  # forward or backward

    def __str__(self) -> str:
        return f"{self.family}, {short(self.dtype)}, {self.direction}"


@dataclass(frozen=True)
class Task:
    """A check or a measurement under a name of its own."""

    name: str
    function: Check
    section: str = CHECKS
    smoke: Kernels | None = None  # the only kernels that it runs, if it is a smoke check
    needs: tuple[torch.dtype, ...] = ()  # types of set_attention that it needs
    backward: bool = True  # it needs backward too
    forward_only: Check | None = None  # what to run instead if backward does not work


@dataclass(frozen=True)
class Outcome:
    """What came of a task."""

    name: str
    comparisons: list[Comparison] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    skipped: str = ""  # why
    error: str = ""  # the end of a traceback, or how the process ended
    seconds: float = 0.0
    section: str = CHECKS
    not_run: str = ""  # why: what it needs has failed before
    note: str = ""  # what was left out of it, and why
    lost: bool = False  # the process is gone, or can no longer use the device

    @property
    def status(self) -> str:
        if self.not_run:
            return "not run"
        if self.skipped:
            return "skipped"
        return "FAILED" if self.error or self.failures else "ok"

    @property
    def passed(self) -> bool:
        return self.status in ("ok", "skipped")

    @property
    def failures(self) -> list[Comparison]:
        return [comparison for comparison in self.comparisons if not comparison.passed]

    @property
    def tightest(self) -> Comparison | None:
        """The comparison that failed by most, or came nearest to failing."""
        return max(self.comparisons, key=lambda comparison: comparison.share, default=None)


def short(dtype: torch.dtype) -> str:
    """The dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")


def execute(task: Task, device: torch.device, backward: bool = True) -> Outcome:
    """Run the task, or its forward only part.

    An error becomes part of the outcome, beside what the task had found before it. Waits for the
    device, so that no later task is blamed for this one's kernels.
    """
    start = time.perf_counter()
    found: list[Comparison | Timing] = []
    skipped = error = ""
    function = task.function if backward else task.forward_only
    assert function is not None
    try:
        found += function(device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except SkippedError as reason:
        skipped = str(reason)
    except Exception as exception:
        error = "".join(traceback.format_exception(exception, limit=-4)).rstrip()
    return Outcome(
        task.name,
        [x for x in found if isinstance(x, Comparison)],
        [x for x in found if isinstance(x, Timing)],
        skipped,
        error,
        time.perf_counter() - start,
        lost=bool(error) and not works(device),
    )


def works(device: torch.device) -> bool:
    """Whether the device still works: after some kernel errors all calls of the process fail."""
    try:
        return torch.ones(2, device=device).sum().item() == 2
    except RuntimeError:
        return False
