"""The SeTformer vision backbone, with the interface that timm's models have."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import (
    ClassifierHead,
    calculate_drop_path_rates,
    get_device_dtype,
    trunc_normal_,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..arguments import require
from ..controls import ATTENTIONS, MeanAttention, SoftmaxAttention, make_attention
from ..modules import SetAttention
from .blocks import Block, Stage, TokenEmbedding

HEAD_DIM = 32
STRIDES = (4, 8, 16, 32)

# docs/evidence.md has measurements of these options.
ATTENTION_OPTIONS: dict[str, Any] = {
    "adaptive_reference_mass": True,
    "position_bandwidth": 1.0,
    "query_projection": False,
}


class Setformer(nn.Module):
    r"""A hierarchical vision transformer whose attention is optimal transport onto references.

    Four stages at strides 4, 8, 16 and 32 of any image, whatever its size: overlapping
    convolutions embed the tokens and lie between the stages; each block adds SeT attention on the
    H x W grid and an MLP with a depthwise convolution inside, from which tokens know their
    positions. Attention costs O(N M) for N tokens and M references, so no windows are needed at any
    resolution. All norms are batch norms: in training images of a batch share their statistics, in
    eval mode they do not see one another, and :func:`fuse_norms` makes the norms part of the layers
    before them.

    From the paper (Shamsolmoali et al., SeTformer, AAAI 2024): the hierarchy, SeT attention, sizes
    mini to base, and for base the parameters and FLOPs of Mask R-CNN and UPerNet on it. MLPs,
    norms, widths, depths, references and every option of the attention are our reading, chosen on
    real data.

    Args:
        in_chans: channels of the images.
        num_classes: outputs of the classifier; 0 for the pooled features themselves.
        global_pool: how the classifier pools, as in timm ("avg", "max", ...; "" for not at all).
        dims: widths of the stages, multiples of 32, which is the depth of a head.
        depths: blocks of the stages.
        num_references: references M per head, in each stage, of SeT attention.
        mlp_ratio: hidden width of the MLPs / width.
        attention: "set"; or for comparison, in the same network, "softmax" (dot-product attention,
            O(N^2)), "mean" (of all tokens) or "none".
        attention_options: options of :class:`setformer_ext.SetAttention` that differ from
            ``ATTENTION_OPTIONS``; None for other attentions.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.

    Shape:
        [B, in_chans, H, W] to [B, num_classes]. ``forward_features``: to [B, C, H / 32, W / 32],
        sizes rounded up.

    Raises:
        ValueError: for an argument outside these ranges.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_references: Sequence[int] = (36, 36, 36, 36),
        mlp_ratio: float = 3.0,
        attention: str = "set",
        attention_options: dict[str, Any] | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        _require(in_chans >= 1, "in_chans", "at least 1", in_chans)
        _require(num_classes >= 0, "num_classes", "at least 0", num_classes)
        counts = {"dims": dims, "depths": depths, "num_references": num_references}
        for name, four in counts.items():
            known = isinstance(four, Sequence) and len(four) == 4 and min(four) >= 1
            _require(known, name, "four counts >= 1, one for each stage", four)
        _require(all(dim % HEAD_DIM == 0 for dim in dims), "dims", "multiples of 32", dims)
        known = attention in ATTENTIONS
        _require(known, "attention", f"of {', '.join(ATTENTIONS)}", repr(attention))
        if attention != "set":
            _require(not attention_options, "attention_options", "None", attention_options)
        _require(mlp_ratio > 0, "mlp_ratio", "positive", mlp_ratio)
        for name, rate in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)):
            _require(0 <= rate < 1, name, "in [0, 1)", rate)
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = dims[-1]
        self.drop_rate = drop_rate
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": dim, "reduction": stride, "module": f"stages.{i}"}
            for i, (dim, stride) in enumerate(zip(dims, STRIDES, strict=True))
        ]

        options = ATTENTION_OPTIONS | (attention_options or {})
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)

        def blocks(stage: int) -> Iterator[Block]:
            dim, references = dims[stage], num_references[stage]
            for rate in rates[stage]:
                made = make_attention(attention, dim, dim // HEAD_DIM, references, options)
                yield Block(dim, made, mlp_ratio, rate)

        self.stem = TokenEmbedding(in_chans, dims[0])
        self.stages = nn.Sequential(
            *(Stage(dims[i - 1] if i else None, dims[i], blocks(i)) for i in range(4))
        )
        self.norm: nn.Module = nn.BatchNorm2d(dims[-1])
        self.head = ClassifierHead(
            dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate
        )
        self.apply(_initialise)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter names by depth, for layer-wise learning-rate decay."""
        if coarse:
            return {"stem": r"^stem", "blocks": r"^stages\.(\d+)"}
        blocks = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": blocks}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that should not decay: what SetAttention says of its own."""
        return {
            f"{prefix}.{name}"
            for prefix, module in self.named_modules()
            if isinstance(module, SetAttention)
            for name in module.no_weight_decay()
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in backward instead of keeping what is inside them."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier's last layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the model a new last layer, or none (num_classes = 0)."""
        self.num_classes = num_classes
        self.head.reset(
            num_classes, global_pool, in_features=self.num_features, **get_device_dtype(self)
        )
        _initialise(self.head.fc)

    def forward_intermediates(
        self,
        x: Tensor,  # [B, in_chans, H, W]
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of the stages, [B, C, H / stride, W / stride] each, as timm's getter asks for.

        Args:
            x: images.
            indices: which stages: the last n, those listed, or all.
            norm: apply the final norm to the last stage's.
            stop_early: leave out the stages after the last one asked for.
            output_fmt: only "NCHW".
            intermediates_only: return the list alone, without the final features.
        """
        _require(output_fmt == "NCHW", "output_fmt", "'NCHW'", repr(output_fmt))
        wanted, last_wanted = feature_take_indices(len(self.stages), indices)
        last = len(self.stages) - 1
        intermediates = []
        x = self.stem(x)
        for i, stage in enumerate(self.stages[: last_wanted + 1] if stop_early else self.stages):
            x = stage(x)
            if i in wanted:
                intermediates.append(self.norm(x) if norm and i == last else x)
        if intermediates_only:
            return intermediates
        if i == last:
            x = self.norm(x)
        return x, intermediates

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove the stages after the last of ``indices``, and what was sized for them."""
        wanted, last_wanted = feature_take_indices(len(self.stages), indices)
        shortened = last_wanted < len(self.stages) - 1
        if prune_norm or shortened:
            self.norm = nn.Identity()
        self.stages = self.stages[: last_wanted + 1]
        if shortened:
            self.num_features = self.head_hidden_size = self.feature_info[last_wanted]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return wanted

    def forward_features(self, x: Tensor) -> Tensor:  # -> [B, C, H / 32, W / 32]
        """The normed tokens of the last stage."""
        return self.norm(self.stages(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The classifier on ``forward_features``; with ``pre_logits`` only its pooling."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:  # [B, in_chans, H, W] -> [B, num_classes]
        return self.forward_head(self.forward_features(x))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, SetAttention | SoftmaxAttention | MeanAttention):
        module.reset_parameters()
        trunc_normal_(module.projection.weight, std=0.02)  # small: what is added to its input
    elif isinstance(module, nn.Linear | nn.Conv2d):
        if isinstance(module, nn.Conv2d):
            fan_out = module.weight[0].numel() * module.out_channels / module.in_channels
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))  # He et al., 2015
        else:
            trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_require = partial(require, "Setformer")
