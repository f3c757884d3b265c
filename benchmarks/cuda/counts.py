"""What the passes of csrc/cuda/forward.cuh and backward.cuh do, counted.

For half types on sm_80 and later, Gaussian kernel, epsilon >= 1/32, no positions or masses. The
functions follow the passes tile by tile, padding included. Instructions per pair of a token and a
reference, counted in the source; "vectors" are the values of a reference that are read from shared
memory.

    per pair                          float32   exponentials   vectors
    score s from the product          5         1              1
    2^s                                         1
    sum over references               1                        1
    sum over tokens                   1.5
    entry of a plan, from s           3         1              1
    entry of a plan, from 2^s         2                        1
    split into two halves, stored     5
    adjoint of a row, from s          7         1              2
    adjoint of a row, from 2^s        1                        1
    adjoint of a column, from s       4         1              1
    adjoint of a column, from 2^s     1
    ds of a plan                      3.5                      2
    ds of a step                      2                        2
    E                                 6         1
"""

from dataclasses import dataclass, fields

from layout import Problem

TILE = 64  # tokens, references and depth of a tile
WARP_ROWS = 16
ELEMENT = 2  # bytes of a bfloat16 or float16
NUMBER = 4  # of a float32
MATRIX = 512  # bytes of a 16 x 16 matrix of halves, what one ldmatrix reads


@dataclass(frozen=True)
class Work:
    """What one launch does in all its blocks; the names are those of Device's rates."""

    memory: float = 0  # bytes from and to device memory, each tensor once
    cache: float = 0  # bytes asked of the L2 cache
    shared: float = 0  # bytes from and to shared memory
    tensor: float = 0  # flop on the tensor cores
    float32: float = 0  # instructions of one thread: an FMA is one
    special: float = 0  # exponentials of one thread

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Work)))

    def __rmul__(self, times: float) -> "Work":
        return Work(*(getattr(self, f.name) * times for f in fields(Work)))


def pairs(p: Problem) -> int:
    """Of tokens and references, padded to tiles: what is computed element by element."""
    return p.problems * p.tiles * TILE * p.chunks * TILE


def per_pair(p: Problem, float32: float, special: float = 0, vectors: float = 0) -> Work:
    """Element by element; a thread reads a vector's value once for its two rows."""
    n = pairs(p)
    return Work(float32=float32 * n, special=special * n, shared=NUMBER / 2 * vectors * n)


