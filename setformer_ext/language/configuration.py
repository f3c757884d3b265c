"""What a SeTformer language encoder is made of."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from ..arguments import is_integer, is_number
from ..controls import ATTENTIONS

# Widths and depths of BERT-mini and BERT-base, whose 110 million parameters base about has.
SIZES: dict[str, dict[str, int]] = {
    "mini": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4},
    "small": {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
}

# See docs/evidence.md for what it is worth.
ATTENTION_OPTIONS: dict[str, Any] = {"adaptive_reference_mass": True, "query_projection": False}


class SetformerConfig(PreTrainedConfig):
    """The configuration of a SeTformer encoder; names are BERT's where it has the same thing.

    Args:
        vocab_size: tokens known.
        hidden_size: width C of the tokens, a multiple of ``num_attention_heads``.
        num_hidden_layers: layers, each of a convolution, attention and an MLP.
        num_attention_heads: heads H.
        intermediate_size: hidden width of the MLPs; by default 4 C.
        num_references: references M per head, of SeT attention.
        attention: "set", or for comparison the same encoder with dot-product attention, "softmax",
            O(N^2), with the "mean" of all tokens in its place, or with "none".
        attention_options: options of :class:`setformer_ext.SetAttention` that differ from
            ``ATTENTION_OPTIONS``; none with others.
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

    def __init__(
        self,
        vocab_size: int = 30522,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int | None = None,
        num_references: int = 32,
        attention: str = "set",
        attention_options: dict[str, Any] | None = None,
        conv_kernel_size: int = 5,
        max_position_embeddings: int | None = None,
        type_vocab_size: int = 2,
        hidden_act: str = "gelu",
        hidden_dropout_prob: float = 0.1,
        classifier_dropout: float | None = None,
        classifier_pooling: str = "mean",
        sparse_prediction: bool = False,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-5,
        pad_token_id: int | None = 0,
        tie_word_embeddings: bool = True,
        **options: Any,
    ) -> None:
        counts = {
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": num_attention_heads,
            "num_references": num_references,
            "type_vocab_size": type_vocab_size,
        }
        for name, count in counts.items():
            _require(is_integer(count) and count >= 1, name, "an int >= 1", count)
        _require(
            hidden_size % num_attention_heads == 0,
            "hidden_size",
            f"a multiple of num_attention_heads={num_attention_heads}",
            hidden_size,
        )
        known = attention in ATTENTIONS
        _require(known, "attention", f"of {', '.join(ATTENTIONS)}", attention)
        if attention != "set":
            _require(not attention_options, "attention_options", "None", attention_options)
        width, positions = conv_kernel_size, max_position_embeddings
        _require(
            is_integer(width) and (width == 0 or (width > 0 and width % 2 == 1)),
            "conv_kernel_size",
            "an odd int, or 0",
            width,
        )
        _require(
            positions is None or (is_integer(positions) and positions >= 1),
            "max_position_embeddings",
            "an int >= 1, or None",
            positions,
        )
        _require(hidden_act in ACT2FN, "hidden_act", "a name that transformers knows", hidden_act)
        rates = {
            "hidden_dropout_prob": hidden_dropout_prob,
            "classifier_dropout": classifier_dropout,
        }
        for name, rate in rates.items():
            _require(rate is None or (is_number(rate) and 0 <= rate < 1), name, "in [0, 1)", rate)
        _require(
            classifier_pooling in ("mean", "cls"),
            "classifier_pooling",
            "'mean' or 'cls'",
            classifier_pooling,
        )
        for name, count in counts.items():
            setattr(self, name, count)
        self.intermediate_size = int(intermediate_size or 4 * hidden_size)
        self.attention = attention
        self.attention_options = attention_options
        self.conv_kernel_size = conv_kernel_size
        self.max_position_embeddings = max_position_embeddings
        self.hidden_act = hidden_act
        self.hidden_dropout_prob = hidden_dropout_prob
        self.classifier_dropout = classifier_dropout
        self.classifier_pooling = classifier_pooling
        self.sparse_prediction = sparse_prediction
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.pad_token_id = pad_token_id
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(**options)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, _for_json(value))


def _for_json(value: Any) -> Any:
    """Numbers of NumPy as those of Python, for a configuration is saved as JSON."""
    if isinstance(value, dict):
        return {name: _for_json(each) for name, each in value.items()}
    return int(value) if is_integer(value) else float(value) if is_number(value) else value


def _require(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"SetformerConfig: {name} must be {expected}, got {got!r}")
