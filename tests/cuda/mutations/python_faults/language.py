"""Faults in the language models."""

from __future__ import annotations

from ..seeding import Seeded as Fault

LANGUAGE = (
    Fault(
        "loss of a regression between all pairs of a batch",
        "language/heads.py",
        "F.mse_loss(logits.float().view_as(labels), labels.float())",
        "F.mse_loss(logits.float(), labels.float())",
    ),
    Fault(
        "queries of padding take part in their transport",
        "language/references.py",
        "            query_mask=mask,\n",
        "",
    ),
    Fault(
        "shared keys go to every G-th head instead of neighbours",
        "language/switch.py",
        "        repeat_kv(key, groups),\n        repeat_kv(value, groups),\n",
        "        key.repeat(1, groups, 1, 1),\n        value.repeat(1, groups, 1, 1),\n",
    ),
    Fault(
        "convolution over tokens sees padding",
        "language/encoder.py",
        "x = x + self.position(x, mask)",
        "x = x + self.position(x, None)",
    ),
    Fault(
        "learning rate of a distillation does not fall",
        "language/distillation.py",
        "            schedule.step()\n",
        "",
    ),
    Fault(
        "weights of an encoder that are missing are drawn and not named",
        "language/saved.py",
        '    redrawn += [key for key in found["missing_keys"] if key.startswith("setformer.")]\n',
        "",
    ),
    Fault(
        "dropout of 0 before a classifier becomes that of the encoder",
        "language/heads.py",
        "config.hidden_dropout_prob if rate is None else rate",
        "rate or config.hidden_dropout_prob",
    ),
    Fault(
        "sequence that is all padding is valid where others of its batch are not",
        "language/masks.py",
        "additive = (mask <= 0).all()",
        "additive = (mask <= 0).all(-1, keepdim=True)",
    ),
    Fault(
        "automatic class for tokens makes a classifier of sequences",
        "language/__init__.py",
        "(AutoModelForTokenClassification, SetformerForTokenClassification)",
        "(AutoModelForTokenClassification, SetformerForSequenceClassification)",
    ),
    Fault(
        "exempt parameters of one dimension decay in transformers' Trainer",
        "language/trainer.py",
        "        left_out = {name for name, parameter in model.named_parameters() "
        "if id(parameter) in exempt}\n",
        "        left_out = {\n"
        "            name\n"
        "            for name, parameter in model.named_parameters()\n"
        "            if parameter.ndim > 1 and id(parameter) in exempt\n"
        "        }\n",
    ),
    Fault(
        "type of a classification's problem is not read",
        "language/heads.py",
        "kind: str | None = self.config.problem_type",
        "kind: str | None = None",
    ),
    Fault(
        "positions that are given are not read",
        "language/encoder.py",
        "            if position_ids is None:\n                position_ids",
        "            if True:\n                position_ids",
    ),
    Fault(
        "MLPs of the encoder with the same activation always",
        "language/encoder.py",
        "ACT2FN[config.hidden_act]",
        'ACT2FN["gelu"]',
    ),
    Fault(
        "heads with the same activation always",
        "language/heads.py",
        "ACT2FN[config.hidden_act]",
        'ACT2FN["gelu"]',
    ),
    Fault(
        "norm before the MLP with an epsilon of its own",
        "language/encoder.py",
        "self.mlp_norm = nn.LayerNorm(width, config.layer_norm_eps)",
        "self.mlp_norm = nn.LayerNorm(width, 1e-12)",
    ),
    Fault(
        "layers are not recomputed in backward",
        "language/encoder.py",
        "class SetformerLayer(GradientCheckpointingLayer):",
        "class SetformerLayer(nn.Module):",
    ),
    Fault(
        "configuration does not ask for hidden states",
        "language/encoder.py",
        "            output_hidden_states = self.config.output_hidden_states\n",
        "            output_hidden_states = False\n",
    ),
    Fault(
        "embedding of padding is like any other",
        "language/encoder.py",
        "nn.Embedding(config.vocab_size, width, config.pad_token_id)",
        "nn.Embedding(config.vocab_size, width)",
    ),
    Fault(
        "bounded scores and sinks of attention are left out without a word",
        "language/switch.py",
        '    "softcap",\n    "s_aux",\n',
        "",
    ),
)
