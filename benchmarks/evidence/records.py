"""What was run, and the file that keeps it: JSON lines, an object a run."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("runs.jsonl")


@dataclass(frozen=True)
class Plan:
    """What a run is to be."""

    task: str
    recipe: str  # of the task, when it was run: an earlier one's runs are no longer the task's
    mixer: str
    learning_rate: float
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)  # all of SetAttention's; of none else
    study: bool = False  # to choose options by, so without a look at the test data


@dataclass(frozen=True)
class Run:
    """What came of it."""

    plan: Plan
    steps: int
    parameters: int
    loss: float  # mean over the last steps
    validation: float  # accuracy
    test: float | None  # accuracy; of no study
    milliseconds: float  # a step, median, beside whatever else ran
    mebibytes: float  # that a step needs at most, beyond data and weights


def load(file: Path = FILE) -> list[Run]:
    """The runs on record."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [_from_json(json.loads(line)) for line in lines]


def append(run: Run, file: Path = FILE) -> None:
    """Add a run to the record."""
    fields = asdict(run)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(fields.pop("plan") | fields) + "\n")


@contextmanager
def held(file: Path = FILE) -> Iterator[None]:
    """Keep other commands from running what this one runs.

    Raises:
        BlockingIOError: if another one does.
    """
    with file.open("a", encoding="utf-8") as lines:
        try:
            fcntl.flock(lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(f"another command runs what {file} lacks; let it end") from error
        yield


def _from_json(fields: dict[str, Any]) -> Run:
    plan = {name: fields.pop(name) for name in Plan.__dataclass_fields__}
    return Run(Plan(**plan), **fields)