def product(
    p: Problem, rows: int, columns: int, depth: int, parts: tuple[int, int] = (1, 1)
) -> Work:
    """[rows, depth] times [depth, columns] a head; a factor is one tensor, or two halves."""
    columns, depth = -(-columns // 16) * 16, -(-depth // 16) * 16
    matrices = rows // WARP_ROWS * (depth // 16) * (parts[0] + parts[1] * (columns // 16))
    return p.problems * Work(
        tensor=2.0 * rows * columns * depth * (parts[0] + parts[1] - 1), shared=matrices * MATRIX
    )


def token_rows(p: Problem) -> Work:
    """A tensor of the user's, [B, H, N, D], read or written once."""
    size = p.problems * p.tokens * p.depth * ELEMENT
    return Work(memory=size, cache=size, shared=size)


def numbers(count: float) -> Work:
    """Values of float32, read or written once."""
    return Work(memory=NUMBER * count, cache=NUMBER * count)


def key_copies(p: Problem) -> Work:
    """Tiles of keys on their way through shared memory, for one product with all references."""
    # Each comes once for each tile of references, and these with it unless one tile is all.
    tile = TILE * p.depth * ELEMENT
    copied = p.problems * p.tiles * p.chunks * tile * (1 if p.chunks * p.depths == 1 else 2)
    return Work(cache=copied, shared=2 * copied, float32=2 * copied / ELEMENT)  # and the norms


def scores(p: Problem, resident: bool, factors: bool = False) -> Work:
    """Scores::compute, or the factors 2^s. A resident head has its keys in place."""
    work = product(p, p.tiles * TILE, p.references, p.depth) + per_pair(p, 5, 1 + factors, 1)
    return work if resident else work + key_copies(p)


def stored(p: Problem) -> Work:
    """store_accumulators: as two halves in shared memory."""
    return per_pair(p, 5) + Work(shared=2 * ELEMENT * pairs(p))


def operand(p: Problem) -> Work:
    """load_operand of [M, Dv] for each tile of tokens, from the L2 cache."""
    entries = p.problems * p.tiles * p.references * p.depth
    return Work(cache=NUMBER * entries, shared=2 * ELEMENT * entries, float32=6 * entries)


def sinkhorn_step(p: Problem) -> Work:
    """rows^{t-1} and columns^t; more than one tile of references takes two sweeps."""
    sweeps = 1 if p.chunks == 1 else 2
    return sweeps * scores(p, False, factors=True) + per_pair(p, 1 + 1.5, 0, 1)


def pool(p: Problem, resident: bool) -> Work:
    """A plan's transpose times the rows of a tensor: collect, distribute_backward."""
    return (
        p.depths * (scores(p, resident) + per_pair(p, 3, 1, 1) + stored(p))
        + per_pair(p, 1)
        + product(p, p.chunks * TILE, p.depth, p.tiles * TILE, (2, 1))
        + p.chunks * token_rows(p)
    )


def distribute(p: Problem) -> Work:
    """O_i = sum_j R_ij A_j: sums over references first, where there are several tiles."""
    sweeps = 1 if p.chunks == 1 else 1 + p.depths
    entries = 1 if p.chunks == 1 else p.depths
    return (
        sweeps * scores(p, False, factors=True)
        + per_pair(p, 1, 0, 1)
        + entries * (per_pair(p, 2, 0, 1) + stored(p))
        + product(p, p.tiles * TILE, p.depth, p.references, (2, 2))
        + token_rows(p)
        + (operand(p) if p.chunks * p.depths > 1 else Work())
    )


def sinkhorn_step_backward(p: Problem, t: int, resident: bool) -> Work:
    """fhat^t, and gbar^{t-1} where t > 1; step T also dv."""
    collects = t == p.steps
    sweeps = p.depths if collects and p.chunks > 1 else 1
    if t > 1 and p.chunks > 1:
        sweeps += 1
    work = sweeps * scores(p, resident, factors=not collects)
    if collects:
        work += per_pair(p, 7, 1, 2) + stored(p) + operand(p) + 2 * token_rows(p)
        work += product(p, p.tiles * TILE, p.depth, p.references, (2, 2))
        return work + (per_pair(p, 4, 1, 1) if t > 1 else Work())
    return work + per_pair(p, 2 if t > 1 else 1, 0, 1)


def score_gradient(p: Problem, resident: bool) -> Work:
    """ds and E of all pairs, E stored."""
    plans = 2 * (
        token_rows(p)
        + operand(p)
        + product(p, p.tiles * TILE, p.references, p.depth, (1, 2))
        + per_pair(p, 3.5, 0, 2)
    )
    steps = p.steps * per_pair(p, 2, 0, 2)
    return scores(p, resident) + plans + steps + per_pair(p, 6, 1) + stored(p)


def gradient(p: Problem, to_tokens: bool, to_references: bool, resident: bool) -> Work:
    """dk, dy, or both of one score_gradient."""
    work = p.groups * score_gradient(p, resident)
    if to_tokens:
        work += product(p, p.tiles * TILE, p.depth, p.references, (2, 1)) + token_rows(p)
    if to_references:  # and sum_i E_ij, down the columns of both halves
        work += product(p, p.chunks * TILE, p.depth, p.tiles * TILE, (2, 1))
        work += per_pair(p, 4) + Work(shared=2 * NUMBER * pairs(p))
    return work


def on_chip(p: Problem) -> Work:
    """All of forward where a head stays in registers: entries once, then two FMA each a step."""
    shape = p.on_chip
    assert shape
    strips = p.problems * -(-p.tokens // WARP_ROWS)
    n = strips * WARP_ROWS * 8 * shape.blocks
    depth, columns = 32 * -(-p.depth // 32), 8 * shape.blocks
    # keys and their norms against references, collect's product and distribute's
    tensor = 2.0 * strips * WARP_ROWS * depth * (columns + 16 + 2 * columns)
    matrices = strips * (depth // 16) * (2 + shape.blocks / 4 + 1 + shape.blocks / 8)
    exchanged = 8 * NUMBER * p.problems * shape.warps * columns * (p.steps + p.depth / 8)
    return Work(
        tensor=tensor,
        float32=n * (4 + 2 * max(p.steps, 1) + 1.5 + 1 + 0.5),
        special=2 * n,
        shared=matrices * MATRIX + exchanged + 3 * token_rows(p).shared,
    ) + 3 * Work(memory=token_rows(p).memory, cache=token_rows(p).cache)
