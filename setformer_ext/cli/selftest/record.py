"""The report as JSON, written anew after every task: a run that is cut short still tells."""

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .outcome import Outcome


def path_beside(text: Path) -> Path:
    """report.json for report.txt.

    Raises: ValueError where the text itself has that name.
    """
    path = text.with_suffix(".json")
    if path == text:
        raise ValueError(
            f"--output must be the text's name, beside which the JSON is written, got {text}: "
            f"try {text.with_suffix('.txt')}"
        )
    return path


class Record:
    """The facts as given, every outcome with every comparison and time, the suite, the verdict.

    Numbers that JSON has no word for are the strings nan, inf and -inf.
    """

    def __init__(self, path: Path | None, **facts: Any) -> None:
        self._path = path
        self._fields: dict[str, Any] = facts | {"finished": False, "tasks": []}
        self._write()

    def add(self, outcome: Outcome) -> None:
        """Another outcome."""
        fields = asdict(outcome) | {"status": outcome.status}
        for comparison, x in zip(fields["comparisons"], outcome.comparisons, strict=True):
            comparison["passed"] = x.passed
        self._fields["tasks"].append(fields)
        self._write()

    def set(self, **fields: Any) -> None:
        """More fields beside the tasks."""
        self._fields |= fields
        self._write()

    def _write(self) -> None:
        """Under another name first: whoever reads finds all of it."""
        if self._path is None:
            return
        part = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        part.write_text(json.dumps(_speakable(self._fields), indent=1), encoding="utf-8")
        part.replace(self._path)


def _speakable(x: Any) -> Any:
    if isinstance(x, dict):
        return {key: _speakable(value) for key, value in x.items()}
    if isinstance(x, list):
        return [_speakable(value) for value in x]
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x
