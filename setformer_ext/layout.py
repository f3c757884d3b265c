"""Even parts of a sequence or a grid: the places of references, and the tokens that they
average."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

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
    batch, length = x.shape[:2]
    if grid is not None:
        rows, columns = (
            _members(size, size, parts, x.device)
            for size, parts in zip(grid, nearly_square(count), strict=True)
        )
        row, column = rows[:, None, :, None], columns[:, None]
        index = torch.where((row > 0) & (column > 0), (row - 1) * grid[1] + column, 0)
        index = index.flatten(2).flatten(0, 1)  # [rows, columns, ., .] -> [count, L]
    else:
        total = length if mask is None else mask.sum(1)[:, None, None]
        index = _members(total, length, count, x.device)
    sample = torch.arange(batch, device=x.device)[:, None, None]
    if mask is not None:
        if grid is None:  # the i-th valid token, by a sort without ties: ONNX has no stable one
            place = torch.arange(length, device=x.device)
            token = 1 + torch.where(mask, place, place + length).argsort(dim=1)
        else:
            token = mask * torch.arange(1, length + 1, device=x.device)
        index = F.pad(token, (1, 0))[sample, index]
    size = (index > 0).sum(-1, keepdim=True).clamp(min=1)
    members = F.pad(x, (0, 0, 1, 0))[sample, index]  # [B, count, L, C]
    accumulate = torch.promote_types(x.dtype, torch.float32)
    return (members.sum(2, dtype=accumulate) / size).to(x.dtype)


def _members(
    total: int | Tensor,  # t, scalar or [B, 1, 1]
    largest: int,  # N >= t
    count: int,  # c
    device: torch.device,
) -> Tensor:  # [count, L] or [B, count, L]
    """The members floor(j t / c) + 1 to ceil((j + 1) t / c) of each part j, filled up with 0.

    L, the length of the longest part, is at most N / c + 2, so this holds O(N + c) numbers.
    """
    part = torch.arange(count, device=device).unsqueeze(-1)
    rank = part * total // count + torch.arange((largest + 2 * count - 2) // count, device=device)
    return torch.where(rank * count < (part + 1) * total, rank + 1, 0)
