"""SetAttention: SeT attention as a torch module, with projections, references and masses."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .arguments import _autocast_enabled
from .functional import set_attention, transport_plan
from .layout import Grid, average_parts, centres, nearly_square
from .nystrom import nystrom_features
from .varlen import set_attention_varlen

LEAST_SHARE = 1e-30  # which float32 holds in full, and by far too little to be noticed


class SetAttention(nn.Module):
    r"""Self-attention by optimal transport onto references, a stand-in for multi-head attention.

    Per head, tokens x_i (i < N) give keys k_i and values v_i; M references y_j stand in between::

        similarity   S_ij = kappa(k_i, y_j) w_ij
        collect      A_j  = sum_i C_ij v_i     C from T Sinkhorn steps on S / epsilon
        distribute   O_i  = sum_j R_ij A_j     R from the same steps
        output       concatenate the heads, then project

    as :func:`setformer_ext.set_attention` defines them. Keys, queries, references and anchors are
    scaled to unit length, so the gaussian kernel lies in [exp(-2 / bandwidth^2), 1].

    From the paper (Shamsolmoali et al., SeTformer, AAAI 2024): the kernel cost, the references,
    the entropic transport, the Nystrom feature map (there from OTKE, Mialon et al., ICLR 2021)
    and the penalty that decays exponentially with the distance of positions.
    Our reading: how the references' outputs return to the tokens, unit length, the learned
    masses, bandwidth and epsilon, references pooled from the input, the separate query.

    Args:
        dim: channels C of input and output, a multiple of ``num_heads``.
        num_heads: heads H.
        num_references: references M per head.
        pooled_references: compute the references from the input, as the average keys of M even
            parts of the sequence or of the grid, instead of learning them.
        query_projection: give the tokens queries of their own (a second solve) instead of q = k.
        kernel: "gaussian", kappa(k, y) = exp(-\|k - y\|^2 / (2 bandwidth^2)), or "linear", <k, y>.
        bandwidth: of the gaussian kernel, > 0; the initial value if ``learned_bandwidth``.
        epsilon: entropy of the transport, > 0; the initial value if ``learned_epsilon``. Smaller is
            sharper, and below 1/32 in float32 slower (the log domain instead of scaling).
        iterations: Sinkhorn steps T >= 0.
        learned_bandwidth: learn one bandwidth per head, as its logarithm.
        learned_epsilon: learn one epsilon per head, as its logarithm.
        learned_token_mass: a_i proportional to exp(<u_h, x_i>), instead of uniform.
        learned_reference_mass: b_j proportional to exp(c_hj), instead of uniform.
        adaptive_reference_mass: add <m_hj, mean_i x_i>, over the valid tokens, to c_hj: an input
            may need some references more than others, which fixed masses make it use alike.
        num_anchors: if given, replace the gaussian kernel by its Nystrom approximation
            <psi(k), psi(y)> on that many learned anchors per head; see
            :func:`setformer_ext.nystrom.nystrom_features`.
        position_bandwidth: if given, w_ij = exp(-\|p_i - r_j\|^2 / position_bandwidth^2), else 1.
            Tokens p and references r are the centres of even parts of [0, 1] (sequences) or
            [0, 1]^2 (grids). Padding counts as part of the sequence.
        bias: whether the projections have biases.

    Shape:
        x [B, N, C] (and mask [B, N]) to [B, N, C], of x's dtype (autocast's under autocast).

    Raises:
        TypeError: for an argument of another type, or inputs of another dtype.
        ValueError: for an argument outside these ranges, or inputs of another shape or device.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_references: int = 16,
        *,
        pooled_references: bool = False,
        query_projection: bool = False,
        kernel: str = "gaussian",
        bandwidth: float = 1.0,
        epsilon: float = 0.1,
        iterations: int = 5,
        learned_bandwidth: bool = False,
        learned_epsilon: bool = False,
        learned_token_mass: bool = True,
        learned_reference_mass: bool = True,
        adaptive_reference_mass: bool = False,
        num_anchors: int | None = None,
        position_bandwidth: float | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        integers = {
            "dim": dim,
            "num_heads": num_heads,
            "num_references": num_references,
            "iterations": iterations,
        }
        numbers = {"bandwidth": bandwidth, "epsilon": epsilon}
        flags = {
            "pooled_references": pooled_references,
            "query_projection": query_projection,
            "learned_bandwidth": learned_bandwidth,
            "learned_epsilon": learned_epsilon,
            "learned_token_mass": learned_token_mass,
            "learned_reference_mass": learned_reference_mass,
            "adaptive_reference_mass": adaptive_reference_mass,
            "bias": bias,
        }
        for name, integer in integers.items():
            _require_type(_is_integer(integer), name, "an int", integer)
        for name, number in numbers.items():
            _require_type(_is_number(number), name, "a number", number)
        for name, flag in flags.items():
            _require_type(isinstance(flag, bool), name, "a bool", flag)
        _require_type(isinstance(kernel, str), "kernel", "a string", kernel)
        _require(num_heads >= 1, "num_heads", "at least 1", num_heads)
        _require(
            dim >= 1 and dim % num_heads == 0, "dim", f"a multiple of num_heads={num_heads}", dim
        )
        _require(num_references >= 1, "num_references", "at least 1", num_references)
        _require(kernel in ("gaussian", "linear"), "kernel", "'gaussian' or 'linear'", repr(kernel))
        _require(_is_positive(bandwidth), "bandwidth", "finite and positive", bandwidth)
        _require(_is_positive(epsilon), "epsilon", "finite and positive", epsilon)
        _require(iterations >= 0, "iterations", "at least 0", iterations)
        if num_anchors is not None:
            _require_type(_is_integer(num_anchors), "num_anchors", "an int or None", num_anchors)
            _require(num_anchors >= 1, "num_anchors", "at least 1 or None", num_anchors)
        if position_bandwidth is not None:
            _require_type(
                _is_number(position_bandwidth),
                "position_bandwidth",
                "a number or None",
                position_bandwidth,
            )
            _require(
                _is_positive(position_bandwidth),
                "position_bandwidth",
                "finite and positive or None",
                position_bandwidth,
            )
        if adaptive_reference_mass:
            _require(learned_reference_mass, "learned_reference_mass", "True where adaptive", False)
        if kernel == "linear":
            _require(num_anchors is None, "num_anchors", "None with kernel='linear'", num_anchors)
            _require(not learned_bandwidth, "learned_bandwidth", "False with kernel='linear'", True)

        self.dim = dim
        self.num_heads = num_heads
        self.num_references = num_references
        self.pooled_references = pooled_references
        self.kernel = kernel
        self.initial_bandwidth = bandwidth
        self.initial_epsilon = epsilon
        self.iterations = iterations
        self.num_anchors = num_anchors
        self.position_bandwidth = position_bandwidth

        head_dim = dim // num_heads
        self.key = nn.Linear(dim, dim, bias=bias)
        self.query = nn.Linear(dim, dim, bias=bias) if query_projection else None
        self.value = nn.Linear(dim, dim, bias=bias)
        self.projection = nn.Linear(dim, dim, bias=bias)
        self.token_mass = nn.Linear(dim, num_heads, bias=False) if learned_token_mass else None
        self.reference_mass = (
            nn.Linear(dim, num_heads * num_references, bias=False)
            if adaptive_reference_mass
            else None
        )
        self.reference = _parameter(not pooled_references, num_heads, num_references, head_dim)
        self.reference_log_mass = _parameter(learned_reference_mass, num_heads, num_references)
        self.anchor = _parameter(num_anchors is not None, num_heads, num_anchors or 0, head_dim)
        self.log_bandwidth = _parameter(learned_bandwidth, num_heads)
        self.log_epsilon = _parameter(learned_epsilon, num_heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew; masses start uniform, bandwidth and epsilon where given."""
        for linear in (self.key, self.query, self.value, self.projection):
            if linear is not None:
                nn.init.xavier_uniform_(linear.weight)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
        for mass in (self.token_mass, self.reference_mass):
            if mass is not None:
                nn.init.zeros_(mass.weight)
        for points in (self.reference, self.anchor):
            if points is not None:  # of about unit length, the length they are used at
                nn.init.normal_(points, std=points.shape[-1] ** -0.5)
        if self.reference_log_mass is not None:
            nn.init.zeros_(self.reference_log_mass)
        if self.log_bandwidth is not None:
            nn.init.constant_(self.log_bandwidth, math.log(self.initial_bandwidth))
        if self.log_epsilon is not None:
            nn.init.constant_(self.log_epsilon, math.log(self.initial_epsilon))

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that live on a scale of their own, where 0 means nothing."""
        return {"reference", "reference_log_mass", "anchor", "log_bandwidth", "log_epsilon"}

    @property
    def bandwidth(self) -> float | Tensor:
        """The bandwidth in use: a float, or the learned one per head, [H]."""
        return self.initial_bandwidth if self.log_bandwidth is None else self.log_bandwidth.exp()

    @property
    def epsilon(self) -> float | Tensor:
        """The epsilon in use: a float, or the learned one per head, [H]."""
        return self.initial_epsilon if self.log_epsilon is None else self.log_epsilon.exp()

    def forward(
        self,
        x: Tensor,  # [B, N, C]
        mask: Tensor | None = None,  # [B, N] bool
        grid: Grid | None = None,
    ) -> Tensor:  # [B, N, C]
        """Let the tokens attend to one another.

        Args:
            x: tokens [B, N, C], floating point; or sequences of different lengths as a nested
                tensor [B, j, C] of layout torch.jagged, which comes out as one. That is each
                sequence alone, and takes neither mask nor grid; only masses and pooled references
                are computed of the padded tokens.
            mask: bool [B, N], True = valid. The others give nothing and come out as exactly 0.
            grid: (H, W) with H * W = N if the tokens are a grid, row by row; matters to positions
                and to pooled references, which are then spread over the grid.
        """
        if isinstance(x, Tensor) and x.is_nested:
            return self._attend_nested(x, mask, grid)
        x, transport = self._transport(x, mask, grid)
        query = None
        if self.query is not None:
            query = self._points(self.query(x))
            transport["query_mask"] = mask
            transport["query_positions"] = transport["token_positions"]
        value = self._split(self.value(x))
        output = set_attention(query, transport.pop("key"), value, **transport)  # [B, H, N, D]
        return _zero_invalid(self.projection(output.transpose(1, 2).flatten(2)), mask)

    def transport_plan(
        self,
        x: Tensor,  # [B, N, C]
        mask: Tensor | None = None,  # [B, N] bool
        grid: Grid | None = None,
    ) -> Tensor:  # [B, H, N, M]
        """Which tokens each reference draws its mass from, for the arguments of ``forward``.

        Entry [i, j] is the mass that goes from token i to reference j; column j sums to the
        reference's mass b_j, so dividing by the column sums gives the weights of collect.
        """
        return transport_plan(**self._transport(x, mask, grid)[1])

    def extra_repr(self) -> str:
        """The options that differ from a plain SeT attention, and the sizes."""
        parts = [f"{self.dim}, num_heads={self.num_heads}, num_references={self.num_references}"]
        if self.pooled_references:
            parts.append("pooled_references=True")
        parts.append(f"kernel={self.kernel!r}")
        if self.kernel == "gaussian":
            parts.append(f"bandwidth={_describe(self.initial_bandwidth, self.log_bandwidth)}")
        parts.append(f"epsilon={_describe(self.initial_epsilon, self.log_epsilon)}")
        parts.append(f"iterations={self.iterations}")
        if self.token_mass is None:
            parts.append("learned_token_mass=False")
        if self.reference_log_mass is None:
            parts.append("learned_reference_mass=False")
        if self.reference_mass is not None:
            parts.append("adaptive_reference_mass=True")
        if self.num_anchors is not None:
            parts.append(f"num_anchors={self.num_anchors}")
        if self.position_bandwidth is not None:
            parts.append(f"position_bandwidth={self.position_bandwidth}")
        return ", ".join(parts)

    def _transport(
        self, x: Tensor, mask: Tensor | None, grid: Grid | None
    ) -> tuple[Tensor, dict[str, Any]]:
        """The tokens without what their padding holds, and the arguments of transport_plan."""
        self._check(x, mask, grid)
        x = _zero_invalid(x, mask)
        key = self._points(self.key(x))
        token_positions = None
        if self.position_bandwidth is not None:
            token_positions = centres(grid or (x.shape[1],), x)
        return x, {
            "key": key,
            "mask": mask,
            "token_positions": token_positions,
            **self._problem(x, mask, grid, key.dtype),
        }

    def _problem(
        self, x: Tensor, mask: Tensor | None, grid: Grid | None, dtype: torch.dtype
    ) -> dict[str, Any]:
        """The arguments of transport_plan but for the tokens' own: references in the keys' dtype,
        masses and options."""
        if self.reference is None:
            pooled = average_parts(x, self.num_references, mask, grid)
            reference = self._points(self.key(pooled))
        else:
            reference = self._features(self.reference.to(dtype).unsqueeze(0)).squeeze(0)
        reference_positions = None
        if self.position_bandwidth is not None:
            parts = (self.num_references,) if grid is None else nearly_square(self.num_references)
            reference_positions = centres(parts, x)
        return {
            "reference": reference,
            "token_mass": self._token_mass(x, mask),
            "reference_mass": self._reference_mass(x, mask),
            "kernel": self.kernel if self.anchor is None else "linear",
            "bandwidth": self.bandwidth if self.anchor is None else 1.0,
            "epsilon": self.epsilon,
            "iterations": self.iterations,
            "reference_positions": reference_positions,
            "position_bandwidth": self.position_bandwidth,
        }

    def _attend_nested(self, x: Tensor, mask: object, grid: object) -> Tensor:  # [B, j, C]
        _require(x.layout == torch.jagged, "x", "a nested tensor of layout torch.jagged", x.layout)
        for name, given in (("mask", mask), ("grid", grid)):
            _require(given is None, name, "None with a nested x", type(given).__name__)
        whole = x.dim() == 3 and x._ragged_idx == 1 and x.lengths() is None and x.shape[0] > 0  # type: ignore[attr-defined]
        _require(whole, "x", "[B, j, C], B >= 1, without holes (call .contiguous())", x.shape)
        tokens, offsets = x.values(), x.offsets()  # type: ignore[attr-defined]  # [N, C], [B + 1]
        shape = f"floating point [B, j, C={self.dim}]"
        if not x.is_floating_point():
            raise TypeError(_message("x", shape, f"{x.dtype} {list(x.shape)}"))
        _require(tokens.shape[1] == self.dim, "x", shape, f"{x.dtype} {list(x.shape)}")
        self._check_against_parameters(tokens)
        lengths = offsets.diff()

        def packed(x: Tensor) -> Tensor:  # [1, H, N, D] -> [N, H, D]
            return x.squeeze(0).transpose(0, 1)

        key = packed(self._points(self.key(tokens.unsqueeze(0))))
        value = packed(self._split(self.value(tokens.unsqueeze(0))))
        # Padded, with its mask, for what reads all tokens of a sequence at little cost.
        shortest, longest = int(lengths.min()), int(lengths.max())
        valid = torch.arange(longest, device=x.device) < lengths.unsqueeze(1)
        padded = tokens.new_zeros(*valid.shape, self.dim)
        padded[valid] = tokens
        problem = self._problem(padded, valid, None, key.dtype)
        if problem["token_mass"] is not None:
            problem["token_mass"] = problem["token_mass"].transpose(1, 2)[valid]
        if self.position_bandwidth is not None:
            positions = [centres((length,), tokens) for length in lengths.tolist()]
            problem["token_positions"] = torch.cat(positions)
        query = None
        if self.query is not None:
            query = packed(self._points(self.query(tokens.unsqueeze(0))))
            problem["cu_seqlens_query"] = offsets
            problem["query_positions"] = problem.get("token_positions")
        output = set_attention_varlen(query, key, value, cu_seqlens=offsets, **problem)
        return torch.nested.nested_tensor_from_jagged(
            self.projection(output.flatten(1)), offsets, min_seqlen=shortest, max_seqlen=longest
        )

    def _split(self, x: Tensor) -> Tensor:  # [B, N, C] -> [B, H, N, D]
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _points(self, x: Tensor) -> Tensor:  # [B, N, C] -> [B, H, N, D]
        return self._features(self._split(x))

    def _features(self, x: Tensor) -> Tensor:  # [B, H, N, D] -> [B, H, N, D] or [B, H, N, P]
        """On the unit sphere and, with anchors, in the space of the Nystrom features."""
        x = _unit(x)
        if self.anchor is None:
            return x
        return nystrom_features(x, _unit(self.anchor), self.bandwidth)

    def _token_mass(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """[B, H, N], 1 on average: the scale does not matter. Float16 could not hold N."""
        if self.token_mass is None:
            return None
        logits = self.token_mass(x).transpose(1, 2)
        if mask is not None:
            logits = logits.masked_fill(~mask.unsqueeze(1), torch.finfo(logits.dtype).min)
        return _softmax(logits) * x.shape[1]

    def _reference_mass(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """[H, M], or [B, H, M] where adaptive, 1 on average."""
        if self.reference_log_mass is None:
            return None
        logits = self.reference_log_mass
        if self.reference_mass is not None:
            logits = logits + self.reference_mass(_mean(x, mask)).unflatten(
                -1, (self.num_heads, -1)
            )
        return _softmax(logits) * self.num_references

    def _check(self, x: Tensor, mask: Tensor | None, grid: Grid | None) -> None:
        _require_type(isinstance(x, Tensor), "x", "a tensor", x)
        shape = f"floating point [B, N, C={self.dim}]"
        if not x.is_floating_point():
            raise TypeError(_message("x", shape, f"{x.dtype} {list(x.shape)}"))
        fits = x.dim() == 3 and x.shape[-1] == self.dim
        _require(fits, "x", shape, f"{x.dtype} {list(x.shape)}")
        self._check_against_parameters(x)
        # Sizes are put into words only for an error: torch.compile would fix them to what they are.
        if mask is not None:
            _require_type(isinstance(mask, Tensor), "mask", "a bool tensor or None", mask)
            if mask.dtype != torch.bool or mask.shape != x.shape[:2]:
                shape = f"bool [B={x.shape[0]}, N={x.shape[1]}]"
                error = TypeError if mask.dtype != torch.bool else ValueError
                raise error(_message("mask", shape, f"{mask.dtype} {list(mask.shape)}"))
            on = f"on x's device, {x.device}"
            _require(mask.device == x.device, "mask", on, mask.device)
        tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]
        if grid is not None and not tracing:  # which has tensors for sizes
            pair = "a pair of ints (H, W) or None"
            _require_type(isinstance(grid, (tuple, list)), "grid", pair, grid)
            if not all(_is_integer(size) for size in grid):
                raise TypeError(_message("grid", pair, grid))
            if len(grid) != 2 or min(grid) < 1 or grid[0] * grid[1] != x.shape[1]:
                expected = f"(H, W) with H * W = N = {x.shape[1]}"
                raise ValueError(_message("grid", expected, grid))

    def _check_against_parameters(self, x: Tensor) -> None:
        """On the device and of the dtype of the key's weight, where that has the usual form."""
        weight = getattr(self.key, "weight", None)
        if (
            not isinstance(weight, Tensor) or not weight.is_floating_point()
        ):  # replaced or quantized
            return
        on = f"on the parameters' device, {weight.device}"
        _require(x.device == weight.device, "x", on, x.device)
        # Autocast leaves float64 as it is.
        mixed = _autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weight.dtype)
        if x.dtype != weight.dtype and not mixed:
            expected = f"{weight.dtype} as the parameters are (convert one, or use autocast)"
            raise TypeError(_message("x", expected, x.dtype))


def _message(name: str, expected: str, got: object) -> str:
    return f"SetAttention: {name} must be {expected}, got {got}"


def _require(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(_message(name, expected, got))


def _require_type(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise TypeError(_message(name, expected, type(got).__name__))


def _is_integer(x: object) -> bool:
    return isinstance(x, (int, torch.SymInt)) and not isinstance(x, bool)


def _is_number(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _is_positive(x: float) -> bool:
    return math.isfinite(x) and x > 0


def _parameter(present: bool, *shape: int) -> nn.Parameter | None:
    return nn.Parameter(torch.empty(shape)) if present else None


def _describe(initial: float, logarithm: Tensor | None) -> str:
    return f"{initial}" if logarithm is None else f"learned from {initial}"


def _unit(x: Tensor) -> Tensor:
    """To length 1 over the last dimension; 0 stays 0, also where float16 rounds 1e-12 to it."""
    return F.normalize(x, dim=-1, eps=max(1e-12, torch.finfo(x.dtype).tiny)).to(x.dtype)


def _mean(x: Tensor, mask: Tensor | None) -> Tensor:  # [B, N, C], zero where invalid -> [B, C]
    """Over the valid tokens, summed in float32 at least; of none: 0."""
    total = x.sum(1, dtype=torch.promote_types(x.dtype, torch.float32))
    valid = x.new_ones(x.shape[:2]) if mask is None else mask
    return (total / valid.sum(1, keepdim=True).clamp(min=1)).to(x.dtype)


def _softmax(x: Tensor) -> Tensor:
    """Over the last dimension, in float32 at least, and never 0: that is no mass of a reference."""
    shares = x.softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32))
    return shares.clamp(min=LEAST_SHARE)


def _zero_invalid(x: Tensor, mask: Tensor | None) -> Tensor:  # [B, N, C]
    return x if mask is None else torch.where(mask.unsqueeze(-1), x, 0)
