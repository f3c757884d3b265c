"""torch.ops.setformer_ext: the operations, their kernels and their shapes.

``set_attention`` solves, collects and (where ``distribute``) distributes in one call and returns,
beside the results, what its backward needs; ``set_attention_backward`` is an operation of its own,
shared by every way to differentiate. Derivatives are registered in ``autograd.py``, vmap, autocast
and FLOP counts in ``transforms.py``.

Arguments arrive checked (``functional.py``): storage type is that of key, and "accumulate" is
float64 for float64 keys and float32 otherwise.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

from . import _C

# Replaces the numbers of this rank by those of all ranks of a group merged (`_C`'s docstring).
Merge = Callable[[list[Any], str], None]

DISPATCH_KEYS = ("CPU", "CUDA")  # the compiled module tells them apart by the arrays' memory
OPTIONS = "str kernel, float position_bandwidth, SymInt iterations"
PROBLEM = (
    "Tensor key, Tensor value, Tensor reference, Tensor bandwidth, Tensor epsilon, Tensor? query, "
    "Tensor? mask, Tensor? query_mask, Tensor? token_mass, Tensor? reference_mass, "
    "Tensor? token_positions, Tensor? query_positions, Tensor? reference_positions, "
    f"Tensor? offsets, Tensor? query_offsets, {OPTIONS}, bool distribute"
)
GRADIENTS = (
    "Tensor grad_key, Tensor grad_value, Tensor grad_reference, Tensor grad_bandwidth, "
    "Tensor grad_epsilon, Tensor grad_query, Tensor grad_token_mass, Tensor grad_reference_mass"
)
SOLUTION = (
    "Tensor output, Tensor pooled, Tensor rows, Tensor columns, Tensor query_rows, "
    "Tensor query_columns"
)

# One library holds every registration: torch takes no name twice, and when the package is imported
# again, after its removal from sys.modules, this takes all of them back first.
_NAMESPACE: Any = torch.ops.setformer_ext
if hasattr(_NAMESPACE, "library"):
    _NAMESPACE.library._destroy()
LIBRARY = _NAMESPACE.library = torch.library.Library("setformer_ext", "FRAGMENT")

LIBRARY.define(f"set_attention({PROBLEM}) -> ({SOLUTION})")
LIBRARY.define(
    "set_attention_backward"
    f"(Tensor? grad_output, Tensor? grad_pooled, {SOLUTION}, {PROBLEM}) -> ({GRADIENTS})",
)


class Problem(NamedTuple):
    """The arguments of ``set_attention``, in the order of its schema.

    Where ``offsets`` are given, S sequences are packed one after another: then B is S, but 1 for
    tensors with a row for each token, and ``rows``, ``query_rows`` and the kernels' gradient of
    ``token_mass`` hold the numbers of one sequence after another.
    """

    key: Tensor  # [B, H, N, D] storage
    value: Tensor  # [B, H, N, Dv] storage
    reference: Tensor  # [H, M, D] or [B, H, M, D] storage
    bandwidth: Tensor  # [H] accumulate
    epsilon: Tensor  # [H] accumulate
    query: Tensor | None  # [B, H, Nq, D] storage; None: the keys are the queries
    mask: Tensor | None  # [B, N] bool
    query_mask: Tensor | None  # [B, Nq] bool
    token_mass: Tensor | None  # [B, H, N] accumulate
    reference_mass: Tensor | None  # [H, M] or [B, H, M] accumulate
    token_positions: Tensor | None  # [N, P] accumulate
    query_positions: Tensor | None  # [Nq, P] accumulate
    reference_positions: Tensor | None  # [M, P] accumulate
    offsets: Tensor | None  # [S + 1] int64, on the CPU: where sequences begin, and N
    query_offsets: Tensor | None  # [S + 1] int64, on the CPU
    kernel: str
    position_bandwidth: float
    iterations: int
    distribute: bool

    @property
    def batch(self) -> int:
        """B of what is there once for each sample: S where sequences are packed."""
        return self.key.shape[0] if self.offsets is None else self.offsets.shape[0] - 1

    def sequences(self) -> "list[Problem]":
        """The problems that are packed, each a batch of one."""
        assert self.offsets is not None
        ends = [int(end) for end in self.offsets]  # tolist() is unknown to torch.func before 2.10
        query_ends = ends if self.query_offsets is None else [int(x) for x in self.query_offsets]
        problems = []
        for index in range(self.batch):
            parts: dict[str, Any] = {"offsets": None, "query_offsets": None}
            for dimensions, bounds in ((OF_KEYS, ends), (OF_QUERIES, query_ends)):
                begin, end = bounds[index], bounds[index + 1]
                for name, dimension in dimensions.items():
                    if (x := getattr(self, name)) is not None:
                        parts[name] = x.narrow(dimension, begin, end - begin)
            for name in ("reference", "reference_mass", "bandwidth", "epsilon"):
                if (x := getattr(self, name)) is not None and x.dim() == RANKS[name]:
                    parts[name] = x.narrow(0, index, 1)
            problems.append(self._replace(**parts))
        return problems

    def arrays(self) -> dict[str, Any]:
        """The given tensors and the options, by the names that the compiled module knows."""
        absent = {"distribute"}
        if self.query is None:
            absent |= {"query_mask", "query_positions", "query_offsets"}
        return {
            name: x for name, x in self._asdict().items() if x is not None and name not in absent
        }

    def in_storage_type(self, dtype: torch.dtype) -> "Problem":
        """The problem as autocast to ``dtype`` passes it on: masses and the like in float32."""
        accumulate = accumulate_dtype(dtype)
        storage = ("key", "value", "reference", "query")
        cast: dict[str, Any] = {
            name: x.to(dtype if name in storage else accumulate)
            for name, x in self._asdict().items()
            if isinstance(x, Tensor) and x.is_floating_point()
        }
        return self._replace(**cast)


class Solution(NamedTuple):
    """The results of ``set_attention``; empty tensors where the problem has no such result."""

    output: Tensor  # [B, H, Nq or N, Dv] storage
    pooled: Tensor  # [B, H, M, Dv] accumulate
    rows: Tensor  # [B, H, T + 1, N] accumulate: the row normalisers of every step
    columns: Tensor  # [B, H, max(T, 1) + 1, M] accumulate: the column normalisers
    query_rows: Tensor  # [B, H, T + 1, Nq] accumulate
    query_columns: Tensor  # [B, H, max(T, 1), M] accumulate

    def arrays(self, problem: Problem) -> dict[str, Tensor]:
        """The results that the problem has, by name."""
        fields = self._asdict()
        if not problem.distribute:
            del fields["output"]
        if problem.query is None:
            del fields["query_rows"], fields["query_columns"]
        return fields


class Gradients(NamedTuple):
    """The results of ``set_attention_backward``: per sample also for learned (shared) tensors."""

    key: Tensor  # [B, H, N, D] storage
    value: Tensor  # [B, H, N, Dv] storage
    reference: Tensor  # [B, H, M, D] accumulate
    bandwidth: Tensor  # [B, H] accumulate
    epsilon: Tensor  # [B, H] accumulate
    query: Tensor  # [B, H, Nq, D] storage, empty without a query
    token_mass: Tensor  # [B, H, N] accumulate, empty without one
    reference_mass: Tensor  # [B, H, M] accumulate, empty without one


# Rank of each of a problem's tensors where it is given per sample: then it starts with the batch.
# Bandwidth and epsilon are per sample only inside the second derivative.
RANKS = {
    "key": 4,
    "value": 4,
    "reference": 4,
    "bandwidth": 2,
    "epsilon": 2,
    "query": 4,
    "mask": 2,
    "query_mask": 2,
    "token_mass": 3,
    "reference_mass": 3,
}

# The dimension of each tensor that runs over the tokens: over the keys, over the queries.
OF_KEYS = {"key": 2, "value": 2, "token_mass": 2, "mask": 1, "token_positions": 0}
OF_QUERIES = {"query": 2, "query_mask": 1, "query_positions": 0}

# set_attention_backward takes two gradients and the solution before the problem.
BEFORE_PROBLEM = 2 + len(Solution._fields)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the kernels compute in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_rows(like: Tensor, depth: int) -> Tensor:  # [B, H, N, *] -> [B, H, N, depth]
    """Unwritten rows in the layout of the given ones: with the heads of a token side by side, where
    they came of one projection, what joins them again need not copy."""
    batch, heads, tokens = like.shape[:3]
    if like.stride(1) < like.stride(2):
        return like.new_empty((batch, tokens, heads, depth)).transpose(1, 2)
    return like.new_empty((batch, heads, tokens, depth))


def empty_solution(problem: Problem) -> Solution:
    """Unwritten results of the right shapes and types, on the problem's device."""
    key, query = problem.key, problem.query
    batch, (packed, heads, tokens) = problem.batch, key.shape[:3]
    references, depth = problem.reference.shape[-2], problem.value.shape[-1]
    steps = problem.iterations
    accumulate = accumulate_dtype(key.dtype)

    def empty(*sizes: int) -> Tensor:
        return key.new_empty(sizes, dtype=accumulate)

    queries = tokens if query is None else query.shape[2]
    rows = key if query is None else query
    return Solution(
        output=empty_rows(rows, depth) if problem.distribute else key.new_empty(0),
        pooled=empty(batch, heads, references, depth),
        rows=empty(packed, heads, steps + 1, tokens),
        columns=empty(batch, heads, max(steps, 1) + 1, references),
        query_rows=empty(0) if query is None else empty(packed, heads, steps + 1, queries),
        query_columns=(
            empty(0) if query is None else empty(batch, heads, max(steps, 1), references)
        ),
    )


