"""Pretraining of a language encoder: words that were masked are predicted from the others."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import MeanMetric
from transformers import PreTrainedTokenizerFast

from ..language import SIZES, SetformerConfig, SetformerForMaskedLM
from ..language.heads import IGNORED
from .options import add_model_options, number
from .parallel import from_main_process
from .task import EVAL_LOSS, Batch, DataError, Metrics, Task, TrainingError, listed
from .texts import SPECIAL, read_documents, text_files, train_tokenizer, wrap_tokenizer

CHOSEN, MASKED, RANDOM = 0.15, 0.8, 0.1  # BERT's shares: of the words; of those, the rest stay


class Packed(Dataset[tuple[Tensor, Tensor]]):
    """Documents one after the other, cut into sequences of one length, with words masked anew.

    Args:
        documents: their tokens, each [n] int32, to be joined by the separator.
        length: of every sequence L, with [CLS] in front and [SEP] at the end.
        tokenizer: knows the special tokens.
        chosen: share of the words that have to be predicted.

    A sample is the sequence [L] int64 with words masked, and what has to be predicted [L] int64,
    -100 elsewhere; drawn from torch's global generator.
    """

    def __init__(
        self,
        documents: list[np.ndarray],
        length: int,
        tokenizer: PreTrainedTokenizerFast,
        chosen: float = CHOSEN,
    ) -> None:
        self.length, self.chosen = length, chosen
        self.first, self.last = tokenizer.cls_token_id, tokenizer.sep_token_id
        self.mask, self.words = tokenizer.mask_token_id, len(tokenizer)
        self.reserved = len(SPECIAL)  # the first of the vocabulary are no words
        separator = np.array([self.last], dtype=np.int32)
        joined = [part for document in documents for part in (document, separator)]
        self.tokens = np.concatenate(joined) if joined else separator[:0]

    def __len__(self) -> int:
        return len(self.tokens) // (self.length - 2)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inside = self.length - 2
        piece = self.tokens[index * inside : (index + 1) * inside]
        tokens = torch.tensor([self.first, *piece.tolist(), self.last])
        labels = tokens.clone()
        chosen = (torch.rand(self.length) < self.chosen) & (tokens >= self.reserved)
        labels[~chosen] = IGNORED
        fate = torch.rand(self.length)
        tokens[chosen & (fate < MASKED)] = self.mask
        other = torch.randint(self.reserved, self.words, (self.length,))
        replaced = chosen & (fate >= MASKED) & (fate < MASKED + RANDOM)
        tokens[replaced] = other[replaced]
        return tokens, labels


class Prediction(Metrics):
    """The loss, the share of masked words that are the likeliest, and their perplexity."""

    def __init__(self) -> None:
        self.right = MeanMetric()
        self.loss = MeanMetric(nan_strategy=math.inf)  # rather than leave NaN out

    def update(self, model: nn.Module, batch: Batch) -> None:
        tokens, labels = batch
        answer = model(tokens, labels=labels)
        known = labels[labels != IGNORED]
        if len(known):
            self.right.update((answer.logits.argmax(-1) == known).float())
            self.loss.update(answer.loss, weight=len(known))

    def compute(self) -> dict[str, float]:
        loss = self.loss.compute().item()
        figures = {
            EVAL_LOSS: loss,
            "accuracy": self.right.compute().item(),
            "perplexity": math.exp(min(loss, 700.0)),  # what a float holds
        }
        self.right.reset()
        self.loss.reset()
        return figures


class Mlm(Task):
    """Text files with one document a line."""

    name = "mlm"
    monitor = EVAL_LOSS
    smaller_is_better = True
    defaults = {"batch_size": 64, "epochs": 10, "lr": 5e-4, "ema_decay": 0.0, "weight_decay": 0.01}
    train: Packed
    eval: Packed

    @staticmethod
    def add_options(parser: argparse._ArgumentGroup) -> None:
        parser.add_argument(
            "--data",
            type=Path,
            nargs="+",
            required=True,
            metavar="PATH",
            help="text files, or folders of *.txt, with one document a line",
        )
        parser.add_argument(
            "--eval-data",
            type=Path,
            nargs="+",
            metavar="PATH",
            help="the same to evaluate on (default: every hundredth document of --data)",
        )
        parser.add_argument(
            "--model", choices=tuple(SIZES), default="base", help="size (default: %(default)s)"
        )
        add_model_options(
            parser, "of SetformerConfig, such as num_references=64 or attention=softmax"
        )
        parser.add_argument(
            "--vocab-size",
            type=number(int, 100),
            default=30522,
            help="largest vocabulary of the tokenizer that is trained (default: %(default)s)",
        )
        parser.add_argument(
            "--cased", action="store_true", help="tell capital letters from small ones"
        )
        parser.add_argument(
            "--sequence-length",
            type=number(int, 8),
            default=128,
            metavar="N",
            help="documents are joined and cut into sequences of N (default: %(default)s)",
        )
        parser.add_argument(
            "--mask-share",
            type=number(float, 0.01, 0.9),
            default=CHOSEN,
            metavar="SHARE",
            help="of the words that have to be predicted (default: %(default)s)",
        )

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.problems: list[str] = []
        notes = self.problems if options.on_error == "skip" else None
        documents = read_documents(text_files(options.data), notes)
        if options.eval_data is not None:
            held_out = read_documents(text_files(options.eval_data), notes)
        else:
            held_out = documents[99::100]
            documents = [d for place, d in enumerate(documents) if place % 100 != 99]
        self.counts = len(documents), len(held_out)
        self.tokenizer = self._make_tokenizer(documents)
        self.train, self.eval = self._pack(documents), self._pack(held_out)
        for data, which in ((self.train, "train"), (self.eval, "evaluate")):
            if not len(data):
                raise DataError(
                    f"--data: {len(data.tokens)} tokens to {which} on, expected at least one "
                    f"sequence of {options.sequence_length}; give more text, --eval-data or a "
                    "smaller --sequence-length"
                )
        self.model_options = {
            **SIZES[options.model],
            **dict(options.model_options),
            "vocab_size": len(self.tokenizer),
            "pad_token_id": self.tokenizer.pad_token_id,
        }

        unknown = self.model_options.keys() - SetformerConfig().to_dict().keys()
        if unknown:
            raise TrainingError(
                f"--model-options: SetformerConfig has no {', '.join(sorted(unknown))}"
            )

    def _make_tokenizer(self, documents: list[str]) -> PreTrainedTokenizerFast:
        """The one that a training had which is resumed, or a new one, the same in all processes."""
        path = self.options.output / "tokenizer.json"

        def make() -> str:
            if self.options.resume and path.exists():
                return path.read_text()
            return train_tokenizer(documents, self.options.vocab_size, not self.options.cased)

        return wrap_tokenizer(from_main_process(make))

    def _pack(self, documents: list[str]) -> Packed:
        encodings = self.tokenizer.backend_tokenizer.encode_batch_fast(
            documents, add_special_tokens=False
        )
        tokens = [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        options = self.options
        return Packed(tokens, options.sequence_length, self.tokenizer, options.mask_share)

    def describe(self) -> str:
        text = (
            f"{self.counts[0]} documents to train on and {self.counts[1]} to evaluate on, "
            f"{len(self.train)} and {len(self.eval)} sequences of {self.options.sequence_length}; "
            f"a vocabulary of {len(self.tokenizer)}"
        )
        if self.problems:
            text += f"; {len(self.problems)} lines were left out: {listed(self.problems)}"
        return text

    def make_model(self) -> nn.Module:
        try:
            config = SetformerConfig(**self.model_options, sparse_prediction=True)
            return SetformerForMaskedLM(config)
        except (TypeError, ValueError, KeyError) as error:
            raise TrainingError(f"--model-options: {error}") from error

    def prepare(self, output: Path) -> None:
        SetformerConfig(
            **self.model_options, architectures=["SetformerForMaskedLM"]
        ).save_pretrained(output)
        self.tokenizer.save_pretrained(output)

    def collate(self, samples: list[Any]) -> Batch:
        tokens, labels = zip(*samples, strict=True)
        return torch.stack(tokens), torch.stack(labels)

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        tokens, labels = batch
        return {"cross_entropy": model(tokens, labels=labels).loss}

    def metrics(self) -> Metrics:
        return Prediction()

    def card(self) -> dict[str, Any]:
        return {"task": self.name, "model_options": self.model_options}
