"""Answers to argument names that people bring from other attentions."""

from collections.abc import Callable
from functools import wraps
from types import FunctionType
from typing import ParamSpec, TypeVar, cast

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

_MASK = (
    "give mask, bool [B, N], True = valid (of packed sequences cu_seqlens); there are no N x N "
    "scores to mask or to add to"
)
_SCALE = (
    "give epsilon, which divides the similarities, .02 to .1 for vectors of unit length; 1 / scale "
    "is its value with kernel='linear', normalize=False alone"
)
# From torch's scaled_dot_product_attention and MultiheadAttention, transformers and timm.
FOREIGN_NAMES = {
    "attn_mask": _MASK,
    "attention_mask": _MASK,
    "src_mask": _MASK,
    "key_padding_mask": "give mask=~key_padding_mask: here True = valid",
    "src_key_padding_mask": "give mask=~src_key_padding_mask: here True = valid",
    "is_causal": "there is no causal form: the references collect from all tokens; leave it out",
    "scale": _SCALE,
    "scaling": _SCALE,
    "dropout_p": "there are no attention weights to drop; leave it out",
    "enable_gqa": "repeat keys and values for each head of queries; leave it out",
    "need_weights": "transport_plan gives the weights; leave it out",
    "average_attn_weights": "transport_plan gives the weights; leave it out",
}


def answers_foreign_names(
    function: Callable[Parameters, Result],
) -> Callable[Parameters, Result]:
    """Make a function refuse FOREIGN_NAMES with a message that says what to give instead.

    Raises:
        TypeError: for one of FOREIGN_NAMES that is not an argument of the function.
    """

    @wraps(function)
    def answering(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        for name in kwargs:
            if name in FOREIGN_NAMES:
                who = function.__qualname__.removesuffix(".forward").removesuffix(".transport_plan")
                raise TypeError(f"{who}: has no argument {name}: {FOREIGN_NAMES[name]}")
        return function(*args, **kwargs)

    # torch.compile counts recompilations by code: each function must have code of its own.
    own = cast(FunctionType, answering)
    own.__code__ = own.__code__.replace(co_name=function.__name__)
    return answering