def empty_gradients(problem: Problem) -> Gradients:
    """Unwritten gradients of the right shapes and types, on the problem's device."""
    key, value, query = problem.key, problem.value, problem.query
    batch, (packed, heads, tokens, depth) = problem.batch, key.shape
    references = problem.reference.shape[-2]
    accumulate = accumulate_dtype(key.dtype)

    def empty(*sizes: int) -> Tensor:
        return key.new_empty(sizes, dtype=accumulate)

    return Gradients(
        key=empty_rows(key, depth),
        value=empty_rows(value, value.shape[-1]),
        reference=empty(batch, heads, references, depth),
        bandwidth=empty(batch, heads),
        epsilon=empty(batch, heads),
        query=key.new_empty(0) if query is None else empty_rows(query, depth),
        token_mass=empty(0) if problem.token_mass is None else empty(packed, heads, tokens),
        reference_mass=(
            empty(0) if problem.reference_mass is None else empty(batch, heads, references)
        ),
    )


def run(function: str, arrays: dict[str, Any], merge: Merge | None = None) -> None:
    """Call a function of the compiled module, on CUDA on the current stream of the key's device."""
    # OpenMP keeps the number of threads per calling thread, and torch sets it there when first
    # asked: without this, torch.set_num_threads would not hold in other threads than the main one.
    torch.get_num_threads()
    device = arrays["key"].device
    stream = 0
    on_device: AbstractContextManager[Any] = nullcontext()
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device).cuda_stream
        # The launchers too would make it current for a while, but only torch knows how to go back
        # to a device that is not in use without taking memory there.
        on_device = torch.cuda.device(device)

    def workspace(size: int) -> Any:
        # On CUDA torch hands the memory out again only to work that comes later on this stream.
        return to_dlpack(torch.empty(size, dtype=torch.uint8, device=device))

    # Capsules made by to_dlpack, unlike those of __dlpack__, do not mind requires_grad and make no
    # stream wait: all that torch does with these tensors is on the current stream already.
    capsules = {n: to_dlpack(x) if isinstance(x, Tensor) else x for n, x in arrays.items()}
    ranks = {} if merge is None else {"merge": merge}
    with on_device:
        getattr(_C, function)(**capsules, stream=stream, workspace=workspace, **ranks)


