"""Models with SeT attention whose parts others wrap: peft, torch.compile, parametrisations,
quantisation. References are found, trained, distilled, saved and loaded, or it is said that not."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrize

from setformer_ext.language import distill_attention
from setformer_ext.language.references import References
from switched import CONFIGS, NAME, inputs, make, references

CLASSIFIER = transformers.AutoModelForSequenceClassification
LORAS: dict[str, dict[str, Any]] = {
    "references saved": {"modules_to_save": [NAME]},
    "references adapted": {"target_parameters": [f"{NAME}.reference"]},
    "references and masses adapted": {
        "target_parameters": [f"{NAME}.reference", f"{NAME}.reference_log_mass"]
    },
}


def lora(model: nn.Module, **options: Any) -> Any:
    config = LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query", "value"], **options)
    return get_peft_model(model, config)


def train(model: nn.Module, batch: dict[str, Tensor], steps: int = 3) -> None:
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.05)
    for _ in range(steps):
        model(**batch, labels=torch.tensor([0, 1, 0])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def loaded(folder: Path, seed: int) -> Any:
    """As another process would load it: what the checkpoint lacks is drawn anew."""
    torch.manual_seed(seed)
    return CLASSIFIER.from_pretrained(folder, attn_implementation=NAME)


@pytest.mark.parametrize("kind", LORAS)
def test_an_adapter_gives_the_same_answers_when_loaded(kind: str, tmp_path: Path) -> None:
    make("bert", CLASSIFIER).save_pretrained(tmp_path / "base")
    batch = inputs()
    base = loaded(tmp_path / "base", 1)
    before = base(**batch).logits
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="set_attention")
        model = lora(base, **LORAS[kind])
        torch.testing.assert_close(model.eval()(**batch).logits, before)
        train(model, batch)
    expected = model(**batch).logits
    assert not torch.allclose(expected, before, atol=0.01)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(loaded(tmp_path / "base", 2), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(**batch).logits, expected)
    merged = again.merge_and_unload()
    assert sum(isinstance(module, References) for module in merged.modules()) == 2
    torch.testing.assert_close(merged(**batch).logits, expected, atol=1e-4, rtol=1e-4)


def test_an_adapter_saves_the_references_that_the_base_model_lacks(tmp_path: Path) -> None:
    make("bert", CLASSIFIER, "sdpa").save_pretrained(tmp_path / "base")
    batch = inputs()
    model = lora(loaded(tmp_path / "base", 1), modules_to_save=[NAME])
    train(model, batch)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(loaded(tmp_path / "base", 2), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("options", [{}, LORAS["references adapted"]])
def test_an_adapter_whose_references_would_be_lost_says_so(
    options: dict[str, Any], tmp_path: Path
) -> None:
    make("bert", CLASSIFIER, "sdpa").save_pretrained(tmp_path / "base")
    model = lora(loaded(tmp_path / "base", 1), **options).train()
    with pytest.warns(UserWarning, match=r"references are frozen.*modules_to_save"):
        model(**inputs())
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**inputs())


def test_an_adapter_around_references_that_were_distilled_since_says_so(tmp_path: Path) -> None:
    """Those of the checkpoint, which the next loading has, are others."""
    make("bert", CLASSIFIER).save_pretrained(tmp_path / "base")
    base, batch = loaded(tmp_path / "base", 1), inputs()
    distill_attention(base, [batch], steps=2)
    base.save_pretrained(tmp_path / "distilled")
    with pytest.warns(UserWarning, match=r"references are frozen.*modules_to_save"):
        lora(base).train()(**batch)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="set_attention")
        lora(loaded(tmp_path / "distilled", 2)).train()(**batch)


def test_adapters_come_after_switching() -> None:
    model = lora(CLASSIFIER.from_config(CONFIGS["bert"]()))
    with pytest.raises(ValueError, match="must be switched before it gets adapters"):
        model.set_attn_implementation(NAME)
    assert not references(model)


# What wraps the references, or a module around them


def compiled(model: nn.Module) -> nn.Module:
    for layer in model.encoder.layer:
        attention = layer.attention.self
        attention.set_attention = torch.compile(attention.set_attention, backend="eager")
    return model


def compiled_as_a_whole(model: nn.Module) -> nn.Module:
    model = torch.compile(model, backend="eager")
    model(**inputs())  # from here on it would not notice hooks
    return model


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def parametrised(model: nn.Module) -> nn.Module:
    for layer in model.encoder.layer:
        attention = layer.attention.self
        parametrize.register_parametrization(attention.set_attention, "reference", Nothing())
    return model


def adapted(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LoraConfig(target_modules=["query"], modules_to_save=[NAME]))


def frozen(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LoraConfig(target_modules=["query"]))


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [compiled, compiled_as_a_whole, parametrised, adapted, frozen])
def test_wrapped_models_answer_and_are_distilled(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model, batch = make(), inputs()
    expected = model(**batch).last_hidden_state
    plain = copy.deepcopy(model)
    model = wrap(model).eval()
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    torch.testing.assert_close(model(**batch).last_hidden_state, expected)
    torch.manual_seed(1)
    losses = distill_attention(model, [batch], steps=5)
    torch.manual_seed(1)
    assert losses == pytest.approx(distill_attention(plain, [batch], steps=5), rel=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(
            model(**batch).last_hidden_state, plain(**batch).last_hidden_state, atol=1e-4, rtol=1e-3
        )
    assert trained == {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_wrapped_attention_module_gets_references_once() -> None:
    model = make(implementation="sdpa")
    for layer in model.encoder.layer:
        layer.attention.self = torch.compile(layer.attention.self, backend="eager")
    model.set_attn_implementation(NAME)
    assert sum(isinstance(module, References) for module in model.modules()) == 2
    assert model(**inputs()).last_hidden_state.isfinite().all()


def test_references_of_a_quantised_model_are_of_the_usual_dtype() -> None:
    model = make(implementation="sdpa")
    for layer in model.encoder.layer:
        for name, parameter in list(layer.attention.self.named_parameters()):
            module = layer.attention.self.get_submodule(name.partition(".")[0])
            delattr(module, name.partition(".")[2])
            module.register_buffer(name.partition(".")[2], parameter.to(torch.float8_e4m3fn))
    model.set_attn_implementation(NAME)
    assert {tensor.dtype for tensor in references(model).values()} == {torch.float32}
