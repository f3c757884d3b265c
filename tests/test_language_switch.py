"""attn_implementation="set_attention" in models of transformers.

It computes the formula; padding changes nothing, on either side; references are trained, saved,
loaded, copied and distilled with their model; what is not attention of all tokens to all valid
tokens is refused, by name.
"""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from setformer_ext.language import distill_attention, register
from setformer_ext.language.references import References
from setformer_ext.language.switch import attention_forward

register()

NAME = "set_attention"
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
TEXT = {**SMALL, "vocab_size": 60, "initializer_range": 0.3}
VISION = {**SMALL, "image_size": 30, "patch_size": 6, "initializer_range": 0.3}
CONFIGS: dict[str, Callable[..., Any]] = {
    "bert": lambda **o: transformers.BertConfig(**TEXT, **o),
    "roberta": lambda **o: transformers.RobertaConfig(**TEXT, pad_token_id=1, **o),
    "vit": lambda **o: transformers.ViTConfig(**VISION, **o),
    "dinov2": lambda **o: transformers.Dinov2Config(**VISION, **o),
}
CAUSAL = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**TEXT)),
    "gpt2": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=60),
    ),
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()


def make(
    kind: str = "bert",
    auto: Any = transformers.AutoModel,
    implementation: str = NAME,
    **options: Any,
) -> Any:
    """In eval mode, with references and masses that do something."""
    config = CONFIGS[kind](set_attention={"num_references": 5, **options})
    model = auto.from_config(config, attn_implementation=implementation).eval()
    randomize(model)
    return model


def randomize(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, References):
            for parameter in module.parameters():
                nn.init.normal_(parameter)


def references(model: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in model.state_dict().items() if f".{NAME}." in n}


def inputs(kind: str = "bert") -> dict[str, Tensor]:
    if kind in ("vit", "dinov2"):
        return {"pixel_values": torch.randn(3, 3, 30, 30)}
    words = torch.randint(2, 60, (3, 11))
    mask = torch.ones_like(words)
    mask[0, 7:] = 0
    mask[2, 2:] = 0
    return {"input_ids": words, "attention_mask": mask}


# The formula


def formula(
    module: References, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, epsilon: float
) -> Tensor:
    """Step by step in float64, as the design has it: [B, H, N, Dv]."""
    module = copy.deepcopy(module).double()
    q, k, v = query.double(), key.double(), value.double()
    c = module.query_log_scale.exp()
    s_key = torch.einsum("bhnd,hmd->bhnm", k, module.reference) / epsilon
    s_query = torch.einsum("bhnd,hmd,h->bhnm", q, module.reference, c) / epsilon
    outside = ~mask[:, None, :]
    log_a = torch.zeros_like(k[..., 0])
    log_b = torch.zeros_like(module.reference[..., 0])
    if module.iterations:
        log_a = torch.einsum("bhnd,hd->bhn", k, module.token_mass)
        log_b = module.reference_log_mass.log_softmax(-1)

    def solve(s: Tensor, log_a: Tensor) -> tuple[Tensor, Tensor]:
        log_a = log_a.masked_fill(outside, -torch.inf).log_softmax(-1)
        f, g = log_a, torch.zeros_like(s[:, :, 0])
        for _ in range(module.iterations):
            f = log_a - (s + g[:, :, None]).logsumexp(-1)
            g = log_b - (s + f[..., None]).logsumexp(-2)
        return f, g

    f, _ = solve(s_key, log_a)
    _, g = solve(s_query, torch.zeros_like(log_a))
    pooled = (s_key + f[..., None]).softmax(-2).mT @ v
    output = (s_query + g[:, :, None]).softmax(-1) @ pooled
    return output.masked_fill(outside[..., None], 0)


def attention_module(heads: int = 4, depth: int = 8, **options: Any) -> nn.Module:
    """As much of an attention module as the function looks at."""
    module = nn.Module()
    module.set_attention = References(heads, depth, num_references=5, **options)
    randomize(module)
    return module


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
    module = References(4, 8, num_references=1)
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
    assert not torch.allclose(output, model(padded, **positions).last_hidden_state[0, mask[0] > 0])


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
    assert model.config.set_attention == {"num_references": 64, "epsilon": None, "iterations": 0}
    added = references(model)
    assert len(added) == 4
    for name, tensor in added.items():
        expected = 0 if name.endswith("log_scale") else 1
        assert tensor.double().std().item() == pytest.approx(expected, abs=0.1), name
    base = model.base_model.state_dict()
    for name, tensor in original.state_dict().items():
        assert torch.equal(base[name], tensor), name
    assert model(**inputs())[0].isfinite().all()


def test_switching_to_and_fro() -> None:
    model = make(implementation="sdpa")
    batch = inputs()
    original = model(**batch).last_hidden_state
    assert not references(model)
    model.set_attn_implementation(NAME)
    added = references(model)
    assert len(added) == 4
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
    assert len(before) == 4
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
    assert len(references(model)) == 4
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


