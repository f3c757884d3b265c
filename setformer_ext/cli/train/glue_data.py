"""The nine tasks of GLUE and the tab-separated files of its download.

Wang et al., GLUE, ICLR 2019. Every task has a folder of its own. Quotes in its files have no
meaning, and the columns of texts and labels differ between tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ...errors import first_line
from .lines import numbered_lines, refuse
from .task import DataError

COLA_COLUMNS = ("source", "label", "star", "sentence")  # its files have no header


@dataclass(frozen=True)
class GlueTask:
    """The contents of a task's files, and its metrics.

    Args:
        folder: its name in the download.
        texts: columns of the sentence, or of the two.
        label: column of the label.
        classes: the possible labels; empty if the label is a number, from 0 to 5.
        metrics: names in ``glue.METRICS``; the task's score is their mean.
        columns: of files without a header.
        dev: files to evaluate on, by the part of the name that tells them apart.
    """

    folder: str
    texts: tuple[str, ...]
    label: str = "label"
    classes: tuple[str, ...] = ("0", "1")
    metrics: tuple[str, ...] = ("accuracy",)
    columns: tuple[str, ...] | None = None
    dev: dict[str, str] = field(default_factory=lambda: {"": "dev.tsv"})


ENTAILMENT = ("not_entailment", "entailment")
TASKS: dict[str, GlueTask] = {
    "cola": GlueTask("CoLA", ("sentence",), metrics=("matthews",), columns=COLA_COLUMNS),
    "sst2": GlueTask("SST-2", ("sentence",)),
    "mrpc": GlueTask("MRPC", ("#1 String", "#2 String"), "Quality", metrics=("accuracy", "f1")),
    "stsb": GlueTask(
        "STS-B", ("sentence1", "sentence2"), "score", (), metrics=("pearson", "spearman")
    ),
    "qqp": GlueTask("QQP", ("question1", "question2"), "is_duplicate", metrics=("accuracy", "f1")),
    "mnli": GlueTask(
        "MNLI",
        ("sentence1", "sentence2"),
        "gold_label",
        ("contradiction", "neutral", "entailment"),
        dev={"matched": "dev_matched.tsv", "mismatched": "dev_mismatched.tsv"},
    ),
    "qnli": GlueTask("QNLI", ("question", "sentence"), classes=ENTAILMENT),
    "rte": GlueTask("RTE", ("sentence1", "sentence2"), classes=ENTAILMENT),
    "wnli": GlueTask("WNLI", ("sentence1", "sentence2")),
}


class Example(NamedTuple):
    """A sentence or two, with the class or number, and the part that it belongs to."""

    texts: tuple[str, ...]
    label: float
    part: str = ""


def read_task(
    data: Path, task: GlueTask, problems: list[str] | None = None
) -> tuple[list[Example], list[Example]]:
    """A task's rows to train and to evaluate on; arguments and errors as in read_examples.

    Args:
        data: the download.
    """
    train = read_examples(data / task.folder / "train.tsv", task, problems=problems)
    return train, read_dev(data, task, problems)


def read_dev(data: Path, task: GlueTask, problems: list[str] | None = None) -> list[Example]:
    """A task's rows to evaluate on; arguments and errors as in read_task."""
    folder = data / task.folder
    parts = (read_examples(folder / name, task, part, problems) for part, name in task.dev.items())
    return [example for part in parts for example in part]


def read_examples(
    path: Path, task: GlueTask, part: str = "", problems: list[str] | None = None
) -> list[Example]:
    """The rows of one of a task's files.

    Args:
        path: the file.
        task: describes the contents.
        part: kept with every example.
        problems: collects what is wrong with rows that are left out; None to raise it instead.

    Raises:
        DataError: for a file that cannot be read or does not belong to the task, and for malformed
            rows, with file, line, what was expected and what was found.
    """
    if not path.is_file():
        raise DataError(
            f"--data: there is no {path}; expected GLUE's own download, with {task.folder}/"
            f"train.tsv and {', '.join(f'{task.folder}/{name}' for name in task.dev.values())}"
        )
    lines = iter(numbered_lines(path, problems))
    columns = task.columns
    if columns is None:
        columns = tuple(next(lines, (0, ""))[1].split("\t"))
        missing = [name for name in (*task.texts, task.label) if name not in columns]
        if missing:
            raise DataError(
                f"{path}, line 1: expected the columns {', '.join((*task.texts, task.label))}, "
                f"got {', '.join(columns)[:120] or 'nothing'}"
            )
    examples = []
    for number, line in lines:
        if line:
            try:
                examples.append(_read_row(line.split("\t"), columns, task, part))
            except ValueError as error:
                refuse(f"{path}, line {number}: {first_line(error)}", problems)
    if not examples:
        raise DataError(f"{path}: no row that can be used, expected at least one")
    return examples


def _read_row(cells: list[str], columns: Sequence[str], task: GlueTask, part: str) -> Example:
    """The example of a row; raises a ValueError that says what is wrong with a bad row."""
    if len(cells) != len(columns):
        raise ValueError(f"expected {len(columns)} tab-separated columns, got {len(cells)}")
    texts = tuple(cells[columns.index(name)] for name in task.texts)
    for name, text in zip(task.texts, texts, strict=True):
        if not text.strip():
            raise ValueError(f"{name}: expected a text, got nothing")
    label = cells[columns.index(task.label)]
    if task.classes:
        if label not in task.classes:
            known = ", ".join(task.classes)
            raise ValueError(f"{task.label}: expected one of {known}, got {label!r}")
        return Example(texts, float(task.classes.index(label)), part)
    try:
        value = float(label)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 5:
        raise ValueError(f"{task.label}: expected a number from 0 to 5, got {label!r}")
    return Example(texts, value, part)
