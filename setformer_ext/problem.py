"""The table of a problem: its tensors and options, their shapes, their types, and which have rows
of keys or of queries.

All code that handles the arguments of the operation follows it: schemas, checks, autocast,
derivatives, vmap, packed sequences, DTensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor

from .reference import unit, zero_invalid

KERNELS = ("gaussian", "linear")
STORAGE_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class About:
    """A tensor of the problem: what each letter of its shape counts, and its type.

    B samples, H heads, N keys, Nq queries, M references, D and Dv channels, P coordinates, S packed
    sequences. Storage is the key's type; accumulate is float64 for float64 keys, else float32.
    """

    letters: tuple[str, ...]
    type: str  # storage, accumulate, bool or int64
    shared: bool = False  # may come without B, the same for all samples

    @property
    def per_sample(self) -> int | None:
        """Its number of dimensions if given for each sample; None if it is always shared."""
        return len(self.letters) if self.letters[0] == "B" else None


def _about(shape: str, type: str, shared: bool = False) -> About:
    return About(tuple(shape.split()), type, shared)


class Problem(NamedTuple):
    """The arguments of the operation ``set_attention``, in the order of its schema.

    If ``offsets`` are given, S sequences are packed one after another. Then B is S, except for
    tensors with a row for each token, where it is 1, and ``rows`` and ``query_rows`` hold the
    numbers of one sequence after another. Bandwidth and epsilon are [H], and per sample only inside
    the second derivative.
    """

    key: Annotated[Tensor, _about("B H N D", "storage")]
    value: Annotated[Tensor, _about("B H N Dv", "storage")]
    reference: Annotated[Tensor, _about("B H M D", "storage", shared=True)]
    bandwidth: Annotated[Tensor, _about("B H", "accumulate", shared=True)]
    epsilon: Annotated[Tensor, _about("B H", "accumulate", shared=True)]
    query: Annotated[Tensor | None, _about("B H Nq D", "storage")]  # None: the keys
    mask: Annotated[Tensor | None, _about("B N", "bool")]
    query_mask: Annotated[Tensor | None, _about("B Nq", "bool")]
    token_mass: Annotated[Tensor | None, _about("B H N", "accumulate")]
    reference_mass: Annotated[Tensor | None, _about("B H M", "accumulate", shared=True)]
    token_positions: Annotated[Tensor | None, _about("N P", "accumulate")]
    query_positions: Annotated[Tensor | None, _about("Nq P", "accumulate")]
    reference_positions: Annotated[Tensor | None, _about("M P", "accumulate")]
    # Where each sequence begins, and the number of all tokens; on any device.
    offsets: Annotated[Tensor | None, _about("S+1", "int64")]
    query_offsets: Annotated[Tensor | None, _about("S+1", "int64")]
    kernel: str
    position_bandwidth: float
    iterations: int
    normalize: bool
    distribute: bool
    max_seqlen: int  # no sequence has more tokens; 0: to be read from the offsets
    max_seqlen_query: int

    @property
    def batch(self) -> int:
        """B of tensors that have one entry for each sample: S if sequences are packed."""
        return self.key.shape[0] if self.offsets is None else self.offsets.shape[0] - 1

    @property
    def queries(self) -> Tensor:  # [B, H, Nq, D], or [B, H, N, D] in self attention
        return self.key if self.query is None else self.query

    @property
    def results(self) -> list[str]:
        """The fields of the solution that are not empty."""
        absent = set() if self.distribute else {"output"}
        absent |= {"query_rows", "query_columns"} if self.query is None else set()
        return [name for name in Solution._fields if name not in absent]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are given, by name."""
        return {name: x for name in TENSORS if (x := getattr(self, name)) is not None}

    def with_tensors(self, tensors: Mapping[str, Any]) -> "Problem":
        """The problem with these tensors in place of its own."""
        return self._replace(**tensors)

    def arguments(self, of_queries: bool = True) -> dict[str, Any]:
        """The arguments for the functions of ``reference``."""
        left_out = {*_OF_PACKED, "distribute"}
        if not of_queries:
            left_out |= {"query", "query_mask", "query_positions"}
        return {name: x for name, x in self._asdict().items() if name not in left_out}

    def in_storage_type(self, dtype: torch.dtype) -> "Problem":
        """The problem with its tensors in this storage type and its accumulate type."""
        types = {"storage": dtype, "accumulate": accumulate_dtype(dtype)}
        tensors = self.tensors()
        if self.normalize and dtype == torch.float16:
            # float16 holds 6e-8 to 65504 only: vectors are scaled to unit length before.
            for name, mask in (("key", self.mask), ("query", self.query_mask), ("reference", None)):
                if (x := tensors.get(name)) is not None and x.dtype != dtype:
                    tensors[name] = unit(zero_invalid(x, mask))
        return self.with_tensors(
            {
                name: x.to(types[TENSORS[name].type])
                for name, x in tensors.items()
                if TENSORS[name].type in types
            }
        )

    def sequences(self) -> "list[Problem]":
        """The problems that are packed, each a batch of one."""
        assert self.offsets is not None
        # tolist() is unknown to torch.func before 2.10
        ends = [int(end) for end in self.offsets.cpu()]
        queries = self.query_offsets
        query_ends = ends if queries is None else [int(end) for end in queries.cpu()]
        problems = []
        for index in range(self.batch):
            parts: dict[str, Any] = dict(_OF_PACKED)
            for dimensions, bounds in ((OF_KEYS, ends), (OF_QUERIES, query_ends)):
                begin, end = bounds[index], bounds[index + 1]
                for name, dimension in dimensions.items():
                    if (x := getattr(self, name)) is not None:
                        parts[name] = x.narrow(dimension, begin, end - begin)
            for name, about in TENSORS.items():
                if about.shared and is_per_sample(name, x := getattr(self, name)):
                    parts[name] = x.narrow(0, index, 1)
            problems.append(self._replace(**parts))
        return problems


