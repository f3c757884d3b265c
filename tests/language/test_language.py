"""The language encoder: padding changes nothing, heads and losses are right, it saves and loads."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.utils import logging

from fresh import fresh
from setformer_ext.controls import ATTENTIONS
from setformer_ext.language import (
    SIZES,
    SetformerConfig,
    SetformerForMaskedLM,
    SetformerForSequenceClassification,
    SetformerForTokenClassification,
    SetformerModel,
)
from setformer_ext.language.saved import load_model

TINY = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_references": 5,
}
HEADS = [
    SetformerForMaskedLM,
    SetformerForSequenceClassification,
    SetformerForTokenClassification,
]
AUTO = [
    (AutoModelForMaskedLM, SetformerForMaskedLM),
    (AutoModelForSequenceClassification, SetformerForSequenceClassification),
    (AutoModelForTokenClassification, SetformerForTokenClassification),
]


def config(**options: Any) -> SetformerConfig:
    return SetformerConfig(**{**TINY, **options})


def make(kind: type[nn.Module] = SetformerModel, **options: Any) -> Any:
    """In eval mode, with masses and convolutions that do something."""
    model = kind(config(**options)).eval()
    for name, parameter in model.named_parameters():
        if "mass" in name or ".conv." in name:
            nn.init.normal_(parameter, std=0.5)
    return model


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(1, 50, shape)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_is_the_encoder_on_its_own_weights(activation: str) -> None:
    """All of it written out, but for attention, whose module has such a test of its own."""
    options = {"hidden_act": activation, "layer_norm_eps": 0.1, "max_position_embeddings": 12}
    model = make(SetformerForMaskedLM, output_hidden_states=True, **options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    text, segments = tokens(2, 9), torch.randint(2, (2, 9))
    places = torch.stack([torch.randperm(12)[:9] for _ in text])
    mask = torch.arange(9) < torch.tensor([[9], [6]])
    act = getattr(F, activation)

    def linear(x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        return F.linear(x, layer.weight, layer.bias)

    def norm(x: torch.Tensor, layer: nn.LayerNorm) -> torch.Tensor:
        return F.layer_norm(x, (32,), layer.weight, layer.bias, 0.1)

    encoder = model.setformer
    embeddings = encoder.embeddings
    words = embeddings.word_embeddings.weight
    x = words[text] + embeddings.token_type_embeddings.weight[segments]
    x = norm(x + embeddings.position_embeddings.weight[places], embeddings.norm)
    states = [x]
    for layer in encoder.layers:
        conv, covered = layer.position.conv, (x * mask.unsqueeze(-1)).mT
        x = x + F.conv1d(covered, conv.weight, conv.bias, padding=2, groups=32).mT
        x = x + layer.attention(norm(x, layer.attention_norm), mask)
        first, _, second = layer.mlp
        x = x + linear(act(linear(norm(x, layer.mlp_norm), first)), second)
        states.append(x)
    states[-1] = norm(x, encoder.norm)
    hidden = norm(act(linear(states[-1], model.head.dense)), model.head.norm)
    answer = model(text, mask, segments, places)
    torch.testing.assert_close(answer.hidden_states, tuple(states))
    torch.testing.assert_close(answer.logits, hidden @ words.T + model.decoder.bias)
    assert model(text, output_hidden_states=False).hidden_states is None


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "options",
    [{}, *({"attention": kind} for kind in ATTENTIONS[1:]), {"classifier_pooling": "cls"}],
)
def test_padding_changes_no_answer(side: str, options: dict[str, Any]) -> None:
    model = make(SetformerForSequenceClassification, num_labels=3, **options)
    texts = [tokens(7), tokens(12), tokens(1)]
    padded = torch.zeros(3, 12, dtype=torch.int64)
    mask = torch.zeros(3, 12, dtype=torch.int64)
    for row, text in enumerate(texts):
        place = slice(0, len(text)) if side == "right" else slice(12 - len(text), 12)
        padded[row, place], mask[row, place] = text, 1
    padded[mask == 0] = 17  # what stands there does not matter
    together = model(padded, mask, output_hidden_states=True)
    for row, text in enumerate(texts):
        alone = model(text[None], output_hidden_states=True)
        torch.testing.assert_close(together.logits[row], alone.logits[0], atol=2e-6, rtol=1e-5)
        inside = together.hidden_states[-1][row][mask[row] == 1]
        torch.testing.assert_close(inside, alone.hidden_states[-1][0], atol=5e-6, rtol=1e-5)


def test_a_sequence_of_padding_alone_is_finite_and_learns_nothing() -> None:
    for attention in ATTENTIONS:
        model = make(SetformerForSequenceClassification, attention=attention)
        embeddings = torch.randn(2, 6, 32, requires_grad=True)
        mask = torch.tensor([[1] * 6, [0] * 6])
        model(attention_mask=mask, inputs_embeds=embeddings).logits.square().sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert embeddings.grad[0].abs().min() > 0
        assert (embeddings.grad[1] == 0).all()


def test_the_order_of_words_matters_by_convolution_or_by_position() -> None:
    text = tokens(1, 9)
    for options, matters in (
        ({}, True),
        ({"conv_kernel_size": 0}, False),
        ({"conv_kernel_size": 0, "max_position_embeddings": 9}, True),
    ):
        model = make(SetformerForSequenceClassification, **options)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        difference = (model(text).logits - model(text.flip(1)).logits).abs().max()
        assert (difference > 1e-4) == matters, options


def test_segments_and_embeddings_in_place_of_tokens() -> None:
    model = make()
    text = tokens(2, 6)
    plain = model(text).last_hidden_state
    embedded = model(inputs_embeds=model.get_input_embeddings()(text)).last_hidden_state
    assert torch.equal(plain, embedded)
    assert torch.equal(plain, model(text, token_type_ids=torch.zeros_like(text))[0])
    second = torch.tensor([[0, 0, 0, 1, 1, 1]] * 2)
    assert not torch.allclose(plain, model(text, token_type_ids=second)[0])


def test_losses_are_torchs() -> None:
    text, mask = tokens(3, 8), torch.ones(3, 8)
    words = torch.where(torch.rand(3, 8) < 0.4, tokens(3, 8), -100)
    masked = make(SetformerForMaskedLM)
    whole = masked(text, mask, labels=words)
    known = F.cross_entropy(whole.logits.view(-1, 50), words.view(-1))
    torch.testing.assert_close(whole.loss, known)
    masked.config.sparse_prediction = True
    sparse = masked(text, mask, labels=words)
    torch.testing.assert_close(sparse.loss, known)
    torch.testing.assert_close(sparse.logits, whole.logits[words != -100])
    assert masked(text, mask, labels=torch.full_like(text, -100)).loss == 0
    tagger = make(SetformerForTokenClassification, num_labels=4)
    tags = torch.randint(0, 4, (3, 8))
    answer = tagger(text, mask, labels=tags)
    torch.testing.assert_close(
        answer.loss, F.cross_entropy(answer.logits.view(-1, 4), tags.view(-1))
    )
    several, binary = torch.tensor([[0.0, 1], [1, 1], [0, 0]]), F.binary_cross_entropy_with_logits
    for labels, size, kind, known_loss in (
        (torch.tensor([0, 2, 1]), 3, None, F.cross_entropy),
        (torch.tensor([0.5, 2.0, 4.5]), 1, None, lambda x, y: F.mse_loss(x.squeeze(1), y)),
        (several, 2, None, binary),
        (several, 2, "regression", F.mse_loss),
        (several[:, :1], 1, "multi_label_classification", binary),
    ):
        model = make(SetformerForSequenceClassification, num_labels=size, problem_type=kind)
        answer = model(text, mask, labels=labels)
        assert answer.logits.shape == (3, size)
        torch.testing.assert_close(answer.loss, known_loss(answer.logits, labels))


@pytest.mark.parametrize(("auto", "kind"), AUTO)
def test_it_saves_and_loads_by_the_auto_classes(
    auto: Any, kind: type[nn.Module], tmp_path: Path
) -> None:
    model = make(kind, attention_options={"epsilon": 0.2}, num_labels=3)
    model.save_pretrained(tmp_path)
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is kind
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    text = tokens(2, 7)
    assert torch.equal(loaded(text).logits, model(text).logits)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == model.config.to_diff_dict()
    body = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(body(text)[0], model.setformer(text)[0])


def test_the_parts_that_a_checkpoint_lacks_are_drawn_anew(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_references=7, ignore_mismatched_sizes=True
    )
    reference = loaded.setformer.layers[0].attention.reference
    assert reference.shape == (4, 7, 8)
    assert 0.1 < reference.std() < 1
    assert 0.01 < loaded.classifier.weight.std() < 0.04


def test_queries_of_their_own_start_as_keys_and_come_back_as_they_were(tmp_path: Path) -> None:
    model = SetformerModel(config(attention_options={"query_projection": True}))
    attention = model.layers[0].attention
    assert torch.equal(attention.query.weight, attention.key.weight)
    with torch.no_grad():
        attention.query.weight.normal_()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


def test_words_are_predicted_by_their_embeddings() -> None:
    model = make(SetformerForMaskedLM)
    assert model.decoder.weight is model.get_input_embeddings().weight
    untied = make(SetformerForMaskedLM, tie_word_embeddings=False)
    assert untied.decoder.weight is not untied.get_input_embeddings().weight
    model.resize_token_embeddings(60)
    assert model(torch.tensor([[55, 3]])).logits.shape == (1, 2, 60)


@pytest.mark.parametrize("padding", [0, 3, None])
def test_padding_is_the_token_whose_embedding_is_0(padding: int | None) -> None:
    model = SetformerModel(config(pad_token_id=padding))
    model(torch.arange(50).unsqueeze(0)).last_hidden_state.square().sum().backward()
    weight = model.get_input_embeddings().weight
    for values in (weight, weight.grad):
        zero = (values == 0).all(1)
        assert zero.nonzero().flatten().tolist() == ([] if padding is None else [padding])


@pytest.mark.parametrize("kind", HEADS)
def test_checkpointing_keeps_less_and_changes_no_gradient(kind: type[nn.Module]) -> None:
    model = make(kind, hidden_dropout_prob=0.0).train()
    other = copy.deepcopy(model)
    other.gradient_checkpointing_enable()
    text, kept = tokens(2, 9), []
    for each in (model, other):
        sizes: list[int] = []

        def keep(x: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = each(text).logits.square().mean()
        loss.backward()
        kept.append(sum(sizes))
    for (name, parameter), twin in zip(model.named_parameters(), other.parameters(), strict=True):
        assert parameter.grad is not None, name
        torch.testing.assert_close(twin.grad, parameter.grad)
    # Layers keep some dozens of arrays of the width, of which only their inputs are left.
    assert 0 < kept[1] < 0.5 * kept[0]


@pytest.mark.slow
def test_it_compiles_to_one_graph() -> None:
    model = make(SetformerForSequenceClassification)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (5, 8):
        text, mask = tokens(2, length), torch.ones(2, length, dtype=torch.int64)
        mask[1, 3:] = 0
        torch.testing.assert_close(compiled(text, mask).logits, model(text, mask).logits)


LONG = """
import re
import resource
import torch
from setformer_ext.language import SetformerConfig, SetformerModel

