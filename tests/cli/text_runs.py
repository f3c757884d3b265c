"""What trainings of texts leave behind, with random weights."""

import json
from pathlib import Path

import torch

from setformer_ext.cli.train.glue_data import TASKS
from setformer_ext.cli.train.texts import train_tokenizer, wrap_tokenizer
from setformer_ext.language import (
    SetformerConfig,
    SetformerForMaskedLM,
    SetformerForSequenceClassification,
)

TEXTS = ["the film is superb .", "a plot so dull , and a cast so tired !", "is it ?"]
LENGTH = 12
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_references": 4,
    "pad_token_id": 0,
}


def write_text_run(folder: Path, task: str) -> Path:
    """As ``train glue`` of a task writes it, or ``train mlm``."""
    torch.manual_seed(0)
    tokenizer = wrap_tokenizer(train_tokenizer(TEXTS * 9, 100, lowercase=True))
    sizes = {**SIZES, "vocab_size": len(tokenizer)}
    card: dict[str, object] = {"task": task}
    if task == "mlm":
        model = SetformerForMaskedLM(SetformerConfig(**sizes, sparse_prediction=True))
        card |= {"model_options": sizes, "sequence_length": LENGTH, "mask_share": 0.15, "seed": 0}
    else:
        classes = TASKS[task].classes
        labels = dict(enumerate(classes)) if classes else {0: "number"}
        config = SetformerConfig(
            **sizes,
            id2label=labels,
            label2id={name: i for i, name in labels.items()},
            problem_type=None if classes else "regression",
        )
        model = SetformerForSequenceClassification(config)
        card = {"task": "glue", "glue_task": task, "classes": classes, "sequence_length": LENGTH}
    with torch.no_grad():  # so that answers differ
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        if card.get("classes"):  # each the likeliest of some texts
            columns = [TEXTS] * len(TASKS[task].texts)
            tokens = tokenizer(*columns, padding=True, return_tensors="pt")
            model.classifier.bias.sub_(model.eval()(**tokens).logits.mean(0))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "card.json").write_text(json.dumps(card))
    return folder
