"""The trained language models, asked about texts."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification
from transformers.utils import logging

from ... import language
from ...errors import UserError, first_line
from ...language.saved import SavedError, load_saved, load_tokenizer, require_embeddings
from ..train.glue import encode
from ..train.glue_data import TASKS
from .answers import Answer, Classification, Filling, Number
from .loading import load_text_run
from .predictors import TOP

Texts = tuple[str, ...]  # one, or the two of a task about pairs


class TextPredictor(ABC):
    """A trained model of transformers and its tokenizer.

    Args:
        folder: the training's output.
        card: what ``Task.card()`` wrote.

    Raises:
        UserError: if the files in the folder are broken or do not belong together.
        KeyError: if the card lacks something.
    """

    load: Callable[..., Any]  # transformers' from_pretrained

    def __init__(self, folder: Path, card: dict[str, Any]) -> None:
        self.card = card
        language.register()
        logging.set_verbosity_error()  # weights that do not fit are reported here instead
        logging.disable_progress_bar()
        implementation = card.get("attention_implementation")
        try:
            self.tokenizer = load_tokenizer(folder)
            self.model, found = load_saved(
                type(self).load,
                folder,
                dtype=torch.float32,
                attn_implementation=implementation,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
            require_embeddings(self.tokenizer, self.model.config, folder)
        except SavedError as error:
            raise UserError(str(error)) from error
        wrong = [*found["missing_keys"], *found["unexpected_keys"]]
        wrong += [key[0] for key in found["mismatched_keys"]]
        if wrong:
            raise UserError(
                f"{folder}: these weights are of another model than config.json says: {wrong[0]} "
                f"and {len(wrong) - 1} more are missing, too many or of another shape"
            )
        self.model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    @abstractmethod
    def check(self, texts: Texts) -> str:
        """Remarks about texts before they are answered, such as that they are cut.

        Raises:
            UserError: if they cannot be answered.
        """

    @abstractmethod
    def __call__(self, texts: Texts) -> Answer:
        """The answer about one text or two."""


class TextClassifier(TextPredictor):
    """A model of ``setformer train glue``: a class or a number for a text or two."""

    load = AutoModelForSequenceClassification.from_pretrained

    def __init__(self, folder: Path, card: dict[str, Any]) -> None:
        self.glue = TASKS[card["glue_task"]]
        self.classes: list[str] = card["classes"]
        self.length: int = card["sequence_length"]
        super().__init__(folder, card)
        outputs = self.model.config.num_labels
        if outputs != max(1, len(self.classes)):
            raise ValueError(f"{len(self.classes)} classes, but the model has {outputs}")

    def check(self, texts: Texts) -> str:
        columns = self.glue.texts
        if len(texts) != len(columns):
            raise UserError(
                f"--text: {self.glue.folder} needs {' and '.join(columns)} after each --text, "
                f"got {len(texts)} texts"
            )
        tokens = len(self.tokenizer(*texts).input_ids)
        if tokens > self.length:
            return f"cut to {self.length} tokens from {tokens}, as in training"
        return ""

    @torch.no_grad()
    def logits(self, texts: Sequence[Texts]) -> Tensor:  # [B, classes or 1]
        inputs = encode(self.tokenizer, texts, self.length)
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        return self.model(**inputs).logits.float().cpu()

    def __call__(self, texts: Texts) -> Answer:
        (logits,) = self.logits([texts])
        if not self.classes:
            return Number(float(logits[0]))
        top = logits.softmax(-1).topk(min(TOP, len(self.classes)))
        return Classification([self.classes[i] for i in top.indices.tolist()], top.values)


class MaskFiller(TextPredictor):
    """A model of ``setformer train mlm``: words for each mask in a text."""

    load = AutoModelForMaskedLM.from_pretrained

    def check(self, texts: Texts) -> str:
        mask = self.tokenizer.mask_token
        if len(texts) != 1 or mask not in texts[0]:
            raise UserError(
                f"--text: a training of mlm fills in words: expected one text after each --text, "
                f"with {mask} in it, got {' '.join(map(repr, texts))}"
            )
        return ""

    @torch.no_grad()
    def __call__(self, texts: Texts) -> Answer:
        tokenizer = self.tokenizer
        inputs = tokenizer(*texts, return_tensors="pt").to(self.model.device)
        tokens = inputs["input_ids"][0]
        masked = tokens == tokenizer.mask_token_id
        try:
            logits = self.model(**inputs).logits[0, masked].float()
        except ValueError as error:  # longer than the model's positions
            raise UserError(f"--text: {first_line(error)}") from error
        top = logits.softmax(-1).topk(min(TOP, logits.shape[-1]))
        words = [
            [str(tokenizer.convert_ids_to_tokens(i)) for i in row] for row in top.indices.tolist()
        ]
        filled = tokens.masked_scatter(masked, top.indices[:, 0])
        text = str(tokenizer.decode(filled, skip_special_tokens=True))
        return Filling(text, words, top.values.cpu())


TEXT_PREDICTORS: dict[str, type[TextPredictor]] = {"mlm": MaskFiller, "glue": TextClassifier}


def answer_texts(training: Path, given: list[list[str]]) -> list[dict[str, Any]]:
    """Print the answers; returns them in JSON's types.

    Args:
        training: a training's output folder.
        given: texts, in lists of one, or of two for a task about pairs.

    Raises:
        UserError: if the training was not on texts, or one of the texts cannot be answered.
    """
    predictor = load_text_run(training)
    remarks = [predictor.check(tuple(texts)) for texts in given]
    found = []
    for texts, remark in zip(given, remarks, strict=True):
        answer = predictor(tuple(texts))
        print(f"{' | '.join(texts)}: {answer.text()}")
        if remark:
            print(f"setformer predict: {texts[0]!r}: {remark}", file=sys.stderr)
        names = ("text",) if len(texts) == 1 else ("text1", "text2")
        found.append({**dict(zip(names, texts, strict=True)), **answer.json()})
    return found
