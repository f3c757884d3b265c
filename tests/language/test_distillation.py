"""Distillation fits references to the attention that they replace."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from setformer_ext.language import distill_attention
from setformer_ext.language.references import References
from switched import formula, inputs, make, references


def recorded_attention(model: Any, batch: dict[str, Tensor]) -> list[tuple[Tensor, ...]]:
    """Queries, keys, values and outputs [B, H, N, D] of the layers of a softmax model."""
    calls = []

    def record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **o: Any):
        scores = query @ key.mT * o["scaling"]
        scores = scores.masked_fill(batch["attention_mask"][:, None, None] == 0, -torch.inf)
        output = scores.softmax(-1) @ value
        calls.append((query, key, value, output))
        return output.transpose(1, 2), None

    AttentionInterface.register("recorded", record)
    model.set_attn_implementation("recorded")
    with torch.no_grad():
        model(**batch)
    return calls


def test_the_error_is_that_to_the_original_model_s_attention() -> None:
    model, batch = make(), inputs()
    original = copy.deepcopy(model)
    losses = distill_attention(model, [batch], steps=1, initialize=False)
    mask = batch["attention_mask"].bool()
    errors = []
    layers = [m for m in original.modules() if isinstance(m, References)]
    for layer, (*tokens, output) in zip(layers, recorded_attention(original, batch), strict=True):
        ours = formula(layer, *tokens, mask, epsilon=8**0.5).transpose(1, 2)[mask]
        target = output.transpose(1, 2)[mask]
        errors.append((ours - target).square().sum() / target.square().sum())
    assert losses == pytest.approx([torch.stack(errors).mean().item()], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_distillation_lowers_the_error_of_references_alone(kind: str) -> None:
    model = make(kind, num_references=8).train()
    model.base_model.get_input_embeddings().eval()
    batches = [inputs(kind) for _ in range(3)]
    before = copy.deepcopy(model)
    untouched = distill_attention(copy.deepcopy(model), batches, steps=1, initialize=False)
    losses = distill_attention(model, batches, steps=60)
    assert len(losses) == 60
    assert losses[0] < untouched[0]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    for (name, module), (_, old) in zip(model.named_modules(), before.named_modules(), strict=True):
        assert module.training == old.training, name
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before.state_dict()[name]) == (name not in references(model))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("initialize", [False, True])
def test_padding_has_no_say_in_what_is_distilled(initialize: bool) -> None:
    model, batch = make(num_references=3), inputs()
    padding = batch["attention_mask"] == 0
    assert padding.any()
    assert not padding.all()
    others = batch | {"input_ids": torch.where(padding, 1, batch["input_ids"])}
    assert not torch.equal(others["input_ids"], batch["input_ids"])
    found = []
    for given in (batch, others):
        learner = copy.deepcopy(model)
        torch.manual_seed(1)
        losses = distill_attention(learner, [given], steps=4, initialize=initialize)
        found.append((losses, references(learner)))
    torch.testing.assert_close(*found)


def test_as_many_references_as_queries_answer_as_softmax_does() -> None:
    """Clusters are then single queries, and sharp choices find each token its own."""
    model = make("bert", num_references=7)
    batch = {"input_ids": torch.randint(2, 60, (1, 7))}
    losses = distill_attention(model, [batch], steps=100, lr=0.1)
    assert losses[-1] < 0.02


def test_distillation_says_what_it_cannot_do() -> None:
    model, batch = make(), inputs()
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        distill_attention(model, [batch], steps=0)
    with pytest.raises(ValueError, match=r"batches must hold .* num_references=5 .* got 0"):
        distill_attention(model, [], steps=1)
    with pytest.raises(ValueError, match=r"batches must hold at least one.* no generator"):
        distill_attention(model, (batch for _ in range(2)), steps=3)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="must have attn_implementation='set_attention'"):
        distill_attention(model, [batch], steps=1)
    with pytest.raises(ValueError, match="BertModel without references"):
        distill_attention(make(implementation="sdpa"), [batch], steps=1)
