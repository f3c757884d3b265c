"""What may stand where a block lets tokens tell one another something.

Each is called as SetAttention is, with tokens [B, N, C], a mask [B, N] (True = valid) or None and
the grid (H, W) that the tokens are or None, and gives [B, N, C]; what comes out for padding is left
to the network, which does not read it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from setformer_ext import SetAttention
from setformer_ext.controls import MeanAttention, SoftmaxAttention


class FromKeys(SoftmaxAttention):
    """Softmax attention whose queries start as its keys, as SetAttention's do."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        query, key, _ = self.query_key_value.weight.detach().chunk(3)
        query.copy_(key)


class FeatureAttention(SoftmaxAttention):
    """Attention phi(q) (phi(k)^T v) / (phi(q) sum phi(k)), O(N), of features phi > 0, with the
    projections of softmax attention.

    Here phi(x) = elu(x) + 1: Katharopoulos et al., Transformers are RNNs, ICML 2020, eq. 5.
    """

    def features(
        self,
        query: Tensor,  # [B, H, N, D]
        key: Tensor,  # [B, H, N, D]
        mask: Tensor | None,  # [B, 1, N, 1]
    ) -> tuple[Tensor, Tensor]:  # [B, H, N, F] each
        """Of queries and of keys."""
        return F.elu(query) + 1, F.elu(key) + 1

    def attend(
        self,
        query: Tensor,  # [B, H, N, D]
        key: Tensor,  # [B, H, N, D]
        value: Tensor,  # [B, H, N, D]
        mask: Tensor | None,  # [B, N]
    ) -> Tensor:  # [B, H, N, D]
        valid = None if mask is None else mask[:, None, :, None]
        query, key = self.features(query, key, valid)
        if valid is not None:
            key = key * valid
        total = query @ key.sum(-2).unsqueeze(-1)  # [B, H, N, 1]
        return query @ (key.mT @ value) / total.clamp(min=torch.finfo(value.dtype).tiny)


class Performer(FeatureAttention):
    """Choromanski et al., Rethinking Attention with Performers, ICLR 2021: positive features whose
    products are, on average over random directions, the exponentials of softmax attention.

    As in the authors' models, of 256 directions for heads of D = 64, there are four a channel,
    orthogonal in groups of D, with the lengths of normal vectors; unlike there they are not
    redrawn, so that a network is a function.
    """

    GROUPS = 4
    directions: Tensor  # [H, 4 D, D]

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads)
        depth = dim // num_heads
        normal = torch.randn(num_heads, self.GROUPS, depth, depth)
        orthogonal, triangle = torch.linalg.qr(normal)
        # Without the signs, columns would not point everywhere alike.
        orthogonal = orthogonal * triangle.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
        lengths = torch.randn_like(normal).norm(dim=-1, keepdim=True)
        self.register_buffer("directions", (orthogonal.mT * lengths).flatten(1, 2))

    def features(
        self,
        query: Tensor,  # [B, H, N, D]
        key: Tensor,  # [B, H, N, D]
        mask: Tensor | None,  # [B, 1, N, 1]
    ) -> tuple[Tensor, Tensor]:  # [B, H, N, F] each
        # What is the same for all keys, or for all features of a query, cancels in the quotient, so
        # the largest exponent may be taken away from all.
        query, key = self._exponents(query), self._exponents(key)
        if mask is not None:
            key = key.masked_fill(~mask, -torch.inf)
        query = query - query.amax(-1, keepdim=True).detach()
        key = key - key.amax((-2, -1), keepdim=True).detach()
        return query.exp() + 1e-6, key.exp() + 1e-6

    def _exponents(self, x: Tensor) -> Tensor:  # [B, H, N, D] -> [B, H, N, F]
        scaled = x / x.shape[-1] ** 0.25
        return scaled @ self.directions.mT - scaled.square().sum(-1, keepdim=True) / 2


MIXERS = (
    *("none", "mean", "softmax", "softmax from q = k", "linear", "Performer"),
    *("SeT", "SeT, T = 0"),
)
NO_OPTIONS = {"dim", "num_heads", "context_dim", "device", "dtype", "bias", "dropout"}  # the task's


def options_of(mixer: str, references: int, changed: Mapping[str, Any]) -> dict[str, Any]:
    """Every option of the SetAttention that stands behind a mixer's name; none behind others'.

    With the defaults spelled out, a run that is on record stays what it was when they change.

    Raises:
        ValueError: for an option that SetAttention has not.
    """
    if not mixer.startswith("SeT"):
        return {}
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(SetAttention).parameters.items()
        if name not in NO_OPTIONS
    }
    unknown = set(changed) - set(defaults)
    if unknown:
        raise ValueError(f"SetAttention has no option {', '.join(sorted(unknown))}")
    options = defaults | {"num_references": references} | dict(changed)
    return options | {"iterations": 0} if mixer == "SeT, T = 0" else options


def make_mixer(
    mixer: str, dim: int, num_heads: int, options: Mapping[str, Any]
) -> nn.Module | None:
    """A mixer by its name; options are those of SetAttention."""
    match mixer:
        case "none":
            return None
        case "mean":
            return MeanAttention(dim)
        case "softmax":
            return SoftmaxAttention(dim, num_heads)
        case "softmax from q = k":
            return FromKeys(dim, num_heads)
        case "linear":
            return FeatureAttention(dim, num_heads)
        case "Performer":
            return Performer(dim, num_heads)
        case "SeT" | "SeT, T = 0":
            return SetAttention(dim, num_heads, **options)
    raise ValueError(f"mixer must be of {', '.join(MIXERS)}, got {mixer!r}")
