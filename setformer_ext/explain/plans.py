"""The transport plan of one layer of a model, for one image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import SetAttention
from ..vision.blocks import Stage, TokenEmbedding


class ExplainError(Exception):
    """A layer that cannot be explained; the message says which ones can."""


@dataclass
class Layer:
    """What one layer did with one image."""

    plans: Tensor  # [H, N, M], the mass that goes from token i to reference j
    grid: tuple[int, int]  # rows and columns of the N tokens
    seen: Tensor  # [channels, height, width], the image as it came to the backbone


def find_attention(model: nn.Module, stage: int, block: int) -> tuple[SetAttention, str]:
    """The attention of a block and what to call it, wherever in the model its backbone is.

    Args:
        model: the backbone, or anything around it: a detector, a segmenter, a timm feature list.
        stage: 1 for the finest.
        block: 1 for the stage's first, -1 for its last.

    Raises:
        ExplainError: if there is no such block, or it has another kind of attention.
    """
    stages = [module for module in model.modules() if isinstance(module, Stage)]
    if not stages:
        raise ExplainError(f"{type(model).__name__} holds no Setformer, whose layers are explained")
    if not 1 <= stage <= len(stages):
        raise ExplainError(f"--stage must be from 1 to {len(stages)}, got {stage}")
    blocks = stages[stage - 1].blocks
    if not 1 <= abs(block) <= len(blocks):
        raise ExplainError(
            f"--block must be from 1 to {len(blocks)} in stage {stage}, or from -1 for the last "
            f"to -{len(blocks)}, got {block}"
        )
    block = block if block > 0 else len(blocks) + 1 + block
    attention = blocks[block - 1].attention
    return require_set_attention(attention), f"stage {stage}, block {block} of {len(blocks)}"


def require_set_attention(attention: object) -> SetAttention:
    """The module, if it has references.

    Raises:
        ExplainError: if it is another kind of attention.
    """
    if not isinstance(attention, SetAttention):
        raise ExplainError(
            f"only SeT attention has references to explain, and this model was made with "
            f"{type(attention).__name__}; train one with attention='set'"
        )
    return attention


def require_head(attention: SetAttention, head: int | None) -> None:
    """Raises ExplainError for a head, from 1, that the attention does not have."""
    heads = attention.num_heads
    if head is not None and not 1 <= head <= heads:
        raise ExplainError(f"--head must be from 1 to {heads} in this layer, got {head}")


@torch.no_grad()
def observe(model: nn.Module, attention: SetAttention, forward: Callable[[], object]) -> Layer:
    """Run ``forward``, which calls ``model`` on one image, and take what ``attention`` did.

    Raises:
        ExplainError: if ``forward`` does not come by.
    """
    seen: list[Tensor] = []
    inputs: list[tuple[Tensor, tuple[int, int]]] = []

    def keep_image(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen.append(arguments[0][0])

    def keep_tokens(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        inputs.append((arguments[0][:1], options["grid"]))

    stem = next(module for module in model.modules() if isinstance(module, TokenEmbedding))
    hooks = [
        stem.register_forward_pre_hook(keep_image),
        attention.register_forward_pre_hook(keep_tokens, with_kwargs=True),
    ]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    if not inputs:
        raise ExplainError("the model leaves this stage out; choose an earlier one")
    tokens, grid = inputs[0]
    plans = attention.transport_plan(tokens, grid=grid)[0]
    return Layer(plans.float().cpu(), grid, seen[0].float().cpu())