def test_compiles_into_one_graph() -> None:
    model = make(iterations=1)
    batch = inputs()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = model(**batch).last_hidden_state
    torch.testing.assert_close(compiled(**batch).last_hidden_state, expected)


# What is refused


def refused(*words: str) -> Any:
    return pytest.raises(ValueError, match=".*".join(["set_attention: ", *words]))


@pytest.mark.parametrize("kind", CAUSAL)
def test_causal_models_are_refused(kind: str) -> None:
    cls, config = CAUSAL[kind]
    expected = refused(r"layers\.0|h\.0", "bidirectional", "got is_causal True", "sdpa")
    with expected:
        transformers.AutoModelForCausalLM.from_config(
            copy.deepcopy(config), attn_implementation=NAME
        )
    model = cls(copy.deepcopy(config)).eval()
    with expected:
        model.set_attn_implementation(NAME)
    assert model.config._attn_implementation == "sdpa"
    assert not references(model)
    assert model(torch.arange(5)[None]).logits.isfinite().all()


def test_decoders_are_refused() -> None:
    with refused("bidirectional"):
        transformers.BertModel(CONFIGS["bert"](is_decoder=True, attn_implementation=NAME))
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 60}
    model = transformers.BartModel(transformers.BartConfig(**sizes))
    with refused("decoder.layers.0.self_attn of BartModel", "bidirectional"):
        model.set_attn_implementation(NAME)


def test_sliding_windows_are_refused() -> None:
    special = {f"{name}_token_id": 1 for name in ("pad", "bos", "eos", "cls", "sep")}
    model = transformers.ModernBertModel(transformers.ModernBertConfig(**TEXT, **special))
    with refused("layers.1.attn of ModernBertModel", "full attention", "sliding_window"):
        model.set_attn_implementation(NAME)


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (transformers.ResNetModel, transformers.ResNetConfig(hidden_sizes=[8], depths=[1])),
        (transformers.DebertaV2Model, transformers.DebertaV2Config(**TEXT)),
    ],
)
def test_models_without_the_interface_are_refused(cls: Any, config: Any) -> None:
    model = cls(copy.deepcopy(config))
    with refused(cls.__name__, "AttentionInterface"):
        model.set_attn_implementation(NAME)
    config._attn_implementation = NAME
    with refused(cls.__name__, "AttentionInterface"):
        cls(config)


def test_biases_of_scores_are_refused() -> None:
    config = transformers.T5Config(d_model=32, d_ff=32, num_layers=1, num_heads=2, vocab_size=60)
    model = transformers.T5EncoderModel._from_config(config, attn_implementation=NAME)
    with refused("position_bias must be None"):
        model(torch.arange(5)[None])
    config = transformers.SwinConfig(image_size=32, embed_dim=16, depths=[1], num_heads=[2])
    swin = transformers.SwinModel._from_config(config, attn_implementation=NAME)
    with refused("attention_mask", r"bool \[B, N\]", "float32"):
        swin(torch.randn(1, 3, 32, 32))


def test_masks_of_pairs_are_refused() -> None:
    model, batch = make(), inputs()
    with refused("attention_mask", r"bool \[B, N\]", r"\[3, 1, 11, 11\]"):
        model(batch["input_ids"], torch.ones(3, 1, 11, 11, dtype=torch.bool))
    mask = transformers.masking_utils.create_bidirectional_mask
    hidden = torch.randn(3, 11, 32)
    with refused("of full bidirectional attention", "and_mask"):
        mask(model.config, hidden, None, and_mask_function=lambda b, h, q, k: q >= k)
    with refused("of full bidirectional attention", "causal_mask"):
        transformers.masking_utils.create_causal_mask(model.config, hidden, None, None)
    with refused("N=11 tokens", "got 5"):
        mask(model.config, hidden, None, encoder_hidden_states=torch.randn(3, 5, 32))


def test_cross_attention_is_refused() -> None:
    query, other = torch.randn(1, 4, 6, 8), torch.randn(1, 4, 7, 8)
    with refused("key", "N=6 tokens", r"got \[1, 4, 7, 8\]"):
        attention_forward(attention_module(), query, other, other, None)


def test_asking_for_attention_weights_is_refused() -> None:
    with refused("output_attentions"):
        make()(**inputs(), output_attentions=True)


def test_a_module_without_references_says_what_to_do() -> None:
    model = make(implementation="sdpa")
    model.config._attn_implementation = NAME
    with pytest.raises(RuntimeError, match=r"BertSelfAttention.*register\(\).*set_attn_impl"):
        model(**inputs())
    model.set_attn_implementation(NAME)
    model(**inputs())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"references": 5}, r"options must be of .*num_references.*got \['references'\]"),
        ({"num_references": 0}, "num_references must be an int >= 1, got 0"),
        ({"iterations": -1}, "iterations must be an int >= 0, got -1"),
        ({"epsilon": 0.0}, r"epsilon must be a finite number > 0.*got 0\.0"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="config.set_attention: " + message):
        make(**options)


# Distillation


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
