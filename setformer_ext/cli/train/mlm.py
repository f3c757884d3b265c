"""Pretraining of a language encoder: masked words are predicted from the others."""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate
from torchmetrics import MeanMetric
from transformers import AutoConfig, PreTrainedTokenizerFast

from ...language import SIZES, SetformerConfig, SetformerForMaskedLM
from ...language.heads import IGNORED
from ...language.saved import (
    SavedError,
    load_model,
    load_saved,
    load_tokenizer,
    require_embeddings,
)
from .options import add_keys_and_values, add_option, number, positive
from .parallel import from_main_process
from .task import EVAL_LOSS, Batch, DataError, Metrics, Task, TrainingError, blaming, listed
from .texts import read_documents, text_files, train_tokenizer, wrap_tokenizer

CHOSEN, MASKED, RANDOM = 0.15, 0.8, 0.1  # BERT's: of all words; of the chosen; the rest stays
MANY_UNKNOWN = 0.01  # the share of unknown words above which there is a warning
VOCAB_SIZE = 30522  # of BERT


class Packed(Dataset[tuple[Tensor, Tensor]]):
    """Documents one after the other, cut into sequences of one length, with words masked anew.

    Args:
        documents: their tokens, each [n] int32, to be joined by the separator.
        length: of every sequence L, with [CLS] in front and [SEP] at the end.
        tokenizer: knows the special tokens.
        chosen: share of the words that have to be predicted.

    A sample is the sequence [L] int64 with words masked, and what has to be predicted [L] int64,
    -100 elsewhere; drawn from torch's global generator. (transformers' collator also draws special
    tokens as random replacements of words.)
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
        self.mask = tokenizer.mask_token_id
        special = {*tokenizer.all_special_ids}
        self.special = torch.tensor(sorted(special))
        self.words = torch.tensor(sorted({*tokenizer.get_vocab().values()} - special))
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
        chosen = (torch.rand(self.length) < self.chosen) & ~torch.isin(tokens, self.special)
        labels[~chosen] = IGNORED
        fate = torch.rand(self.length)
        tokens[chosen & (fate < MASKED)] = self.mask
        other = self.words[torch.randint(len(self.words), (self.length,))]
        replaced = chosen & (fate >= MASKED) & (fate < MASKED + RANDOM)
        tokens[replaced] = other[replaced]
        return tokens, labels


class Prediction(Metrics):
    """The loss, the share of masked words with the highest probability, and their perplexity."""

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
        return {
            EVAL_LOSS: loss,
            "accuracy": self.right.compute().item(),
            "perplexity": math.exp(min(loss, 700.0)),  # a float holds no more
        }


class Mlm(Task):
    """Text files with one document a line."""

    name = "mlm"
    monitor = EVAL_LOSS
    smaller_is_better = True
    defaults = {"batch_size": 64, "epochs": 10, "lr": 5e-4, "ema_decay": 0.0, "weight_decay": 0.01}
    train: Packed
    eval: Packed
    collate = staticmethod(default_collate)

    @staticmethod
    def add_options(parser: argparse._ArgumentGroup) -> None:
        add = partial(add_option, parser)
        files = "text files, or folders of *.txt, with one document a line"
        add("--data PATH", Path, help=files, nargs="+", required=True)
        held_out = "the same to evaluate on (default: every hundredth document of --data)"
        add("--eval-data PATH", Path, help=held_out, nargs="+")
        add("--model", help="size (default: base)", choices=tuple(SIZES))
        purpose = "of SetformerConfig, such as num_references=64 or attention=softmax"
        add_keys_and_values(parser, "--model-options", purpose)
        add(
            "--pretrained DIR",
            Path,
            help="SeTformer encoder to start from, such as what train mlm wrote: its weights, "
            "sizes and, without --tokenizer, its vocabulary",
        )
        saved = "take this one of transformers' instead of training one"
        add("--tokenizer DIR", Path, help=saved)
        largest = f"largest vocabulary of the tokenizer that is trained (default: {VOCAB_SIZE})"
        add("--vocab-size", number(int, 100), help=largest)
        add(
            "--alphabet N",
            positive,
            help="characters that it knows at most, the commonest; words with others are [UNK] "
            "(default: what the texts need, if half of the vocabulary has room for it)",
        )
        parser.add_argument(
            "--cased", action="store_true", help="tell capital letters from small ones"
        )
        pieces = "documents are joined and cut into sequences of N"
        add("--sequence-length N", number(int, 8), 128, pieces)
        masked = "of the words that have to be predicted"
        add("--mask-share SHARE", number(float, 0.01, 0.9), CHOSEN, masked)

    @staticmethod
    def split(options: argparse.Namespace) -> list[argparse.Namespace]:
        """Fill in defaults for what neither --pretrained nor --tokenizer gives."""
        known: dict[str, str] = {}  # options whose values another option already gives
        if options.tokenizer is not None:
            known |= dict.fromkeys(("vocab_size", "alphabet", "cased"), "tokenizer")
        if options.pretrained is not None:
            known |= dict.fromkeys(("model", "vocab_size", "alphabet", "cased"), "pretrained")
        for name, source in known.items():
            if getattr(options, name):
                option = name.replace("_", "-")
                raise TrainingError(f"--{option}: comes from --{source}; leave one of them out")
        defaults = {"model": "base", "vocab_size": VOCAB_SIZE}
        missing = [name for name in defaults if not (name in known or getattr(options, name))]
        return [argparse.Namespace(**vars(options) | {name: defaults[name] for name in missing})]

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.pretrained = _encoder_configuration(options.pretrained)
        tokenizer = from_main_process(self._saved_tokenizer)
        self.problems: list[str] = []
        notes = self.problems if options.on_error == "skip" else None
        files = text_files("--data", options.data)
        eval_files = text_files("--eval-data", options.eval_data or [])
        documents, held_out = read_documents(files, notes), read_documents(eval_files, notes)
        if options.eval_data is None:
            held_out = documents[99::100]
            documents = [d for place, d in enumerate(documents) if place % 100 != 99]
        self.counts = len(documents), len(held_out)
        self.tokenizer = tokenizer or self._train_tokenizer(documents)
        self.train, self.eval = (
            pack(texts, self.tokenizer, options.sequence_length, options.mask_share)
            for texts in (documents, held_out)
        )
        for data, which in ((self.train, "train"), (self.eval, "evaluate")):
            if not len(data):
                raise DataError(
                    f"--data: {len(data.tokens)} tokens to {which} on, expected at least one "
                    f"sequence of {options.sequence_length}; give more text, --eval-data or a "
                    "smaller --sequence-length"
                )
        if self.pretrained is None:
            words = 1 + max(self.tokenizer.get_vocab().values())
            start: dict[str, Any] = {**SIZES[options.model], "vocab_size": words}
        else:
            names = SetformerConfig.__annotations__  # without those of all configurations
            start = {n: value for n, value in self.pretrained.to_dict().items() if n in names}
        self.model_options = {
            **start,
            **dict(options.model_options),
            "vocab_size": start["vocab_size"],
            "pad_token_id": self.tokenizer.pad_token_id,
        }
        unknown = self.model_options.keys() - SetformerConfig().to_dict().keys()
        if unknown:
            raise TrainingError(
                f"--model-options: SetformerConfig has no {', '.join(sorted(unknown))}"
            )

    def _saved_tokenizer(self) -> PreTrainedTokenizerFast | None:
        """The tokenizer of a resumed training, or else the given one; None to train one."""
        options, option, folder = self.options, "resume", self.options.output
        if not options.resume or not (folder / "tokenizer.json").exists():
            option = "pretrained" if options.tokenizer is None else "tokenizer"
            folder = getattr(options, option)
        if folder is None:
            return None
        with blaming(f"--{option}", SavedError):
            tokenizer = load_tokenizer(folder)
            if self.pretrained is not None:
                require_embeddings(tokenizer, self.pretrained, options.pretrained)
        needed = ("cls_token", "sep_token", "mask_token")
        lacks = [name for name in needed if getattr(tokenizer, name) is None]
        if lacks:
            raise TrainingError(f"--{option}: {folder}: its tokenizer has no {', '.join(lacks)}")
        return tokenizer

    def _train_tokenizer(self, documents: list[str]) -> PreTrainedTokenizerFast:
        """A tokenizer trained on these documents, the same in all processes."""
        options = self.options
        how = (options.vocab_size, not options.cased, options.alphabet)
        return wrap_tokenizer(from_main_process(lambda: train_tokenizer(documents, *how)))

    def describe(self) -> str:
        text = (
            f"{self.counts[0]} documents to train on and {self.counts[1]} to evaluate on, "
            f"{len(self.train)} and {len(self.eval)} sequences of {self.options.sequence_length}; "
            f"a vocabulary of {len(self.tokenizer)}"
        )
        if self.problems:
            text += f"; {len(self.problems)} lines were left out: {listed(self.problems)}"
        unknown = self._unknown_share()
        if unknown > MANY_UNKNOWN:
            text += (
                f"\nwarning: {unknown:.1%} of the words to train on are unknown ([UNK]); a larger "
                "--alphabet and --vocab-size may know them, or another --tokenizer"
            )
        return text

    def _unknown_share(self) -> float:
        """The share of the training words that the tokenizer does not know."""
        tokenizer, tokens = self.tokenizer, self.train.tokens
        inside = [i for token, i in tokenizer.get_vocab().items() if token.startswith("##")]
        words = ~np.isin(tokens, [*inside, tokenizer.sep_token_id])
        return float((tokens == tokenizer.unk_token_id).sum() / max(1, words.sum()))

    def make_model(self) -> nn.Module:
        with blaming("--model-options", TypeError, ValueError, KeyError):
            config = SetformerConfig(**{**self.model_options, "sparse_prediction": True})
            if self.pretrained is None:
                return SetformerForMaskedLM(config)
        load, folder = SetformerForMaskedLM.from_pretrained, self.options.pretrained
        with blaming("--pretrained", SavedError):
            return load_model(load, folder, "decoder", config=config)

    def prepare(self, output: Path) -> None:
        SetformerConfig(
            **self.model_options, architectures=["SetformerForMaskedLM"]
        ).save_pretrained(output)
        self.tokenizer.save_pretrained(output)

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        tokens, labels = batch
        return {"cross_entropy": model(tokens, labels=labels).loss}

    def metrics(self) -> Metrics:
        return Prediction()

    def card(self) -> dict[str, Any]:
        options = self.options
        return {
            "task": self.name,
            "model_options": self.model_options,
            # These determine the masked words of the evaluation.
            "sequence_length": options.sequence_length,
            "mask_share": options.mask_share,
            "seed": options.seed,
        }


def pack(
    documents: list[str], tokenizer: PreTrainedTokenizerFast, length: int, chosen: float
) -> Packed:
    """Documents as sequences of tokens; arguments as for :class:`Packed`."""
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(documents, add_special_tokens=False)
    tokens = [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
    return Packed(tokens, length, tokenizer, chosen)


def _encoder_configuration(folder: Path | None) -> SetformerConfig | None:
    """The configuration of the encoder in ``--pretrained``."""
    if folder is None:
        return None
    with blaming("--pretrained", SavedError):
        config = load_saved(AutoConfig.from_pretrained, folder)
    if isinstance(config, SetformerConfig):
        return config
    raise TrainingError(
        "--pretrained: expected a SeTformer encoder, such as the --output of train mlm, "
        f"got a {type(config).__name__} in {folder}"
    )
