"""The SeTformer language encoder, and SeT attention inside other models of transformers.

Importing this registers the encoder with transformers' Auto classes.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration import SIZES, SetformerConfig
from .distillation import distill_attention
from .encoder import SetformerModel, SetformerPreTrainedModel
from .heads import (
    SetformerForMaskedLM,
    SetformerForSequenceClassification,
    SetformerForTokenClassification,
)
from .switch import register

AutoConfig.register(SetformerConfig.model_type, SetformerConfig, exist_ok=True)
for _auto, _model in (
    (AutoModel, SetformerModel),
    (AutoModelForMaskedLM, SetformerForMaskedLM),
    (AutoModelForSequenceClassification, SetformerForSequenceClassification),
    (AutoModelForTokenClassification, SetformerForTokenClassification),
):
    _auto.register(SetformerConfig, _model, exist_ok=True)

__all__ = [
    "SIZES",
    "SetformerConfig",
    "SetformerForMaskedLM",
    "SetformerForSequenceClassification",
    "SetformerForTokenClassification",
    "SetformerModel",
    "SetformerPreTrainedModel",
    "distill_attention",
    "register",
]
