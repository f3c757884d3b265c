"""What was run, and the file that keeps it: JSON lines, an object a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("runs.jsonl")


@dataclass(frozen=True)
class Plan:
    """What a run is to be."""

    task: str
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
    milliseconds: float  # a step, median
    mebibytes: float  # peak of memory in training, beyond data and weights


def load(file: Path = FILE) -> list[Run]:
    """The runs on record."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [_from_json(json.loads(line)) for line in lines]


def append(run: Run, file: Path = FILE) -> None:
    """Add a run to the record."""
    fields = asdict(run)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(fields.pop("plan") | fields) + "\n")


def _from_json(fields: dict[str, Any]) -> Run:
    plan = {name: fields.pop(name) for name in Plan.__dataclass_fields__}
    return Run(Plan(**plan), **fields)
