"""set_attention, set_pooling and transport_plan."""

from .reference import set_attention, set_pooling, transport_plan

__all__ = ["set_attention", "set_pooling", "transport_plan"]
