"""What is not attention of all tokens to all valid tokens is refused, by name."""

import copy
from typing import Any

import pytest
import torch
import transformers

from setformer_ext.language.switch import attention_forward
from switched import CAUSAL, CONFIGS, NAME, TEXT, attention_module, inputs, make, references


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
    with refused("attention_mask", r"bool \[B, N\]", r"float32 \[3, 1, 11, 11\]"):
        model(batch["input_ids"], torch.zeros(3, 1, 11, 11))  # additive
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


@pytest.mark.parametrize(
    ("option", "value", "got"),
    [
        ("is_causal", True, "True"),
        ("output_attentions", True, "True"),
        ("position_bias", torch.zeros(1, 4, 6, 6), r"\[1, 4, 6, 6\]"),
        ("sliding_window", 3, "3"),
        ("softcap", 30.0, "30"),
        ("s_aux", torch.zeros(4), r"\[4\]"),
        ("cu_seq_lens_q", torch.tensor([0, 6]), r"\[2\]"),
    ],
)
def test_options_that_change_other_attentions_are_refused(
    option: str, value: Any, got: str
) -> None:
    x = torch.randn(1, 4, 6, 8)
    with refused(f"{option} must be None or False", f"got {got}"):
        attention_forward(attention_module(), x, x, x, None, **{option: value})
    for absent in (None, False):
        attention_forward(attention_module(), x, x, x, None, **{option: absent})


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
        ({"iterations": True}, "iterations must be an int >= 0, got True"),
        ({"epsilon": True}, r"epsilon must be a finite number > 0.*got True"),
        ({"epsilon": 0.0}, r"epsilon must be a finite number > 0.*got 0\.0"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="config.set_attention: " + message):
        make(**options)


def test_options_are_a_dict() -> None:
    config = CONFIGS["bert"](set_attention=5)
    with pytest.raises(ValueError, match=r"config\.set_attention must be a dict of options, got 5"):
        transformers.AutoModel.from_config(config, attn_implementation=NAME)
