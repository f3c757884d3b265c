"""The valid tokens of a mask of padding."""

from __future__ import annotations

import torch
from torch import Tensor


def valid_tokens(mask: Tensor) -> Tensor:  # [B, N] -> [B, N] bool
    """True where a token is valid: where the mask is not 0 or, if it is additive, where it is 0.

    An additive mask has nothing above 0: 0 for valid tokens, -inf or another negative number for
    padding. A mask that is 0 everywhere is additive if it has floats; integers then mean that no
    token is valid.
    Nothing here waits for a GPU, or breaks a graph of torch.compile.
    """
    if mask.dtype == torch.bool:
        return mask
    additive = (mask <= 0).all()
    if not mask.is_floating_point():
        additive = additive & (mask < 0).any()
    return (mask != 0) ^ additive  # torch.where of bools is missing in runtimes of ONNX
