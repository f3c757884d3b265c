"""Answers as files that other programs read."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

CORNERS = ("x0", "y0", "x1", "y1")


def as_json(answers: list[dict[str, Any]]) -> str:
    """A list with one object for each image or text."""
    return json.dumps(answers, indent=1, ensure_ascii=False) + "\n"


def as_csv(answers: list[dict[str, Any]]) -> str:
    """A table with a row for each class, object or word of an answer, one at least."""
    rows = [row for answer in answers for row in _rows(answer)]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue()


def _rows(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """What is said of the whole, repeated before each of its parts; coordinates one by one."""
    whole = {name: value for name, value in answer.items() if not isinstance(value, list | dict)}
    parts = [part for value in answer.values() if isinstance(value, list) for part in value]
    rows = []
    for part in parts or [{}]:
        flat = {name: value for name, value in part.items() if name not in ("box", "segmentation")}
        corners = zip(CORNERS, part.get("box", ()), strict=False)
        rows.append({**whole, **flat, **dict(corners)})
    return rows