# What only packed sequences have, and what others have in its place.
_OF_PACKED = {"offsets": None, "query_offsets": None, "max_seqlen": 0, "max_seqlen_query": 0}
_HINTS = get_type_hints(Problem, include_extras=True)
TENSORS: dict[str, About] = {
    name: hint.__metadata__[0] for name, hint in _HINTS.items() if hasattr(hint, "__metadata__")
}
OPTIONAL = {name for name in TENSORS if type(None) in get_args(get_args(_HINTS[name])[0])}
OPTIONS: dict[str, type] = {name: _HINTS[name] for name in Problem._fields if name not in TENSORS}

# The dimension of each tensor that runs over the tokens: over the keys, over the queries.
OF_KEYS = {name: x.letters.index("N") for name, x in TENSORS.items() if "N" in x.letters}
OF_QUERIES = {name: x.letters.index("Nq") for name, x in TENSORS.items() if "Nq" in x.letters}


class Solution(NamedTuple):
    """The results of ``set_attention``; empty tensors where the problem has no such result."""

    output: Tensor  # [B, H, Nq or N, Dv] storage
    pooled: Tensor  # [B, H, M, Dv] accumulate
    rows: Tensor  # [B, H, T + 1, N] accumulate: the row normalisers of every step
    columns: Tensor  # [B, H, max(T, 1) + 1, M] accumulate: the column normalisers
    query_rows: Tensor  # [B, H, T + 1, Nq] accumulate
    query_columns: Tensor  # [B, H, max(T, 1), M] accumulate


class Gradients(NamedTuple):
    """The results of ``set_attention_backward``, each under the name of the tensor that it is the
    gradient of: per sample even for learned (shared) tensors, empty if the problem has no such
    tensor."""

    key: Tensor  # [B, H, N, D] storage
    value: Tensor  # [B, H, N, Dv] storage
    reference: Tensor  # [B, H, M, D] accumulate
    bandwidth: Tensor  # [B, H] accumulate
    epsilon: Tensor  # [B, H] accumulate
    query: Tensor  # [B, H, Nq, D] storage
    token_mass: Tensor  # [B, H, N] accumulate
    reference_mass: Tensor  # [B, H, M] accumulate


class Backward(NamedTuple):
    """The arguments of ``set_attention_backward``, which takes them one after another."""

    grad_output: Any  # [B, H, Nq or N, Dv] storage, or None
    grad_pooled: Any  # [B, H, M, Dv] accumulate, or None
    solution: Solution
    problem: Problem

    @classmethod
    def read(cls, grad_output: Any, grad_pooled: Any, *others: Any) -> "Backward":
        """Reads the arguments, or something else for each of them, in the order of the schema."""
        end = len(Solution._fields)
        return cls(grad_output, grad_pooled, Solution(*others[:end]), Problem(*others[end:]))

    def arguments(self) -> tuple[Any, ...]:
        """In the order of the schema."""
        return (self.grad_output, self.grad_pooled, *self.solution, *self.problem)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that kernels compute in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_per_sample(name: str, x: Any) -> bool:
    """Whether a tensor of the problem is given for each sample, rather than once for all."""
    return x is not None and len(x.shape) == TENSORS[name].per_sample
