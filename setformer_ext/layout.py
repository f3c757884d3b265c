"""Even parts of a sequence or of a grid: where references sit and what they average."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Grid = tuple[int, int]


def nearly_square(count: int) -> Grid:
    """The (rows, columns) closest to a square with rows * columns = count, rows <= columns."""
    rows = next(r for r in range(math.isqrt(count), 0, -1) if count % r == 0)
    return rows, count // rows


def centres(shape: tuple[int, ...], like: Tensor) -> Tensor:  # [prod(shape), len(shape)]
    """The centres of the cells of [0, 1]^P cut into ``shape`` even parts, row by row.

    On ``like``'s device, in its dtype or float32 if that is finer: half precision would make
    neighbours of a long sequence coincide.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    axes = [(torch.arange(n, device=like.device, dtype=dtype) + 0.5) / n for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)


def average_parts(
    x: Tensor,  # [B, N, C]
    count: int,
    mask: Tensor | None = None,  # [B, N] bool
    grid: Grid | None = None,
) -> Tensor:  # [B, count, C]
    """The averages over ``count`` even parts of the tokens, as in adaptive average pooling.

    A sequence is cut by its valid tokens only, so padding changes nothing; a grid is cut into
    ``nearly_square(count)`` cells, of which the valid tokens are averaged. A part without valid
    tokens gives 0.
    """
    if grid is not None:
        rows, columns = (
            _parts(torch.arange(size, device=x.device), size, parts)
            for size, parts in zip(grid, nearly_square(count), strict=True)
        )
        member = rows[:, None, :, None] & columns[None, :, None, :]  # [rows, columns, H, W]
        member = member.flatten(2).flatten(0, 1)  # [count, N]
        if mask is not None:
            member = member & mask.unsqueeze(1)
    elif mask is None:
        member = _parts(torch.arange(x.shape[1], device=x.device), x.shape[1], count)
    else:
        rank = mask.cumsum(1) - 1
        member = _parts(rank, mask.sum(1)[:, None, None], count) & mask.unsqueeze(1)
    size = member.sum(-1, keepdim=True).clamp(min=1)
    return (member / size).to(x.dtype) @ x


def _parts(rank: Tensor, total: int | Tensor, count: int) -> Tensor:  # [..., N] -> [..., count, N]
    """Whether a token of this rank among ``total`` is in [floor(j t / c), ceil((j + 1) t / c))."""
    part = torch.arange(count, device=rank.device).unsqueeze(-1)
    rank = rank.unsqueeze(-2)
    return (part * total < (rank + 1) * count) & (rank * count < (part + 1) * total)