torch.set_num_threads(1)
model = SetformerModel(SetformerConfig(**{options}))

def encode(length):
    model(torch.randint(1, 50, (1, length))).last_hidden_state.square().sum().backward()

encode(1000)  # what is allocated once and for all
resident = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
encode({length})
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())
result = int(peak[1]) * 1024 - resident
"""


@pytest.mark.slow
def test_long_texts_in_memory_that_grows_with_their_length() -> None:
    """Forward and backward of 16,384 tokens, with no N x N matrix."""
    length, width, heads, references = 16384, 32, 4, 5
    array = 4 * length * width
    # The layer keeps some fifteen arrays of the width for backward, and its MLP three of four
    # times the width; the gradients of two at a time; then the plan's states, N x M for each head.
    most = (15 + 3 * 4 + 2 * 4) * array + 4 * 4 * heads * length * references + 32 * 2**20
    assert most < 4 * length**2, "the bound would not notice one head's N x N matrix"
    used = fresh(LONG.format(options={**TINY, "num_hidden_layers": 1}, length=length))
    assert used > 10 * array, "the measurement misses the activations"
    assert used < most, f"{used / 2**20:.0f} MiB > {most / 2**20:.0f} MiB"


def test_sizes() -> None:
    """BERT-base has 110 million parameters."""
    counts = {}
    for name, size in SIZES.items():
        with torch.device("meta"):
            counts[name] = SetformerForMaskedLM(SetformerConfig(**size)).num_parameters()
    assert counts["base"] == pytest.approx(110e6, rel=0.05)
    assert counts["mini"] < counts["small"] < counts["base"]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("vocab_size", 0),
        ("hidden_size", 33),
        ("attention", "linear"),
        ("conv_kernel_size", 4),
        ("conv_kernel_size", 3.0),
        ("max_position_embeddings", 0),
        ("hidden_dropout_prob", 1.0),
        ("classifier_pooling", "max"),
    ],
)
def test_bad_options_are_named(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"SetformerConfig: {option} must be .*, got "):
        config(**{option: value})


def test_numbers_of_numpy_are_saved(tmp_path: Path) -> None:
    """Every number of the configuration, as saved JSON that is the same as of Python's numbers."""
    given = config(
        max_position_embeddings=9,
        intermediate_size=48,
        classifier_dropout=0.25,
        attention_options={"epsilon": 0.5, "iterations": 2},
        num_labels=3,
        bos_token_id=1,
    ).to_dict()
    kinds = {int: np.int64, float: np.float64}

    def of_numpy(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: of_numpy(each) for name, each in value.items()}
        return kinds.get(type(value), lambda same: same)(value)

    numbers = SetformerConfig(**of_numpy(given))
    numbers.save_pretrained(tmp_path)
    assert SetformerConfig.from_pretrained(tmp_path).to_dict() == SetformerConfig(**given).to_dict()
    numbers.layer_norm_eps = np.float32(0.5)
    assert '"layer_norm_eps": 0.5' in numbers.to_json_string()
    assert make(conv_kernel_size=np.int64(3))(tokens(1, 4))[0].isfinite().all()


