"""SetAttention: SeT attention as a torch module, with projections, references and masses."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .arguments import autocast_enabled, is_dtensor, is_integer, is_number, refusal, require
from .foreign import answers_foreign_names
from .functional import set_attention, set_attention_varlen, transport_plan
from .layout import Grid, average_parts, centres, nearly_square
from .nystrom import nystrom_features
from .reference import unit

LEAST_SHARE = 1e-30  # a normal number of float32, and too small to matter


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
    masses, references pooled from the input, the separate query.

    Args:
        dim: channels C of input and output, a multiple of ``num_heads``.
        num_heads: heads H.
        num_references: references M per head.
        pooled_references: compute the references from the input, as the average keys of M even
            parts of the sequence or of the grid, instead of learning them. Not of DTensors.
        query_projection: give the tokens queries of their own (a second solve), which start as
            their keys; without it q = k.
        kernel: "gaussian", kappa(k, y) = exp(-\|k - y\|^2 / (2 bandwidth^2)), or "linear", <k, y>.
        bandwidth: of the gaussian kernel, > 0.
        epsilon: entropy of the transport, > 0. Smaller is sharper, and below 1/32 in float32 slower
            (the log domain instead of scaling).
        iterations: Sinkhorn steps T >= 0.
        learned_token_mass: a_i proportional to exp(<u_h, x_i>), instead of uniform.
        learned_reference_mass: b_j proportional to exp(c_hj), instead of uniform.
        adaptive_reference_mass: add <m_hj, mean_i x_i>, over the valid tokens, to c_hj: an input
            may need some references more than others, but fixed masses use them equally.
        num_anchors: if given, replace the gaussian kernel by its Nystrom approximation
            <psi(k), psi(y)> on that many learned anchors per head; see
            :func:`setformer_ext.nystrom.nystrom_features`.
        position_bandwidth: if given, w_ij = exp(-\|p_i - r_j\|^2 / position_bandwidth^2), else 1.
            Tokens p and references r are the centres of even parts of [0, 1] (sequences) or
            [0, 1]^2 (grids). Padding counts as part of the sequence.
        bias: whether the projections have biases.
        dropout: probability, in [0, 1), that a number of the output is dropped in training. (There
            are no attention weights to drop.)
        context_dim: channels of the ``context`` that ``forward`` may be given; ``dim`` if None.
            Another width needs ``query_projection``.
        device, dtype: of the parameters.

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
        num_references: int = 32,
        *,
        pooled_references: bool = False,
        query_projection: bool = True,
        kernel: str = "gaussian",
        bandwidth: float = 1.0,
        epsilon: float = 0.04,
        iterations: int = 1,
        learned_token_mass: bool = True,
        learned_reference_mass: bool = True,
        adaptive_reference_mass: bool = False,
        num_anchors: int | None = None,
        position_bandwidth: float | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        context_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        integers = {
            "dim": dim,
            "num_heads": num_heads,
            "num_references": num_references,
            "iterations": iterations,
        }
        numbers = {"bandwidth": bandwidth, "epsilon": epsilon, "dropout": dropout}
        flags = {
            "pooled_references": pooled_references,
            "query_projection": query_projection,
            "learned_token_mass": learned_token_mass,
            "learned_reference_mass": learned_reference_mass,
            "adaptive_reference_mass": adaptive_reference_mass,
            "bias": bias,
        }
        for name, integer in integers.items():
            _require_type(is_integer(integer), name, "an int", integer)
        for name, number in numbers.items():
            _require_type(is_number(number), name, "a number", number)
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
        _require(0 <= dropout < 1, "dropout", "in [0, 1)", dropout)
        for name, count in (("num_anchors", num_anchors), ("context_dim", context_dim)):
            if count is not None:
                _require_type(is_integer(count), name, "an int or None", count)
                _require(count >= 1, name, "at least 1 or None", count)
        if context_dim not in (None, dim):
            expected = f"dim={dim} or None without query_projection=True"
            _require(query_projection, "context_dim", expected, context_dim)
        if position_bandwidth is not None:
            _require_type(
                is_number(position_bandwidth),
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

        # Converted to Python's numbers: NumPy's cannot be saved or exported everywhere.
        self.dim, self.num_heads, self.num_references = map(int, (dim, num_heads, num_references))
        self.context_dim = self.dim if context_dim is None else int(context_dim)
        self.pooled_references = pooled_references
        self.kernel = kernel
        self.bandwidth = float(bandwidth)
        self.epsilon = float(epsilon)
        self.iterations = int(iterations)
        self.num_anchors = None if num_anchors is None else int(num_anchors)
        self.position_bandwidth = None if position_bandwidth is None else float(position_bandwidth)
        self.dropout = float(dropout)

        heads, references, depth = self.num_heads, self.num_references, self.dim // self.num_heads

        linear = partial(nn.Linear, device=device, dtype=dtype)

        def parameter(present: bool, *shape: int) -> nn.Parameter | None:
            empty = torch.empty(shape, device=device, dtype=dtype)
            return nn.Parameter(empty) if present else None

        self.key = linear(self.context_dim, self.dim, bias=bias)
        self.query = linear(self.dim, self.dim, bias=bias) if query_projection else None
        self.value = linear(self.context_dim, self.dim, bias=bias)
        self.projection = linear(self.dim, self.dim, bias=bias)
        self.token_mass = (
            linear(self.context_dim, heads, bias=False) if learned_token_mass else None
        )
        self.reference_mass = (
            linear(self.context_dim, heads * references, bias=False)
            if adaptive_reference_mass
            else None
        )
        self.reference = parameter(not pooled_references, heads, references, depth)
        self.reference_log_mass = parameter(learned_reference_mass, heads, references)
        self.anchor = parameter(num_anchors is not None, heads, self.num_anchors or 0, depth)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew; queries start as keys, masses uniform."""
        for linear in (self.key, self.query, self.value, self.projection):
            if linear is not None:
                nn.init.xavier_uniform_(linear.weight)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
        self.start_queries_as_keys()
        for mass in (self.token_mass, self.reference_mass):
            if mass is not None:
                nn.init.zeros_(mass.weight)
        for points in (self.reference, self.anchor):
            if points is not None:  # of about unit length, the length they are used at
                nn.init.normal_(points, std=points.shape[-1] ** -0.5)
        if self.reference_log_mass is not None:
            nn.init.zeros_(self.reference_log_mass)

    def start_queries_as_keys(self) -> None:
        """Copy the keys' projection to the queries', if both have the same number of channels:
        tokens then find similar tokens from the first step on."""
        if self.query is None or self.context_dim != self.dim:
            return
        for query, key in zip(self.query.parameters(), self.key.parameters(), strict=True):
            # transformers marks the parameters that it has loaded; they must not be overwritten.
            if not getattr(query, "_is_hf_initialized", False):
                with torch.no_grad():
                    query.copy_(key)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that should not decay: for them 0 has no special meaning."""
        return {"reference", "reference_log_mass", "anchor"}

    @answers_foreign_names
    def forward(
        self,
        x: Tensor,  # [B, N, C]
        mask: Tensor | None = None,  # [B, N] bool
        grid: Grid | None = None,
        *,
        context: Tensor | None = None,  # [B, Nc, Cc]
        context_mask: Tensor | None = None,  # [B, Nc] bool
        context_grid: Grid | None = None,
    ) -> Tensor:  # [B, N, C]
        """Let the tokens attend to one another, or to those of a context.

        Args:
            x: tokens [B, N, C], floating point; or sequences of different lengths as a nested
                tensor [B, j, C] of layout torch.jagged, which gives a nested output. Then each
                sequence attends to itself, and mask, grid and context must be None. (Internally
                only masses and pooled references use padded tokens.)
            mask: bool [B, N], True = valid. The others give nothing and come out as exactly 0.
            grid: (H, W) with H * W = N if the tokens are a grid, row by row; matters to positions
                and to pooled references, which are then spread over the grid.
            context: tokens [B, Nc, Cc] to attend to, Cc = ``context_dim``: keys, values, masses and
                pooled references are theirs, queries x's. Without ``query_projection`` x's go
                through the keys' projection.
            context_mask: bool [B, Nc], True = valid.
            context_grid: (H, W) with H * W = Nc.
        """
        given = {"context_mask": context_mask, "context_grid": context_grid}
        if isinstance(x, Tensor) and x.is_nested:
            given |= {"mask": mask, "grid": grid, "context": context}
            for name, other in given.items():
                _require(other is None, name, "None with a nested x", type(other).__name__)
            return self._attend_nested(x)
        if context is None:
            expected = f"given to a module of context_dim={self.context_dim}"
            _require(self.context_dim == self.dim, "context", expected, None)
            for name, other in given.items():
                _require(other is None, name, "None without a context", type(other).__name__)
            x = source = self._valid_tokens("x", x, mask, grid, self.dim)
            transport = self._transport(source, mask, grid)
        else:
            x = self._valid_tokens("x", x, mask, grid, self.dim)
            source = self._valid_tokens("context", context, context_mask, context_grid)
            expected = f"[B={x.shape[0]}, Nc, Cc] as x is"
            _require(source.shape[0] == x.shape[0], "context", expected, list(source.shape))
            transport = self._transport(source, context_mask, context_grid)
        query = None
        if context is not None or self.query is not None:
            query = self._points((self.query or self.key)(x))
            transport["query_mask"] = mask
            transport["query_positions"] = self._positions(x, grid)
        value = self._split(self.value(source))
        output = set_attention(query, transport.pop("key"), value, **transport)  # [B, H, N, D]
        return zero_padding(self._projected(output.transpose(1, 2)), mask)

    @answers_foreign_names
    def transport_plan(
        self,
        x: Tensor,  # [B, N, C]
        mask: Tensor | None = None,  # [B, N] bool
        grid: Grid | None = None,
    ) -> Tensor:  # [B, H, N, M]
        """Which tokens each reference draws its mass from, for the arguments of ``forward``, or
        for a context and its mask and grid.

        Entry [i, j] is the mass that goes from token i to reference j; column j sums to the
        reference's mass b_j, so dividing by the column sums gives the weights of collect.
        """
        x = self._valid_tokens("x", x, mask, grid)
        return transport_plan(**self._transport(x, mask, grid))

    def extra_repr(self) -> str:
        """The options that differ from a plain SeT attention, and the sizes."""
        parts = [f"{self.dim}, num_heads={self.num_heads}, num_references={self.num_references}"]
        if self.pooled_references:
            parts.append("pooled_references=True")
        parts.append(f"kernel={self.kernel!r}")
        if self.kernel == "gaussian":
            parts.append(f"bandwidth={self.bandwidth}")
        parts.append(f"epsilon={self.epsilon}")
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
        if self.context_dim != self.dim:
            parts.append(f"context_dim={self.context_dim}")
        if self.dropout:
            parts.append(f"dropout={self.dropout}")
        return ", ".join(parts)

    def _valid_tokens(
        self,
        name: str,
        x: Tensor,  # [B, N, C]
        mask: Tensor | None,
        grid: Grid | None,
        dim: int | None = None,
    ) -> Tensor:  # [B, N, C]
        """The tokens, checked, with 0 in the padding. ``dim`` is ``context_dim`` if None."""
        prefix = "" if name == "x" else f"{name}_"
        self._check(name, x, dim or self.context_dim)
        self._check_mask(f"{prefix}mask", mask, name, x)
        self._check_grid(f"{prefix}grid", grid, x)
        return zero_padding(x, mask)

    def _transport(self, x: Tensor, mask: Tensor | None, grid: Grid | None) -> dict[str, Any]:
        """The arguments of transport_plan."""
        key = self._points(self.key(x))
        return {
            "key": key,
            "mask": mask,
            "token_positions": self._positions(x, grid),
            **self._problem(x, mask, grid, key.dtype),
        }

    def _positions(self, x: Tensor, grid: Grid | None) -> Tensor | None:  # [N, 1] or [N, 2]
        return None if self.position_bandwidth is None else centres(grid or (x.shape[1],), x)

    def _problem(
        self, x: Tensor, mask: Tensor | None, grid: Grid | None, dtype: torch.dtype
    ) -> dict[str, Any]:
        """The arguments of transport_plan except key, mask and token positions: references in the
        keys' dtype, masses and options."""
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
            "normalize": self.anchor is None,  # features have their own length
        }

    def _attend_nested(self, x: Tensor) -> Tensor:  # [B, j, C]
        _require(x.layout == torch.jagged, "x", "a nested tensor of layout torch.jagged", x.layout)
        whole = x.dim() == 3 and x._ragged_idx == 1 and x.lengths() is None and x.shape[0] > 0  # type: ignore[attr-defined]
        _require(whole, "x", "[B, j, C], B >= 1, without holes (call .contiguous())", x.shape)
        tokens, offsets = x.values(), x.offsets()  # type: ignore[attr-defined]  # [N, C], [B + 1]
        self._check("x", x, self.dim, "B, j")
        lengths = offsets.diff()

        def packed(x: Tensor) -> Tensor:  # [1, H, N, D] -> [N, H, D]
            return x.squeeze(0).transpose(0, 1)

        key = packed(self._points(self.key(tokens.unsqueeze(0))))
        value = packed(self._split(self.value(tokens.unsqueeze(0))))
        # Masses and pooled references need whole sequences: padded, with a mask. That costs little.
        shortest, longest = int(lengths.min()), int(lengths.max())
        most = max(longest, 1)
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
            problem |= {"cu_seqlens_query": offsets, "max_seqlen_query": most}
            problem["query_positions"] = problem.get("token_positions")
        output = set_attention_varlen(
            query, key, value, cu_seqlens=offsets, max_seqlen=most, **problem
        )
        output = self._projected(output)
        return torch.nested.nested_tensor_from_jagged(
            output, offsets, min_seqlen=shortest, max_seqlen=longest
        )

    def _projected(self, x: Tensor) -> Tensor:  # [.., N, H, D] -> [.., N, C]
        """The heads side by side through the last projection, and dropout in training."""
        return F.dropout(self.projection(x.flatten(-2)), self.dropout, self.training)

    def _split(self, x: Tensor) -> Tensor:  # [B, N, C] -> [B, H, N, D]
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _points(self, x: Tensor) -> Tensor:  # [B, N, C] -> [B, H, N, D]
        return self._features(self._split(x))

    def _features(self, x: Tensor) -> Tensor:  # [B, H, N, D] -> [B, H, N, D] or [B, H, N, P]
        """With anchors, the Nystrom features of the points on the unit sphere."""
        if self.anchor is None:
            return x
        return nystrom_features(unit(x), unit(self.anchor), self.bandwidth)

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
            logits = logits + self.reference_mass(mean_of_valid(x, mask)).unflatten(
                -1, (self.num_heads, -1)
            )
        return _softmax(logits) * self.num_references

    # Sizes are only formatted when there is an error: torch.compile would fix formatted sizes.

    def _check_mask(self, name: str, mask: Tensor | None, tokens: str, x: Tensor) -> None:
        if mask is None:
            return
        _require_type(isinstance(mask, Tensor), name, "a bool tensor or None", mask)
        if mask.dtype != torch.bool or mask.shape != x.shape[:2]:
            shape = f"bool [B={x.shape[0]}, N={x.shape[1]}]"
            error = TypeError if mask.dtype != torch.bool else ValueError
            got = f"{mask.dtype} {list(mask.shape)}"
            if mask.dtype != torch.bool:
                got += "; of 0 and 1, 1 = valid: .bool(); added to scores, of 0 and -inf: == 0"
            if mask.dim() == 3:
                got += "; another sequence to attend to is context="
            raise error(_message(name, shape, got))
        on = f"on {tokens}'s device, {x.device}"
        _require(mask.device == x.device, name, on, mask.device)

    def _check_grid(self, name: str, grid: Grid | None, x: Tensor) -> None:
        if grid is None or torch.jit.is_tracing():  # type: ignore[attr-defined]
            return  # a trace has tensors for sizes
        pair = "a pair of ints (H, W) or None"
        _require_type(isinstance(grid, (tuple, list)), name, pair, grid)
        if not all(is_integer(size) for size in grid):
            raise TypeError(_message(name, pair, grid))
        if len(grid) != 2 or min(grid) < 1 or grid[0] * grid[1] != x.shape[1]:
            expected = f"(H, W) with H * W = N = {x.shape[1]}"
            raise ValueError(_message(name, expected, grid))

    def _check(self, name: str, x: Tensor, dim: int, rows: str = "B, N") -> None:
        """Require tokens of the device and dtype of the key's weight, if that is a plain one."""
        _require_type(isinstance(x, Tensor), name, "a tensor", x)
        plain = "a plain tensor where pooled_references=True"
        _require_type(not (self.pooled_references and is_dtensor(x)), name, plain, x)
        shape = f"floating point [{rows}, C={dim}]"
        if not x.is_floating_point():
            raise TypeError(_message(name, shape, f"{x.dtype} {list(x.shape)}"))
        _require(x.dim() == 3 and x.shape[-1] == dim, name, shape, f"{x.dtype} {list(x.shape)}")
        weight = getattr(self.key, "weight", None)
        if (
            not isinstance(weight, Tensor) or not weight.is_floating_point()
        ):  # replaced or quantized
            return
        on = f"on the parameters' device, {weight.device}"
        _require(x.device == weight.device, name, on, x.device)
        # Autocast leaves float64 as it is.
        mixed = autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weight.dtype)
        if x.dtype != weight.dtype and not mixed:
            expected = f"{weight.dtype} as the parameters are (convert one, or use autocast)"
            raise TypeError(_message(name, expected, x.dtype))


_message = partial(refusal, "SetAttention")
_require = partial(require, "SetAttention")


def _require_type(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise TypeError(_message(name, expected, type(got).__name__))


def _is_positive(x: float) -> bool:
    return math.isfinite(x) and x > 0


def mean_of_valid(
    x: Tensor, mask: Tensor | None
) -> Tensor:  # [B, N, C], zero where invalid -> [B, C]
    """The mean over the valid tokens, summed in float32 at least; 0 if there are none."""
    total = x.sum(1, dtype=torch.promote_types(x.dtype, torch.float32))
    valid = x.new_ones(x.shape[:2]) if mask is None else mask
    return (total / valid.sum(1, keepdim=True).clamp(min=1)).to(x.dtype)


def _softmax(x: Tensor) -> Tensor:
    """Over the last dimension, in float32 at least; never 0, which is not allowed as a mass."""
    shares = x.softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32))
    return shares.clamp(min=LEAST_SHARE)


def zero_padding(x: Tensor, mask: Tensor | None) -> Tensor:  # [B, N, C]
    return x if mask is None else torch.where(mask.unsqueeze(-1), x, 0)
