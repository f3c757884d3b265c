"""Fine-tuning of a language encoder on the tasks of GLUE."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.functional.classification import (
    binary_f1_score,
    binary_matthews_corrcoef,
)
from torchmetrics.functional.regression import pearson_corrcoef, spearman_corrcoef
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from ... import language
from ...language.saved import (
    SavedError,
    load_model,
    load_saved,
    load_tokenizer,
    require_embeddings,
)
from .glue_data import TASKS, Example, GlueTask, read_task
from .options import add_keys_and_values, add_option, number
from .task import EVAL_LOSS, Batch, DataError, Metrics, Task, TrainingError, blaming, listed


def _accuracy(answers: Tensor, labels: Tensor) -> Tensor:
    return (answers == labels).float().mean()


METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # answers and labels [K]
    "accuracy": _accuracy,
    "f1": binary_f1_score,
    "matthews": binary_matthews_corrcoef,
    "pearson": pearson_corrcoef,
    "spearman": spearman_corrcoef,
}


class Scores(Metrics):
    """The loss, the task's metrics on each of its files, and their mean, its score in GLUE."""

    def __init__(self, task: GlueTask) -> None:
        self.task = task
        self.loss = MeanMetric(nan_strategy=math.inf)  # rather than leave NaN out
        self.rows: list[tuple[str, float, float]] = []  # file, answer, label

    def update(self, model: nn.Module, batch: Batch) -> None:
        inputs, labels, parts = batch
        logits = model(**inputs).logits.float()
        if self.task.classes:
            loss = F.cross_entropy(logits, labels.long())
        else:
            loss = F.mse_loss(logits[:, 0], labels.float())
        self.loss.update(loss, weight=len(labels))
        answers = logits.argmax(-1) if self.task.classes else logits[:, 0]
        self.rows += zip(parts, answers.tolist(), labels.tolist(), strict=True)

    def compute(self) -> dict[str, float]:
        figures = {}
        rows = gather_object(self.rows)
        for part in self.task.dev:
            pairs = [(answer, label) for where, answer, label in rows if where == part]
            answers, labels = torch.tensor(pairs, dtype=torch.float32).T
            for name in self.task.metrics:
                kind = labels.dtype if not self.task.classes else torch.int64
                value = METRICS[name](answers.to(kind), labels.to(kind)).item()
                figures[f"{name}_{part}" if part else name] = value
        score = sum(figures.values()) / len(figures)
        return {EVAL_LOSS: self.loss.compute().item(), "score": score, **figures}


class Glue(Task):
    """``DATA/CoLA/train.tsv`` and so on, as GLUE is downloaded."""

    name = "glue"
    monitor = "score"
    defaults = {"batch_size": 32, "epochs": 3, "lr": 2e-5, "ema_decay": 0.0, "weight_decay": 0.01}
    train: list[Example]
    eval: list[Example]

    @staticmethod
    def add_options(parser: argparse._ArgumentGroup) -> None:
        add = partial(add_option, parser)
        add(
            "--task",
            help="which of GLUE's tasks; of several, or all, each is trained into a folder of its "
            "own in --output, and the average printed",
            dest="glue_task",
            nargs="+",
            choices=(*TASKS, "all"),
            required=True,
        )
        download = "GLUE's download: holds CoLA/, SST-2/, MRPC/ and so on"
        add("--data DIR", Path, help=download, required=True)
        add(
            "--model DIR",
            help="folder of a pretrained encoder: what train mlm wrote, or any model of "
            "transformers that classifies sequences, with its tokenizer",
            required=True,
        )
        purpose = "of the model's configuration, such as hidden_dropout_prob=0.2"
        add_keys_and_values(parser, "--model-options", purpose)
        switch = "set_attention puts SeT attention into a model of transformers"
        add("--attention-implementation NAME", help=switch)
        add("--sequence-length N", number(int, 8), 128, "longer texts are cut")

    @staticmethod
    def split(options: argparse.Namespace) -> list[argparse.Namespace]:
        own, given = vars(options), options.glue_task
        chosen = list(TASKS) if "all" in given else list(dict.fromkeys(given))
        if len(chosen) == 1:
            return [argparse.Namespace(**own | {"glue_task": chosen[0]})]
        _tokenizer_and_configuration(options, TASKS[chosen[0]])
        _require_readable(options, chosen)  # before hours of training on the first task
        return [
            argparse.Namespace(**own | {"glue_task": name, "output": options.output / name})
            for name in chosen
        ]

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.glue = TASKS[options.glue_task]
        self.tokenizer, self.config = _tokenizer_and_configuration(options, self.glue)
        self.collate = partial(
            make_batch, tokenizer=self.tokenizer, task=self.glue, length=options.sequence_length
        )
        self.problems: list[str] = []
        notes = self.problems if options.on_error == "skip" else None
        self.train, self.eval = read_task(options.data, self.glue, notes)

    def describe(self) -> str:
        what = f"{len(self.glue.classes)} classes" if self.glue.classes else "a number"
        text = (
            f"{self.glue.folder}: {len(self.train)} rows to train on, {len(self.eval)} to "
            f"evaluate on; {what} for {'two texts' if len(self.glue.texts) > 1 else 'a text'}"
        )
        if self.problems:
            text += f"; {len(self.problems)} rows were left out: {listed(self.problems)}"
        return text

    def make_model(self) -> nn.Module:
        logging.disable_progress_bar()  # for weights, which are read in no time
        with blaming("--model", SavedError):
            model = load_model(
                AutoModelForSequenceClassification.from_pretrained,
                Path(self.options.model),
                "classifier",  # perhaps that of another task
                config=self.config,
                attn_implementation=self.options.attention_implementation,
            )
        self.config = model.config  # with the options of references, if it has them
        self.config.architectures = [type(model).__name__]
        return model

    def prepare(self, output: Path) -> None:
        self.config.save_pretrained(output)
        self.tokenizer.save_pretrained(output)

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        inputs, labels, _ = batch
        return {"loss": model(**inputs, labels=labels).loss}

    def metrics(self) -> Metrics:
        return Scores(self.glue)

    def card(self) -> dict[str, Any]:
        return {
            "task": self.name,
            "glue_task": self.options.glue_task,
            "classes": list(self.glue.classes),
            "sequence_length": self.options.sequence_length,
            "attention_implementation": self.options.attention_implementation,
        }


