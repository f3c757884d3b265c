"""The encoder with a head: masked words, classes or a number for a sequence, classes of tokens."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.modeling_outputs import (
    MaskedLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils.generic import can_return_tuple

from .configuration import SetformerConfig
from .encoder import SetformerModel, SetformerPreTrainedModel
from .masks import valid_tokens

IGNORED = -100  # the label of tokens that do not count in a loss, as in all of transformers
Answer = tuple[Tensor, Tensor | None]  # logits, and the loss if labels are given


class _WithHead(SetformerPreTrainedModel):
    """The encoder and a head, with the ``forward`` that all of them share."""

    output: type[MaskedLMOutput | SequenceClassifierOutput | TokenClassifierOutput]

    def __init__(self, config: SetformerConfig) -> None:
        super().__init__(config)
        self.setformer = SetformerModel(config)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,  # [B, N]
        attention_mask: Tensor | None = None,  # [B, N]
        token_type_ids: Tensor | None = None,  # [B, N]
        position_ids: Tensor | None = None,  # [B, N]
        inputs_embeds: Tensor | None = None,  # [B, N, C]
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput | SequenceClassifierOutput | TokenClassifierOutput:
        """Logits, and if labels are given the loss, as described by the class; the other arguments
        are those of :class:`SetformerModel`."""
        encoded = self.setformer(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs
        )
        logits, loss = self.answer(encoded.last_hidden_state, attention_mask, labels)
        return self.output(loss=loss, logits=logits, hidden_states=encoded.hidden_states)

    def answer(
        self,
        x: Tensor,  # [B, N, C]
        mask: Tensor | None,  # [B, N]
        labels: Tensor | None,
    ) -> Answer:
        """Logits and loss of the encoded tokens."""
        raise NotImplementedError


class SetformerForMaskedLM(_WithHead):
    """Predicts the words that were masked, by the word embeddings' own weights.

    Labels are the words [B, N] that should be predicted, -100 where none should. The logits are
    [B, N, vocab_size], or with sparse_prediction and labels those of the K labelled places,
    [K, vocab_size]; the loss is the mean cross entropy there, 0 of none.
    """

    _tied_weights_keys = {"decoder.weight": "setformer.embeddings.word_embeddings.weight"}
    output = MaskedLMOutput

    def __init__(self, config: SetformerConfig) -> None:
        super().__init__(config)
        self.head = _prediction_head(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.decoder = new_embeddings

    def answer(self, x: Tensor, mask: Tensor | None, labels: Tensor | None) -> Answer:
        if labels is not None and self.config.sparse_prediction:
            wanted = labels != IGNORED
            x, labels = x[wanted], labels[wanted]
        logits = self.decoder(self.head(x))
        return logits, None if labels is None else _cross_entropy(logits, labels)


class SetformerForSequenceClassification(_WithHead):
    """A class for a text or a pair of texts, or with ``num_labels=1`` a number.

    Labels are [B], int64 classes; numbers for regression; or [B, num_labels] of 0 and 1 where
    several classes may hold. ``config.problem_type`` says which ("regression",
    "single_label_classification", "multi_label_classification"), else num_labels and the labels'
    dtype do. The logits are [B, num_labels]; the loss is the squared error, cross entropy, or
    binary cross entropy.
    """

    output = SequenceClassifierOutput

    def __init__(self, config: SetformerConfig) -> None:
        super().__init__(config)
        self.num_labels: int = config.num_labels or 2
        self.head = _prediction_head(config)
        self.dropout = _classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    def answer(self, x: Tensor, mask: Tensor | None, labels: Tensor | None) -> Answer:
        logits = self.classifier(self.dropout(self.head(self._pool(x, mask))))
        return logits, None if labels is None else self._loss(logits, labels)

    def _pool(self, x: Tensor, mask: Tensor | None) -> Tensor:  # [B, N, C] -> [B, C]
        if self.config.classifier_pooling == "cls":
            # The first valid token: texts may be padded at the left.
            first = 0 if mask is None else valid_tokens(mask).int().argmax(1)
            return x[torch.arange(len(x), device=x.device), first]
        if mask is None:
            return x.mean(1)
        weights = valid_tokens(mask).unsqueeze(-1).to(x.dtype)
        return (x * weights).sum(1) / weights.sum(1).clamp(min=1)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        kind: str | None = self.config.problem_type
        if kind is None:
            several = "multi_label" if labels.is_floating_point() else "single_label"
            kind = "regression" if self.num_labels == 1 else f"{several}_classification"
        if kind == "regression":
            return F.mse_loss(logits.float().view_as(labels), labels.float())
        if kind == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(logits.float(), labels.float())
        return F.cross_entropy(logits.float(), labels.view(-1))


class SetformerForTokenClassification(_WithHead):
    """A class for each token.

    Labels are classes [B, N], -100 where there is none. The logits are [B, N, num_labels]; the loss
    is the mean cross entropy, 0 of no labels.
    """

    output = TokenClassifierOutput

    def __init__(self, config: SetformerConfig) -> None:
        super().__init__(config)
        self.num_labels: int = config.num_labels or 2
        self.dropout = _classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    def answer(self, x: Tensor, mask: Tensor | None, labels: Tensor | None) -> Answer:
        logits = self.classifier(self.dropout(x))
        return logits, None if labels is None else _cross_entropy(logits, labels)


def _prediction_head(config: SetformerConfig) -> nn.Module:  # [..., C] -> [..., C]
    """Linear, activation and norm, before the last layer of a task."""
    return nn.Sequential(
        OrderedDict(
            dense=nn.Linear(config.hidden_size, config.hidden_size),
            activation=ACT2FN[config.hidden_act],
            norm=nn.LayerNorm(config.hidden_size, config.layer_norm_eps),
        )
    )


def _classifier_dropout(config: SetformerConfig) -> nn.Dropout:
    rate = config.classifier_dropout
    return nn.Dropout(config.hidden_dropout_prob if rate is None else rate)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labelled places; 0 if there are none (torch's mean would be NaN)."""
    labels = labels.flatten()
    total = F.cross_entropy(
        logits.float().flatten(0, -2), labels, ignore_index=IGNORED, reduction="sum"
    )
    return total / (labels != IGNORED).sum().clamp(min=1)
