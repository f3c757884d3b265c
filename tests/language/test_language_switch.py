"""attn_implementation="set_attention" in models of transformers.

It computes the formula; padding changes nothing, on either side; references are trained, saved,
loaded and copied with their model.
"""

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from setformer_ext.language import register
from setformer_ext.language.references import References
from setformer_ext.language.switch import attention_forward
from switched import (
    CONFIGS,
    NAME,
    TEXT,
    VISION,
    attention_module,
    formula,
    inputs,
    make,
    randomize,
    references,
)


@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("epsilon", [None, 0.7])
@pytest.mark.parametrize("padded", [False, True])
def test_the_function_is_the_formula(iterations: int, epsilon: float | None, padded: bool) -> None:
    module = attention_module(epsilon=epsilon, iterations=iterations)
    query, key, value = torch.randn(3, 2, 4, 13, 8)
    mask = torch.ones(2, 13, dtype=torch.bool)
    if padded:
        mask[0, 9:] = False
        mask[1, :3] = False
    output, weights = attention_forward(
        module, query, key, value, mask if padded else None, scaling=0.4
    )
    expected = formula(module.set_attention, query, key, value, mask, epsilon or 1 / 0.4)
    torch.testing.assert_close(output.transpose(1, 2).double(), expected, atol=1e-5, rtol=0)
    assert weights is None
    assert output.shape == (2, 13, 4, 8)


def test_scaling_is_that_of_softmax_attention_by_default() -> None:
    module = attention_module()
    tokens = torch.randn(3, 2, 4, 13, 8)
    output, _ = attention_forward(module, *tokens, None)
    expected, _ = attention_forward(module, *tokens, None, scaling=8**-0.5)
    assert torch.equal(output, expected)


def test_one_reference_that_is_a_query_answers_it_as_softmax_does() -> None:
    module = References(4, 8, num_references=1, iterations=0)
    query, key, value = torch.randn(3, 1, 4, 13, 8)
    module.reference.data = query[0, :, 6:7].clone()
    output = module(query, key, value, None, 0.4)[:, :, 6]
    scores = torch.einsum("bhd,bhnd->bhn", query[:, :, 6], key) * 0.4
    expected = torch.einsum("bhn,bhnd->bhd", scores.softmax(-1), value)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("iterations", [0, 2])
