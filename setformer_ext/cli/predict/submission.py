"""GLUE's test files, and answers to them as gluebenchmark.com takes them."""

from __future__ import annotations

from collections.abc import Iterator
from operator import methodcaller
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...errors import UserError
from ..train.checkpoints import write_atomically
from ..train.glue_data import TASKS, GlueTask
from ..train.lines import numbered_lines
from ..train.task import DataError
from .loading import CARD, cards_explained, load_text_run, read_card
from .texts import TextClassifier, Texts

BATCH = 64
INDICES = ("index", "id")  # names of the column with a row's number
# MNLI's two files, and the diagnostic one, which is also for models of MNLI and not in every
# download.
MNLI = {
    "MNLI/test_matched.tsv": "MNLI-m.tsv",
    "MNLI/test_mismatched.tsv": "MNLI-mm.tsv",
    "diagnostic/diagnostic.tsv": "AX.tsv",
}


Question = tuple[str, Texts]  # a row of a test file: its number there, and its text or two


def answer_glue(training: Path, data: Path, output: Path) -> None:
    """Answer the test files of a training's task, or of all in the folder of several trainings.

    Args:
        training: the output folder of ``train glue``, of one task or several.
        data: GLUE's download.
        output: the files are written there, CoLA.tsv and so on.

    Raises:
        UserError: if the training or a test file cannot be used.
    """
    runs = [training]
    if not (training / CARD).exists():
        runs = sorted(path.parent for path in training.glob(f"*/{CARD}")) or runs
    # All files are read before answering, which may take hours.
    questions = {run: _read_files(_task(run), data) for run in runs}
    for run, of_files in questions.items():
        predictor: Any = load_text_run(run)
        for (source, name), rows in of_files.items():
            if rows is None:
                print(f"there is no {source}: {name} is left out")
                continue
            labels = _labels(predictor, rows, name)
            lines = [f"{row}\t{label}\n" for (row, _), label in zip(rows, labels, strict=True)]
            content = "".join(["index\tprediction\n", *lines]).encode()
            write_atomically(output / name, methodcaller("write", content))
            print(f"{source}: {len(rows)} rows answered\n  {output / name}")


def _task(run: Path) -> GlueTask:
    card = read_card(run)
    if card["task"] != "glue":
        raise UserError(
            f"{run}: a training of {card['task']}, expected one of glue to answer --data"
        )
    with cards_explained(run):
        return TASKS[card["glue_task"]]


def _read_files(task: GlueTask, data: Path) -> dict[tuple[Path, str], list[Question] | None]:
    """The rows of a task's test files, with the name of the answers to each file; None for a file
    that may be missing and is."""
    files = {f"{task.folder}/test.tsv": f"{task.folder}.tsv"}
    if task is TASKS["mnli"]:
        files = MNLI
    return {
        (data / source, name): (
            None
            if name == "AX.tsv" and not (data / source).exists()
            else read_questions(data / source, task)
        )
        for source, name in files.items()
    }


def _labels(predictor: TextClassifier, questions: list[Question], name: str) -> Iterator[str]:
    """For each row the name of the likeliest class, or the number, limited to 0 to 5."""
    for first in tqdm(range(0, len(questions), BATCH), desc=name, leave=False, disable=None):
        logits = predictor.logits([texts for _, texts in questions[first : first + BATCH]])
        if predictor.classes:
            yield from (predictor.classes[i] for i in logits.argmax(-1).tolist())
        else:
            yield from (f"{value:.4f}" for value in logits[:, 0].clamp(0, 5).tolist())


def read_questions(path: Path, task: GlueTask) -> list[Question]:
    """The rows of one of a task's test files, which all have a header.

    Texts may be empty, as some of QQP's are: the server wants an answer to every row.

    Raises:
        DataError: for a file that cannot be read or does not belong to the task, and for malformed
            rows.
    """
    if not path.is_file():
        raise DataError(f"--data: there is no {path}; expected GLUE's own download")
    lines = iter(numbered_lines(path, None))
    columns = next(lines, (0, ""))[1].split("\t")
    index = next((name for name in INDICES if name in columns), INDICES[0])
    missing = [name for name in (index, *task.texts) if name not in columns]
    if missing:
        raise DataError(
            f"{path}, line 1: expected the columns {', '.join((index, *task.texts))}, "
            f"got {', '.join(columns)[:120] or 'nothing'}"
        )
    questions = []
    for number, line in lines:
        cells = line.split("\t")
        if len(cells) == len(columns):
            row = dict(zip(columns, cells, strict=True))
            questions.append((row[index], tuple(row[name] for name in task.texts)))
        elif line:
            raise DataError(
                f"{path}, line {number}: expected {len(columns)} tab-separated columns, "
                f"got {len(cells)}"
            )
    if not questions:
        raise DataError(f"{path}: has no rows, expected at least one")
    return questions
