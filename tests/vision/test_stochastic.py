"""Layers that draw at random while they are trained: on average they are the layer that is
evaluated, and what they drop has the share that was asked for."""

import math
from collections.abc import Callable

import pytest
import torch
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn

from setformer_ext.language import SetformerConfig, SetformerForSequenceClassification
from setformer_ext.language.encoder import SetformerEmbeddings, SetformerLayer
from setformer_ext.modules import SetAttention
from setformer_ext.vision.blocks import Block

DRAWS = 4000
RATE = 0.3
CONFIG = {
    "vocab_size": 20,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_references": 3,
    "intermediate_size": 8,
    "hidden_dropout_prob": RATE,
    "num_hidden_layers": 1,
}


def compared(module: nn.Module, forward: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Outputs of one input in training, [DRAWS, ...], and in evaluation, which their mean is.

    The mean of DRAWS values is off by its deviation, and by five of them once in a million.
    """
    module.eval()
    with torch.no_grad():
        expected = forward()
        assert torch.equal(expected[0], expected[-1]), "one input DRAWS times"
        module.train()
        draws = forward()
    deviation = draws.std(0) / math.sqrt(DRAWS)
    assert ((draws.mean(0) - expected[0]).abs() <= 5 * deviation + 1e-5).all()
    assert deviation.max() > 0
    return draws, expected[0]


def assert_share(found: Tensor, wanted: float) -> None:
    """Of booleans, drawn independently."""
    deviation = math.sqrt(wanted * (1 - wanted) / found.numel())
    assert abs(found.double().mean().item() - wanted) < 5 * deviation


def silent(linear: nn.Linear) -> None:
    """A branch that adds nothing: behind another one it would not be linear in what that drops."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)


@pytest.mark.parametrize("branch", ["attention", "mlp"])
def test_stochastic_depth_of_a_block(branch: str) -> None:
    """A sample's branch is there as a whole or not at all."""
    block = Block(16, SetAttention(16, 2, 3), mlp_ratio=1, drop_path=RATE)
    freeze_batch_norm_2d(block)  # other samples, skipped or not, must not matter
    silent(block.mlp.reduce if branch == "attention" else block.attention.projection)
    x = torch.randn(1, 16, 3, 2).expand(DRAWS, -1, -1, -1)
    draws, expected = compared(block, lambda: block(x))
    dropped = (draws - x).abs().flatten(1).amax(1) < 1e-6
    assert_share(dropped, RATE)
    torch.testing.assert_close(
        draws[~dropped], (x[0] + (expected - x[0]) / (1 - RATE)).expand_as(draws[~dropped])
    )


@pytest.mark.parametrize("branch", ["attention", "mlp"])
def test_dropout_of_an_encoders_layer(branch: str) -> None:
    layer = SetformerLayer(SetformerConfig(**CONFIG))
    silent(layer.mlp[2] if branch == "attention" else layer.attention.projection)
    x = torch.randn(1, 5, 16).expand(DRAWS, -1, -1)
    mask = torch.tensor([[True, True, True, False, False]]).expand(DRAWS, -1)
    draws, expected = compared(layer, lambda: layer(x, mask))
    local = x[0] if layer.position is None else x[0] + layer.position(x[:1], mask[:1])[0]
    shown = (expected - local).abs() > 1e-4  # what a dropped number would be told from
    assert_share(((draws - local).abs() < 1e-6)[:, shown], RATE)


def test_dropout_of_embeddings() -> None:
    embeddings = SetformerEmbeddings(SetformerConfig(**CONFIG))
    words = torch.randn(1, 4, 16).expand(DRAWS, -1, -1)
    draws, _ = compared(embeddings, lambda: embeddings(words, None, None))
    assert_share(draws == 0, RATE)


def test_dropout_before_the_classes() -> None:
    """The classifier's own rate; everything before it is not stochastic here."""
    config = SetformerConfig(**CONFIG | {"hidden_dropout_prob": 0.0}, classifier_dropout=RATE)
    model = SetformerForSequenceClassification(config)
    text = torch.randint(1, 20, (1, 6)).expand(DRAWS, -1)
    draws, expected = compared(model, lambda: model(text).logits)
    # Each of C numbers h_c w_c is 0 or 1 / (1 - p) of itself, of variance (h_c w_c)^2 p / (1 - p).
    with torch.no_grad():
        pooled = model.head(model.setformer(text[:1]).last_hidden_state.mean(1))[0]
    parts = pooled * model.classifier.weight  # [classes, C]
    variance = parts.square().sum(1) * RATE / (1 - RATE)
    # A variance that is estimated by so many draws is off by (2 / DRAWS)^(1/2), and more where
    # few parts make up most of it.
    torch.testing.assert_close(draws.var(0), variance, rtol=0.15, atol=0)
    assert expected.shape == variance.shape