def test_queries_may_share_keys(iterations: int) -> None:
    """The same as with each key's head repeated for its consecutive heads of queries."""
    module = attention_module(heads=6, iterations=iterations)
    module.is_causal = False
    query = torch.randn(2, 6, 9, 8)
    key, value = torch.randn(2, 2, 2, 9, 8)
    output, _ = attention_forward(module, query, key, value, None)
    repeated = [torch.stack([x[:, i // 3] for i in range(6)], 1) for x in (key, value)]
    expected, _ = attention_forward(module, query, *repeated, None)
    assert torch.equal(output, expected)


# In models


def test_shared_keys_in_a_model() -> None:
    """EuroBERT's queries share keys; with their projections repeated every query has its own."""
    special = {f"{name}_token_id": 1 for name in ("pad", "bos", "eos", "mask")}

    def eurobert(shared: int) -> Any:
        config = transformers.EuroBertConfig(**TEXT, **special, num_key_value_heads=shared)
        return transformers.AutoModel.from_config(config, attn_implementation=NAME).eval()

    model, expected = eurobert(2), eurobert(4)
    weights = model.state_dict()
    for name in weights:
        if ".k_proj." in name or ".v_proj." in name:
            heads = weights[name].unflatten(0, (2, 8))
            weights[name] = heads.repeat_interleave(2, 0).flatten(0, 1)
    expected.load_state_dict(weights)
    batch = inputs()
    torch.testing.assert_close(
        model(**batch).last_hidden_state, expected(**batch).last_hidden_state
    )


def test_transport_is_the_default_and_t_0_an_option() -> None:
    """Every valid token gives its mass a_i and every reference has b_j: softmaxes know neither."""
    module = attention_module()
    layer = module.set_attention
    assert layer.iterations >= 1
    tokens = torch.randn(3, 2, 4, 13, 8)
    before, _ = attention_forward(module, *tokens, None)
    layer.reference_log_mass.data.add_(torch.randn(4, 5))
    after, _ = attention_forward(module, *tokens, None)
    assert not torch.allclose(before, after, atol=1e-3)
    softmaxes = attention_module(iterations=0).set_attention
    names = {name for name, _ in softmaxes.named_parameters()}
    assert names == {"reference", "query_log_scale"}


def test_models_saved_without_transport_stay_without(tmp_path: Path) -> None:
    """What earlier versions saved says iterations 0, and has neither masses nor points."""
    model = make(iterations=0)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation=NAME)
    assert loaded.config.set_attention["iterations"] == 0
    assert len(references(loaded)) == 2 * 2
    batch = inputs()
    assert torch.equal(loaded(**batch).last_hidden_state, model(**batch).last_hidden_state)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("iterations", [0, 2])
def test_padding_changes_nothing(kind: str, side: str, iterations: int) -> None:
    model = make(kind, iterations=iterations)
    words = torch.randint(2, 60, (1, 7))
    alone = model(words).last_hidden_state
    padding = (4, 0) if side == "left" else (0, 4)
    pad = lambda x, fill: nn.functional.pad(x, padding, value=fill)  # noqa: E731
    padded = torch.cat([pad(words, 1), torch.randint(2, 60, (1, 11))])
    mask = torch.cat([pad(torch.ones_like(words), 0), torch.ones(1, 11, dtype=torch.int64)])
    positions = {}
    if kind == "bert":  # which has the places of padding counted otherwise
        positions["position_ids"] = torch.stack([pad(torch.arange(7), 0), torch.arange(11)])
    output = model(padded, mask, **positions).last_hidden_state[0][mask[0].bool()]
    torch.testing.assert_close(output, alone[0], atol=2e-5, rtol=1e-5)
    # Of positions without a mask transformers takes those that start again for packed sequences.
    unmasked = model(padded, torch.ones_like(mask), **positions).last_hidden_state
    assert not torch.allclose(output, unmasked[0, mask[0] > 0])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
@pytest.mark.parametrize("positional", [False, True])
@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForSequenceClassification"])
def test_additive_masks_are_understood(dtype: torch.dtype, positional: bool, auto: str) -> None:
    """Whatever says which tokens are valid, the answer is the same; also where none is padding."""
    model, batch = make(auto=getattr(transformers, auto)), inputs()
    words = batch["input_ids"]
    call = lambda m: model(words, m)[0] if positional else model(words, attention_mask=m)[0]  # noqa: E731
    some = batch["attention_mask"]
    for valid in (some, torch.ones_like(some)):
        expected = model(input_ids=words, attention_mask=valid)[0]
        assert torch.equal(call(valid.to(dtype)), expected)
        for padding in (-torch.inf, torch.finfo(torch.float32).min, -1e4):
            additive = torch.zeros(valid.shape).masked_fill(valid == 0, padding)
            assert torch.equal(call(additive), expected)
    for integers in (torch.int64, torch.int32, torch.int8):
        assert torch.equal(call((1 - some.to(integers)) * -100), model(words, some)[0])
    assert torch.equal(call(torch.full(some.shape, -1e4)), call(torch.zeros_like(some)))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(words, additive)[0], expected)
    torch.testing.assert_close(compiled(words, (1 - some) * -100)[0], model(words, some)[0])


def test_attention_of_padding_is_zero_and_without_gradient() -> None:
    model = make()
    seen = []
    model.encoder.layer[0].attention.self.set_attention.register_forward_hook(
        lambda module, arguments, output: seen.append(output)
    )
    batch = inputs()
    words = model.embeddings.word_embeddings(batch["input_ids"]).detach().requires_grad_()
    valid = batch["attention_mask"].bool()
    output = model(inputs_embeds=words, attention_mask=batch["attention_mask"])
    output.last_hidden_state[valid].square().sum().backward()
    assert (seen[0].transpose(1, 2)[~valid] == 0).all()
    assert (words.grad[~valid] == 0).all()
    assert (words.grad[valid] != 0).any(-1).all()


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("iterations", [0, 1])
def test_every_reference_learns(kind: str, iterations: int) -> None:
    model = make(kind, iterations=iterations).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    before = {name: tensor.clone() for name, tensor in references(model).items()}
    output = model(**inputs(kind)).last_hidden_state
    (output * torch.randn_like(output)).sum().backward()
    optimizer.step()
    assert len(before) == 2 * (4 if iterations else 2)
    for name, tensor in references(model).items():
        assert tensor.isfinite().all(), name
        changed = tensor != before[name]
        assert (changed if tensor.dim() == 1 else changed.any(-1)).all(), name


@pytest.mark.parametrize("kind", CONFIGS)
def test_saving_and_loading_keeps_everything(kind: str, tmp_path: Path) -> None:
    auto = (
        transformers.AutoModelForSequenceClassification
        if kind in ("bert", "roberta")
        else transformers.AutoModelForImageClassification
    )
    model = make(kind, auto, iterations=1, epsilon=3.5)
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path, attn_implementation=NAME)
    assert loaded.config.set_attention == {"num_references": 5, "epsilon": 3.5, "iterations": 1}
    assert len(references(loaded)) == 8
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    batch = inputs(kind)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForSequenceClassification"])
def test_an_ordinary_checkpoint_gets_references(auto: str, tmp_path: Path) -> None:
    original = transformers.BertModel(CONFIGS["bert"]())
    original.save_pretrained(tmp_path)
    model = getattr(transformers, auto).from_pretrained(tmp_path, attn_implementation=NAME)
    assert model.config.set_attention == {"num_references": 64, "epsilon": None, "iterations": 1}
    added = references(model)
    assert len(added) == 2 * 4
    for name, tensor in added.items():
        expected = 0 if name.endswith(("log_scale", "log_mass")) else 1
        assert tensor.double().std().item() == pytest.approx(expected, abs=0.1), name
    base = model.base_model.state_dict()
    for name, tensor in original.state_dict().items():
        assert torch.equal(base[name], tensor), name
    assert model(**inputs())[0].isfinite().all()


def test_options_may_be_numbers_of_numpy(tmp_path: Path) -> None:
    model = make(
        num_references=np.int64(6), epsilon=np.float32(0.5), iterations=np.array([2], np.int32)[0]
    )
    assert model.config.set_attention == {"num_references": 6, "epsilon": 0.5, "iterations": 2}
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation=NAME)
    batch = inputs()
    assert torch.equal(loaded(**batch).last_hidden_state, model(**batch).last_hidden_state)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    ("option", "value"), [("iterations", 0), ("num_references", 64), ("epsilon", 2.0)]
)
def test_options_stay_those_of_the_references(
    option: str, value: float, inside: bool, tmp_path: Path
) -> None:
    """Changed later they are refused; what is saved gives the same answers, and says what it is."""
    auto = transformers.AutoModelForSequenceClassification
    model = make("bert", auto if inside else transformers.AutoModel)
    batch, own = inputs(), dict(model.config.set_attention)
    expected = model(**batch)[0]
    model.set_attn_implementation("sdpa")
    model.set_attn_implementation(NAME)
    model.set_attn_implementation(NAME)
    model.config.set_attention = own | {option: value}
    refusal = rf"config\.set_attention: {option} must stay {own[option]}.*got {value}.*anew"
    with pytest.raises(ValueError, match=refusal):
        model.set_attn_implementation(NAME)
    assert torch.equal(model(**batch)[0], expected)
    with pytest.warns(UserWarning, match=r"config\.set_attention: saved as"):
        model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation=NAME)
    assert loaded.config.set_attention == model.config.set_attention == own
    assert torch.equal(loaded(**batch)[0], expected)
    model.set_attn_implementation(NAME)


