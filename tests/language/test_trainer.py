"""transformers' own Trainer on models with SeT attention: what decays, and what does not."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from transformers import Trainer, TrainingArguments

from setformer_ext.language import SetformerConfig, SetformerForSequenceClassification
from switched import NAME, make


def encoder() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return SetformerForSequenceClassification(
        SetformerConfig(vocab_size=60, **sizes, num_references=3)
    )


def switched() -> nn.Module:
    return make("bert", transformers.AutoModelForSequenceClassification, iterations=1)


def adapted() -> nn.Module:
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=[NAME])
    return get_peft_model(switched(), config)


def parametrised() -> nn.Module:
    model = switched()
    attention = model.bert.encoder.layer[0].attention.self.set_attention
    parametrize.register_parametrization(attention, "reference", nn.Identity())
    return model


def parametrised_in_two_parts() -> nn.Module:
    model = switched()
    attention = model.bert.encoder.layer[0].attention.self.set_attention
    parametrizations.weight_norm(attention, "reference")
    return model


@pytest.mark.parametrize(
    ("make_model", "exempt", "decaying"),
    [
        (encoder, {"reference", "reference_log_mass"}, "attention.key.weight"),
        (switched, {"reference", "reference_log_mass", "query_log_scale"}, "self.key.weight"),
        (adapted, {"reference", "reference_log_mass", "query_log_scale"}, "lora_A.default.weight"),
        (parametrised, {"reference", "original", "query_log_scale"}, "self.key.weight"),
        (
            parametrised_in_two_parts,
            {"reference", "original0", "original1", "query_log_scale"},
            "self.key.weight",
        ),
    ],
)
def test_what_modules_exempt_does_not_decay(
    make_model: Any, exempt: set[str], decaying: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = make_model()
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, weight_decay=0.5, report_to=[], use_cpu=True, save_strategy="no"
    )
    rows = [{"input_ids": [5, 6, 7 + i], "labels": i % 2} for i in range(8)]
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    decay = {
        id(parameter): group["weight_decay"]
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
    }
    trained = {n: decay[id(p)] for n, p in model.named_parameters() if p.requires_grad}
    of_exempt = {n: rate for n, rate in trained.items() if n.rpartition(".")[2] in exempt}
    assert {name.rpartition(".")[2] for name in of_exempt} == exempt
    assert set(of_exempt.values()) == {0}
    assert {rate for name, rate in trained.items() if name.endswith(decaying)} == {0.5}
