"""SeT attention in place of the softmax attention of a trained model: queries, keys, references."""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import is_integer, is_number, require
from ..functional import set_attention, transport_plan
from ..modules import _softmax

# The options in ``config.set_attention``; they are arguments of References.
DEFAULT_OPTIONS: dict[str, Any] = {
    "num_references": 64,
    "epsilon": None,
    "iterations": 1,
}
_MASS_POINTS = 8  # u_r per head


class References(nn.Module):
    r"""The references of one attention module, and SeT attention onto them.

    For the queries q, keys k, values v and the factor ``scaling`` of softmax attention, per head::

        S_ij = <k_i, y_j>    S'_ij = <c q_i, y_j>                  both / epsilon
        A_j  = sum_i C_ij v_i    C = softmax of S + f over tokens
        O_i  = sum_j R_ij A_j    R = softmax of S' + g over references

    With the potentials f of the keys and g of the queries both sides are transport plans, as
    :func:`setformer_ext.set_attention` defines them. Their marginals are learned: b_j, and
    a_i in proportion to sum_r exp(<k_i, u_r> / epsilon), for a few points u_r. The option T = 0
    gives two softmaxes without transport, f = g = 0. With epsilon = 1 / scaling A_j is then the
    softmax attention of y_j, a query that stands for many, and a token mixes the answers of the
    references that are similar to its own query. A larger c favours the most similar references.

    All of this is our reading; the paper (Shamsolmoali et al., SeTformer, AAAI 2024) trains models
    from the start. Distilled for 60 steps on film sentences (M = 64,
    benchmarks/language/minilm.py), the layers of MiniLM keep a relative squared error of 0.108 with
    T = 1 and of 0.098 with T = 0, which costs less; T = 2 is like T = 1. Of the layers' errors,
    before their mean is taken, those of layers 1 and 2 are the largest: 0.18 and 0.14 with T = 1;
    0.18 and 0.16 with one point u; 0.27 and 0.24 with uniform marginals; 0.16 and 0.12 with T = 0.

    Args:
        num_heads: heads H of the queries.
        head_dim: D.
        num_references: references M per head.
        epsilon: the entropy, > 0; None for 1 / scaling, so that similarities weigh what scores do.
        iterations: Sinkhorn steps T >= 0; 0 for two softmaxes without transport.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        query, key [B, H, N, D], value [B, H, N, Dv] and mask [B, N] bool (True = valid) or None to
        [B, H, N, Dv]. Tokens that are not valid give nothing and come out as 0.

    Raises:
        ValueError: for an argument outside these ranges.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        num_references: int = DEFAULT_OPTIONS["num_references"],
        epsilon: float | None = DEFAULT_OPTIONS["epsilon"],
        iterations: int = DEFAULT_OPTIONS["iterations"],
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        known = is_integer(num_references) and num_references >= 1
        _require(known, "num_references", "an int >= 1", repr(num_references))
        known = is_integer(iterations) and iterations >= 0
        _require(known, "iterations", "an int >= 0", repr(iterations))
        _require(
            epsilon is None or (is_number(epsilon) and 0 < epsilon < math.inf),
            "epsilon",
            "a finite number > 0, or None for 1 / scaling",
            repr(epsilon),
        )
        self.epsilon = None if epsilon is None else float(epsilon)
        self.iterations = int(iterations)
        self.stored = False  # whether the values come from the checkpoint of the loaded model

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.reference = parameter(num_heads, num_references, head_dim)
        self.query_log_scale = parameter(num_heads)  # log c
        # Without a Sinkhorn step reference masses have no effect, and token masses brought no gain.
        transport = iterations > 0
        points = min(_MASS_POINTS, num_references)
        self.mass_point = parameter(num_heads, points, head_dim) if transport else None  # u
        self.reference_log_mass = parameter(num_heads, num_references) if transport else None
        self.reset_parameters()

    @property
    def options(self) -> dict[str, Any]:
        """Their options for ``config.set_attention``, in types of JSON."""
        return {
            "num_references": self.reference.shape[1],
            "epsilon": self.epsilon,
            "iterations": self.iterations,
        }

    def reset_parameters(self) -> None:
        """Draw the references and the points u again; b starts uniform, and c at 1."""
        for points in (self.reference, self.mass_point):
            if points is not None:
                nn.init.normal_(points)  # like queries: 1 / sqrt(D), the usual scaling, assumes it
        for parameter in (self.query_log_scale, self.reference_log_mass):
            if parameter is not None:
                nn.init.zeros_(parameter)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that should not decay: for them 0 has no special meaning."""
        return {"reference", "query_log_scale", "mass_point", "reference_log_mass"}

    def forward(
        self,
        query: Tensor,  # [B, H, N, D]
        key: Tensor,  # [B, H, N, D]
        value: Tensor,  # [B, H, N, Dv]
        mask: Tensor | None,  # [B, N] bool
        scaling: float,
    ) -> Tensor:  # [B, H, N, Dv]
        self._warn_where_lost()
        scale = self.query_log_scale.exp()[:, None, None]
        return set_attention(
            query * scale.to(query.dtype),
            value=value,
            query_mask=mask,
            **self._transport(key, mask, scaling),
        )

    def transport_plan(
        self,
        query: Tensor,  # [B, H, N, D]
        key: Tensor,  # [B, H, N, D]
        value: Tensor,  # [B, H, N, Dv]
        mask: Tensor | None,  # [B, N] bool
        scaling: float,
    ) -> Tensor:  # [B, H, N, M]
        """Which keys each reference draws its mass from, for the arguments of ``forward``.

        Entry [i, j] is the mass that goes from token i to reference j. It depends only on keys,
        mask and scaling: the queries have a plan of their own.
        """
        return transport_plan(**self._transport(key, mask, scaling))

    def _transport(self, key: Tensor, mask: Tensor | None, scaling: float) -> dict[str, Any]:
        """The arguments of transport_plan; set_attention takes them too."""
        epsilon = 1 / scaling if self.epsilon is None else self.epsilon
        logits, reference_mass = self.reference_log_mass, None
        if logits is not None:
            reference_mass = _softmax(logits) * logits.shape[1]  # b_j, [H, M], 1 on average
        return {
            "key": key,
            "reference": self.reference.to(key.dtype),
            "mask": mask,
            "token_mass": self._token_mass(key, mask, epsilon),
            "reference_mass": reference_mass,
            "kernel": "linear",
            "epsilon": epsilon,
            "iterations": self.iterations,
            "normalize": False,
        }

    def _warn_where_lost(self) -> None:
        """Warn if the references would be lost: peft freezes what it does not train, and does not
        save it."""
        trained = [p.requires_grad for p in self.parameters()]
        frozen = trained and not any(trained)
        if frozen and self.training and not self.stored and not torch.compiler.is_compiling():
            warnings.warn(
                "set_attention: the references are frozen, and no checkpoint that was loaded has "
                "them as they are: an adapter that learns around them does not fit those of the "
                "next loading. Train and save them with it, by "
                'peft.LoraConfig(modules_to_save=["set_attention"], ...), '
                "or save the whole model and load it again before it gets the adapter.",
                stacklevel=2,
            )

    def extra_repr(self) -> str:
        heads, references, depth = self.reference.shape
        epsilon = "1 / scaling" if self.epsilon is None else self.epsilon
        return (
            f"{heads}, {depth}, num_references={references}, epsilon={epsilon}, "
            f"iterations={self.iterations}"
        )

    def _token_mass(self, key: Tensor, mask: Tensor | None, epsilon: float) -> Tensor | None:
        """a_i in proportion to sum_r exp(<k_i, u_r> / epsilon), [B, H, N], 1 on average."""
        if self.mass_point is None:
            return None
        points = self.mass_point.to(key.dtype) / epsilon
        logits = torch.einsum("bhnd,hrd->bhnr", key, points)
        logits = logits.to(torch.promote_types(key.dtype, torch.float32)).logsumexp(-1)
        if mask is not None:
            logits = logits.masked_fill(~mask.unsqueeze(1), torch.finfo(logits.dtype).min)
        return _softmax(logits) * key.shape[2]


_require = partial(require, "config.set_attention")
