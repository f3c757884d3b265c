"""A task of the selftest, and what came of it."""

import dataclasses
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .tolerance import Comparison


class SkippedError(Exception):
    """Raised by a task that this machine cannot run; the message says why."""


@dataclass(frozen=True)
class Timing:
    """Medians in milliseconds by competitor; a competitor that failed has none."""

    label: str  # shape, type and direction
    milliseconds: dict[str, float]


@dataclass(frozen=True)
class Result:
    """What a task returns."""

    comparisons: list[Comparison] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)


@dataclass(frozen=True)
class Task:
    """A check or a measurement under a name of its own."""

    name: str
    function: Callable[[torch.device], Result]


@dataclass(frozen=True)
class Outcome:
    """What came of a task."""

    name: str
    result: Result = Result()
    skipped: str = ""  # why
    error: str = ""  # the end of a traceback, or how the process ended
    seconds: float = 0.0

    @property
    def status(self) -> str:
        if self.skipped:
            return "skipped"
        return "FAILED" if self.error or self.failures else "ok"

    @property
    def failures(self) -> list[Comparison]:
        return [comparison for comparison in self.result.comparisons if not comparison.passed]

    @property
    def tightest(self) -> Comparison | None:
        """The comparison that failed by most, or came nearest to failing."""
        return max(self.result.comparisons, key=lambda comparison: comparison.share, default=None)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Outcome":
        result = Result(
            [Comparison(**x) for x in fields["result"]["comparisons"]],
            [Timing(**x) for x in fields["result"]["timings"]],
        )
        return cls(**fields | {"result": result})


def execute(task: Task, device: torch.device) -> Outcome:
    """Run the task; whatever it raises becomes part of the outcome."""
    start = time.perf_counter()
    result, skipped, error = Result(), "", ""
    try:
        result = task.function(device)
    except SkippedError as reason:
        skipped = str(reason)
    except Exception as exception:
        error = "".join(traceback.format_exception(exception, limit=-4)).rstrip()
    return Outcome(task.name, result, skipped, error, time.perf_counter() - start)
