"""The transport plan of one layer of a model, for one image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...modules import SetAttention
from ...vision.blocks import Stage, TokenEmbedding
from ..themes import mutual_information

if TYPE_CHECKING:
    from ...language.references import References

Call = tuple[tuple[Any, ...], dict[str, Any]]  # the arguments of a module


@dataclass
class Layer:
    """What one layer did with one image."""

    plans: Tensor  # [H, N, M], the mass that goes from token i to reference j
    grid: tuple[int, int]  # rows and columns of the N tokens
    seen: Tensor  # [channels, height, width], the image as it came to the backbone
    covered: tuple[float, float]  # height and width of the tokens, in pixels of what was seen

    def without_padding(self, height: int, width: int) -> Layer:
        """The upper left part, height x width pixels, and the tokens that cover some of it."""
        token = [side / count for side, count in zip(self.covered, self.grid, strict=True)]
        rows, columns = math.ceil(height / token[0]), math.ceil(width / token[1])
        plans = self.plans.unflatten(1, self.grid)[:, :rows, :columns].flatten(1, 2)
        covered = (rows * token[0], columns * token[1])
        seen = self.seen[:, :height, :width]
        return Layer(normalised(plans), (rows, columns), seen, covered)


def normalised(plans: Tensor) -> Tensor:  # [H, N, M]
    """Plans of some of the tokens, scaled to mass 1."""
    return plans / plans.sum((1, 2), keepdim=True).clamp_min(1e-30)


def find_attention(model: nn.Module, stage: int, block: int) -> tuple[SetAttention, str]:
    """The attention of a block and its name, wherever in the model the backbone is.

    Args:
        model: the backbone, or anything around it: a detector, a segmenter, a timm feature list.
        stage: 1 for the finest.
        block: 1 for the stage's first, -1 for its last.

    Raises:
        UserError: if there is no such block, or it has another kind of attention.
    """
    stages = [module for module in model.modules() if isinstance(module, Stage)]
    if not stages:
        raise UserError(f"{type(model).__name__} holds no Setformer, whose layers are explained")
    if not 1 <= stage <= len(stages):
        raise UserError(f"--stage must be from 1 to {len(stages)}, got {stage}")
    blocks = stages[stage - 1].blocks
    index = choose_block("--block", block, len(blocks), f" in stage {stage}")
    attention = blocks[index].attention
    if not isinstance(attention, SetAttention):
        raise UserError(
            f"only SeT attention has references to explain, and this model was made with "
            f"{type(attention).__name__}; train one with attention='set'"
        )
    return attention, f"stage {stage}, block {index + 1} of {len(blocks)}"


def choose_head(plans: Tensor, head: int | None, layer: str) -> tuple[Tensor, str]:  # [H, N, M]
    """The plan [N, M] of a head: of the given one (from 1), or of the one whose plan tells most;
    and the name of that head of the layer.

    Raises:
        UserError: if there is no such head.
    """
    if head is not None and not 1 <= head <= len(plans):
        raise UserError(f"--head must be from 1 to {len(plans)} in this layer, got {head}")
    head = head or 1 + int(mutual_information(plans).argmax())
    return plans[head - 1], f"{layer}, head {head} of {len(plans)}"


def choose_block(option: str, number: int, count: int, where: str = "") -> int:
    """The index (from 0) of the block or layer that an option names (from 1, or -1 for the last).

    Raises:
        UserError: if there is none of that number; names the option.
    """
    if not 1 <= abs(number) <= count:
        raise UserError(
            f"{option} must be from 1 to {count}{where}, or from -1 for the last to -{count}, "
            f"got {number}"
        )
    return number - 1 if number > 0 else count + number


@torch.no_grad()
def first_calls(modules: Sequence[nn.Module], forward: Callable[[], object]) -> list[Call]:
    """The arguments of the first call of each module while ``forward`` runs.

    Raises:
        UserError: if ``forward`` does not call one of them.
    """
    calls: dict[nn.Module, Call] = {}

    def keep(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        calls.setdefault(module, (arguments, options))

    hooks = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in modules]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    if len(calls) < len(modules):
        raise UserError("the model leaves this layer out; choose an earlier one")
    return [calls[module] for module in modules]


@torch.no_grad()
def plans_of(attention: SetAttention | References, call: Call) -> Tensor:  # [H, N, M]
    """The plans of an attention for the first sequence of a call."""
    arguments, options = call
    return attention.transport_plan(*arguments, **options)[0].float().cpu()


def observe(model: nn.Module, attention: SetAttention, forward: Callable[[], object]) -> Layer:
    """Run ``forward``, which calls ``model`` on one image, and return what ``attention`` did.

    Raises:
        UserError: if ``forward`` does not call the attention.
    """
    stem = next(module for module in model.modules() if isinstance(module, TokenEmbedding))
    image, tokens = first_calls([stem, attention], forward)
    seen: Tensor = image[0][0][0]
    height, width = seen.shape[1:]
    plans = plans_of(attention, tokens)
    return Layer(plans, tokens[1]["grid"], seen.float().cpu(), (height, width))
