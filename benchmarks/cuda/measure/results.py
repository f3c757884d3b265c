"""How a step's process tells its results: marked lines of its output, each written at once."""

import json
import math
from pathlib import Path
from typing import Any

MARK = "measure: "  # others write to the same output


def tell(kind: str, **values: Any) -> None:
    """One result; what is no number becomes None, as JSON has no such numbers."""
    known = {name: _finite(value) for name, value in values.items()}
    print(MARK + json.dumps({"kind": kind, **known}), flush=True)


def read(line: str) -> dict[str, Any] | None:
    """The result of a line; None where it tells none, or is damaged."""
    if not line.startswith(MARK):
        return None
    try:
        result = json.loads(line.removeprefix(MARK))
    except ValueError:
        return None
    if not isinstance(result, dict) or not isinstance(result.get("kind"), str):
        return None
    return result if isinstance(result.get("item", 0), int) else None


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def found(kind: str) -> list[dict[str, Any]]:
    """The results of a kind that earlier steps told; none where there is no report yet.

    Steps run in the folder of the report.
    """
    try:
        steps = json.loads(Path("report.json").read_text(encoding="utf-8"))["steps"]
    except (OSError, ValueError):
        return []
    return [result for step in steps for result in step["results"] if result["kind"] == kind]


def fact(name: str) -> Any:
    """What the step `machine` found under this name, or None."""
    values = [result["value"] for result in found("fact") if result["name"] == name]
    return values[-1] if values else None
