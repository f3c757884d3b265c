"""What a SeTformer language encoder is made of."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from ..arguments import is_integer, is_number
from ..controls import ATTENTIONS

# mini and base have the widths and depths of BERT-mini and BERT-base, and base about as many
# parameters as BERT-base, 110 million.
SIZES: dict[str, dict[str, int]] = {
    "mini": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4},
    "small": {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
}

# See docs/evidence.md for what it is worth.
ATTENTION_OPTIONS: dict[str, Any] = {"adaptive_reference_mass": True, "query_projection": False}


class SetformerConfig(PreTrainedConfig):
    """The configuration of a SeTformer encoder; options that BERT also has keep BERT's names.

    Args:
        vocab_size: tokens known.
        hidden_size: width C of the tokens, a multiple of ``num_attention_heads``.
        num_hidden_layers: layers, each of a convolution, attention and an MLP.
        num_attention_heads: heads H.
        intermediate_size: hidden width of the MLPs; by default 4 C.
        num_references: references M per head, of SeT attention.
        attention: "set"; or for comparison, in the same encoder, "softmax" (dot-product attention,
            O(N^2)), "mean" (of all tokens) or "none".
        attention_options: options of :class:`setformer_ext.SetAttention` that differ from
            ``ATTENTION_OPTIONS``; None for other attentions.
        conv_kernel_size: width of the depthwise convolution over neighbouring tokens that tells
            the order of words, odd; 0 for none.
        max_position_embeddings: learned embeddings of so many absolute positions, which is then
            the longest sequence; None for none, and sequences of any length.
        type_vocab_size: segments, as of sentence pairs.
        hidden_act: activation of the MLPs, by its name in transformers.
        hidden_dropout_prob: dropout of embeddings and of every branch, in [0, 1).
        classifier_dropout: dropout before the classifiers; None for hidden_dropout_prob.
        classifier_pooling: what a sequence is classified by: the "mean" of its tokens, or "cls",
            the first of them.
        sparse_prediction: compute the logits of masked words only where labels are given.
        initializer_range: deviation of the weights of embeddings, MLPs and heads at the start.
        layer_norm_eps: of all norms.
        pad_token_id: the token whose embedding is 0.
        tie_word_embeddings: predict words by the embeddings' own weights.
        options: those of every configuration, such as ``num_labels``.

    Raises:
        ValueError: for an argument outside these ranges.
    """

    model_type = "setformer"

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    num_references: int = 32
    attention: str = "set"
    attention_options: dict[str, Any] | None = None
    conv_kernel_size: int = 5
    max_position_embeddings: int | None = None
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    classifier_pooling: str = "mean"
    sparse_prediction: bool = False
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True

    def __post_init__(self, **options: Any) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_references",
            "type_vocab_size",
        ):
            self._require(name, "an int >= 1", _is_count(getattr(self, name)))
        heads = self.num_attention_heads
        expected = f"a multiple of num_attention_heads={heads}"
        self._require("hidden_size", expected, self.hidden_size % heads == 0)
        self._require("attention", f"of {', '.join(ATTENTIONS)}", self.attention in ATTENTIONS)
        if self.attention != "set":
            self._require("attention_options", "None", not self.attention_options)
        width, longest = self.conv_kernel_size, self.max_position_embeddings
        odd = _is_count(width) and width % 2 == 1
        none = is_integer(width) and width == 0
        self._require("conv_kernel_size", "an odd int, or 0", odd or none)
        expected = "an int >= 1, or None"
        self._require("max_position_embeddings", expected, longest is None or _is_count(longest))
        known = self.hidden_act in ACT2FN
        self._require("hidden_act", "a name that transformers knows", known)
        for name in ("hidden_dropout_prob", "classifier_dropout"):
            rate = getattr(self, name)
            valid = rate is None or (is_number(rate) and 0 <= rate < 1)
            self._require(name, "in [0, 1)", valid)
        pooling = self.classifier_pooling in ("mean", "cls")
        self._require("classifier_pooling", "'mean' or 'cls'", pooling)
        self.intermediate_size = int(self.intermediate_size or 4 * self.hidden_size)
        super().__post_init__(**options)
        self.validate()

    def _require(self, name: str, expected: str, valid: bool) -> None:
        if not valid:
            got = getattr(self, name)
            raise ValueError(f"SetformerConfig: {name} must be {expected}, got {got!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, _for_json(value))


def _for_json(value: Any) -> Any:
    """NumPy's numbers as Python's, because a configuration is saved as JSON."""
    if isinstance(value, dict):
        return {name: _for_json(each) for name, each in value.items()}
    return int(value) if is_integer(value) else float(value) if is_number(value) else value


def _is_count(value: object) -> bool:
    return is_integer(value) and value >= 1
