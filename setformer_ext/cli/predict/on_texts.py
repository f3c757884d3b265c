"""Answers about texts from the command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from .loading import load_text_run


def answer_texts(training: Path, given: list[list[str]]) -> tuple[list[dict[str, Any]], str]:
    """Print the answers; returns them in JSON's types, and what could not be answered.

    Args:
        training: a training's output folder.
        given: texts, in lists of one, or of two for a task about pairs.

    Raises:
        RunError: if the training is none of texts, or one of the texts cannot be answered.
    """
    predictor = load_text_run(training)
    remarks = [predictor.check(tuple(texts)) for texts in given]
    found = []
    for texts, remark in zip(given, remarks, strict=True):
        (answer,) = predictor([tuple(texts)])
        print(f"{' | '.join(texts)}: {answer.text()}")
        if remark:
            print(f"setformer predict: {texts[0]!r}: {remark}", file=sys.stderr)
        names = ("text",) if len(texts) == 1 else ("text1", "text2")
        found.append({**dict(zip(names, texts, strict=True)), **answer.json()})
    return found, ""
