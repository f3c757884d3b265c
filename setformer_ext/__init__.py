"""SeT attention."""

from .functional import set_attention, set_pooling, transport_plan

__all__ = ["set_attention", "set_pooling", "transport_plan"]