def test_switching_to_and_fro() -> None:
    model = make(implementation="sdpa")
    batch = inputs()
    original = model(**batch).last_hidden_state
    assert not references(model)
    model.set_attn_implementation(NAME)
    added = references(model)
    assert len(added) == 2 * 4
    switched = model(**batch).last_hidden_state
    assert not torch.allclose(switched, original, atol=0.01)
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(**batch).last_hidden_state, original)
    model.set_attn_implementation(NAME)
    assert all(torch.equal(tensor, references(model)[name]) for name, tensor in added.items())
    assert torch.equal(model(**batch).last_hidden_state, switched)


def test_becoming_part_of_another_model_keeps_references() -> None:
    """Its initialisation is for what has no values yet."""
    model = make(implementation="sdpa")
    model.set_attn_implementation(NAME)
    randomize(model)
    before = {name: tensor.clone() for name, tensor in references(model).items()}
    model.init_weights()
    assert len(before) == 2 * 4
    assert all(torch.equal(tensor, before[name]) for name, tensor in references(model).items())


def test_references_are_of_the_model_s_dtype_and_device() -> None:
    model = make(implementation="sdpa").to(torch.bfloat16)
    model.set_attn_implementation(NAME)
    assert {tensor.dtype for tensor in references(model).values()} == {torch.bfloat16}
    assert model(**inputs()).last_hidden_state.dtype == torch.bfloat16
    with torch.device("meta"):
        model = make()
    assert {tensor.device.type for tensor in references(model).values()} == {"meta"}


def test_autocast() -> None:
    model = make()
    batch = inputs()
    expected = model(**batch).last_hidden_state
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**batch).last_hidden_state
    torch.testing.assert_close(output.float(), expected, atol=0.1, rtol=0.1)


def test_part_of_a_model() -> None:
    """CLIP's text model is causal, its vision model is not."""
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION)
    model = transformers.CLIPModel(config)
    model.set_attn_implementation({"vision_config": NAME})
    assert len(references(model)) == 2 * 4
    assert all(name.startswith("vision_model.") for name in references(model))
    output = model.get_image_features(**inputs("vit"))
    assert output.pooler_output.isfinite().all()


def test_copies_are_their_own() -> None:
    model = make(iterations=1)
    batch = inputs()
    expected = model(**batch).last_hidden_state
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    randomize(model)
    assert not torch.allclose(model(**batch).last_hidden_state, expected, atol=0.01)
    for each in copies:
        assert torch.equal(each(**batch).last_hidden_state, expected)


def test_registering_again_changes_nothing() -> None:
    before = (PreTrainedModel.post_init, AttentionInterface()[NAME])
    register()
    assert (PreTrainedModel.post_init, AttentionInterface()[NAME]) == before


@pytest.mark.slow
def test_compiles_into_one_graph() -> None:
    model = make(iterations=1)
    batch = inputs()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = model(**batch).last_hidden_state
    torch.testing.assert_close(compiled(**batch).last_hidden_state, expected)


# What is refused
