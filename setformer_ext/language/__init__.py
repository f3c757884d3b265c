"""The SeTformer language encoder, and SeT attention inside other models of transformers.

Importing this registers the encoder with transformers' Auto classes, and has transformers' Trainer
leave out of weight decay what modules exempt.
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
from .trainer import respect_no_weight_decay

AutoConfig.register(SetformerConfig.model_type, SetformerConfig, exist_ok=True)
for _auto, _model in (
    (AutoModel, SetformerModel),
    (AutoModelForMaskedLM, SetformerForMaskedLM),
    (AutoModelForSequenceClassification, SetformerForSequenceClassification),
    (AutoModelForTokenClassification, SetformerForTokenClassification),
):
    _auto.register(SetformerConfig, _model, exist_ok=True)
respect_no_weight_decay()

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
