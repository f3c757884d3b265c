"""What ranks send each other for self attention with the Gaussian kernel, epsilon >= 1/32."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Of one sequence, that of all ranks together."""

    heads: int  # H
    tokens: int  # N
    references: int  # M
    depth: int  # D = Dv
    iterations: int  # T

    def __str__(self) -> str:
        return (
            f"B=1 H={self.heads} N={self.tokens} M={self.references} D=Dv={self.depth} "
            f"T={self.iterations}"
        )


def numbers_shared(sizes: Sizes, on_cuda: bool = False) -> tuple[int, int]:
    """Numbers that every rank has of its own and all ranks merge, forward and backward."""
    m, steps, masses = sizes.references, max(sizes.iterations, 1), 0 if on_cuda else 3
    forward = steps * m + m * (sizes.depth + on_cuda) + masses
    backward = (steps - 1) * m + m * (sizes.depth + 1) + masses
    return sizes.heads * forward, sizes.heads * backward


def messages(sizes: Sizes) -> tuple[int, int]:
    """How often ranks wait for each other on CUDA: twice for each merging."""
    steps = max(sizes.iterations, 1)
    return 2 * (steps + 1), 2 * steps


def bytes_sent(sizes: Sizes, ranks: int, on_cuda: bool = False) -> tuple[int, int]:
    """By each of the ranks, forward and backward: numbers of four bytes."""
    forward, backward = (
        4 * 2 * (ranks - 1) * numbers // ranks for numbers in numbers_shared(sizes, on_cuda)
    )
    return forward, backward