def test_integer_masks_may_be_additive() -> None:
    model, text = make(SetformerForSequenceClassification), tokens(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    expected = model(text, mask).logits
    for padding in (-10000, -1):
        assert torch.equal(model(text, (1 - mask) * padding).logits, expected)
    nothing = model(text, torch.zeros_like(mask)).logits
    assert torch.equal(nothing, model(text, torch.zeros_like(mask).bool()).logits)


def test_softmax_attention_has_no_options() -> None:
    with pytest.raises(ValueError, match="attention_options must be None"):
        config(attention="softmax", attention_options={"epsilon": 0.1})


@pytest.mark.parametrize("kind", HEADS[1:])
def test_dropout_before_the_classes_may_be_other_than_the_encoders(kind: type[nn.Module]) -> None:
    assert make(kind).dropout.p == 0.1
    assert make(kind, classifier_dropout=0.0).dropout.p == 0


def test_bad_inputs_are_named() -> None:
    model = make(max_position_embeddings=6)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(
        ValueError, match=r"attention_mask must be \[B, N\] = \[2, 5\], got \[2, 4\]"
    ):
        model(tokens(2, 5), torch.ones(2, 4))
    with pytest.raises(ValueError, match="at most max_position_embeddings=6 tokens, got 7"):
        model(tokens(2, 7))
    with pytest.raises(ValueError, match="output_attentions must be False"):
        model(tokens(2, 5), output_attentions=True)


def test_a_new_head_on_a_trained_body_needs_no_report(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not fit otherwise is an error; transformers would print a table of both."""
    SetformerForMaskedLM(SetformerConfig(**TINY)).save_pretrained(tmp_path)
    logging.set_verbosity_warning()
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    load_model(SetformerForSequenceClassification.from_pretrained, tmp_path, "classifier")
    assert caplog.text == ""


def test_torch_counts_the_flops() -> None:
    """Two a multiply-add, of convolutions, linear layers and attention, counted by hand."""
    B, N, layers, heads, references, width = 3, 9, 2, 4, 5, 32
    model = make()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(tokens(B, N))
    # Of each token: the convolution over 5; key, value and projection; its mass; the MLP.
    token = 5 * width + 3 * width**2 + heads * width + 2 * 4 * width**2
    # Similarity, collect and distribute; two multiply-adds for the one Sinkhorn step, and one for
    # the normaliser of distribute.
    token += references * (3 * width + heads * (2 + 1))
    of_masses = heads * references * width  # of the references, from each text's mean
    assert counter.get_total_flops() == 2 * layers * B * (N * token + of_masses)