def solve(
    problem: Problem, merge: Merge | None = None, solution: Solution | None = None
) -> Solution:
    """Forward by the kernels, with ``merge`` of a problem whose tokens several ranks hold; into
    what ``empty_solution`` gave, where that is there already."""
    solution = empty_solution(problem) if solution is None else solution
    run("set_attention_forward", problem.arrays() | solution.arrays(problem), merge)
    return solution


def differentiate(
    grad_output: Tensor | None,  # [B, H, Nq or N, Dv] storage
    grad_pooled: Tensor | None,  # [B, H, M, Dv] accumulate
    solution: Solution,
    problem: Problem,
    merge: Merge | None = None,
) -> Gradients:
    """Backward by the kernels."""
    # They fix the layout of what forward wrote for them, and want no output whose elements share
    # memory; vmap may have changed that since.
    output, *others = solution
    output = output.contiguous() if 0 in output.stride() else output
    solution = Solution(output, *(x.contiguous() for x in others))
    gradients = empty_gradients(problem)
    arrays = problem.arrays() | solution.arrays(problem)
    if problem.distribute and grad_output is None:
        grad_output = torch.zeros_like(solution.output)
    arrays |= {"grad_output": grad_output, "grad_pooled": grad_pooled}
    arrays |= {
        f"grad_{name}": grad
        for name, grad in gradients._asdict().items()
        if getattr(problem, name) is not None
    }
    run("set_attention_backward", arrays, merge)
    if problem.offsets is not None and problem.token_mass is not None:
        gradients = gradients._replace(token_mass=_beside(gradients.token_mass, problem.offsets))
    return gradients


@torch.library.impl("setformer_ext::set_attention", DISPATCH_KEYS, lib=LIBRARY)
def _set_attention(*arguments: Any) -> Solution:
    return solve(Problem(*arguments))


@torch.library.impl("setformer_ext::set_attention_backward", DISPATCH_KEYS, lib=LIBRARY)
def _set_attention_backward(
    grad_output: Tensor | None, grad_pooled: Tensor | None, *arguments: Any
) -> Gradients:
    solution, problem = arguments[: len(Solution._fields)], arguments[len(Solution._fields) :]
    return differentiate(grad_output, grad_pooled, Solution(*solution), Problem(*problem))


def _beside(in_turn: Tensor, offsets: Tensor) -> Tensor:  # [1, H, N]
    """From [H, n] of one sequence after another to sequences beside one another."""
    heads = in_turn.shape[1]
    parts = in_turn.flatten().split((heads * offsets.diff()).tolist())
    return torch.cat([part.view(1, heads, -1) for part in parts], dim=2)


@torch.library.register_fake("setformer_ext::set_attention", lib=LIBRARY)
def _fake_set_attention(*arguments: Any) -> Solution:
    return empty_solution(Problem(*arguments))


@torch.library.register_fake("setformer_ext::set_attention_backward", lib=LIBRARY)
def _fake_backward(*arguments: Any) -> Gradients:
    return empty_gradients(Problem(*arguments[BEFORE_PROBLEM:]))