def make_batch(
    samples: list[Example], tokenizer: PreTrainedTokenizerFast, task: GlueTask, length: int
) -> Batch:
    """The model's inputs, [B, N] each, labels [B] and the names of the files."""
    kind = torch.int64 if task.classes else torch.float32
    labels = torch.tensor([sample.label for sample in samples], dtype=kind)
    inputs = encode(tokenizer, [sample.texts for sample in samples], length)
    return inputs, labels, [sample.part for sample in samples]


def encode(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[tuple[str, ...]], length: int
) -> dict[str, Tensor]:
    """The model's inputs, [B, N] each, of single texts or of pairs, cut to a length of tokens."""
    columns = map(list, zip(*texts, strict=True))
    return dict(
        tokenizer(*columns, truncation=True, max_length=length, padding=True, return_tensors="pt")
    )


def _tokenizer_and_configuration(
    options: argparse.Namespace, glue: GlueTask
) -> tuple[PreTrainedTokenizerFast, PreTrainedConfig]:
    """Tokenizer and configuration of ``--model``, with its options, for a task's classes."""
    language.register()
    folder, given = Path(options.model), dict(options.model_options)
    references = given.pop("set_attention", {})  # no configuration's class knows these options
    if not isinstance(references, dict):
        raise TrainingError(
            "--model-options: set_attention must be a mapping such as {'num_references': 64}, "
            f"got {references!r}"
        )
    where = (
        "--model: expected a folder with a model and a tokenizer of transformers, such as the "
        "--output of train mlm"
    )
    with blaming(where, SavedError):
        tokenizer = load_tokenizer(folder)
        config, unknown = load_saved(
            AutoConfig.from_pretrained,
            folder,
            num_labels=max(1, len(glue.classes)),
            problem_type=None if glue.classes else "regression",
            return_unused_kwargs=True,
            **given,
        )
        require_embeddings(tokenizer, config, folder)
    if references:
        config.set_attention = (getattr(config, "set_attention", None) or {}) | references
    if glue.classes:
        config.id2label = dict(enumerate(glue.classes))
        config.label2id = {name: i for i, name in enumerate(glue.classes)}
    if unknown:
        raise TrainingError(f"--model-options: {type(config).__name__} has no {', '.join(unknown)}")
    return tokenizer, config


def _require_readable(options: argparse.Namespace, chosen: list[str]) -> None:
    """Read all files of these tasks, and report everything that cannot be used."""
    wrong = []
    for name in chosen:
        try:
            read_task(options.data, TASKS[name], [] if options.on_error == "skip" else None)
        except DataError as error:
            wrong.append(str(error))
    if wrong:
        raise DataError(listed(wrong))
