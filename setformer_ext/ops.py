"""torch.ops.setformer_ext: the operations, their kernels and their shapes.

``set_attention`` solves, collects and (where ``distribute``) distributes in one call and returns,
beside the results, what its backward needs; ``set_attention_backward`` is an operation of its own,
shared by every way to differentiate. Derivatives are registered in ``autograd.py``, vmap, autocast
and FLOP counts in ``transforms.py``.

Arguments are checked by the compiled module, or before it by ``arguments.py``. The storage type is
the key's; "accumulate" is float64 for float64 keys and float32 otherwise.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

from . import _C
from .problem import (
    OF_KEYS,
    OPTIONAL,
    OPTIONS,
    TENSORS,
    Backward,
    Gradients,
    Problem,
    Solution,
    accumulate_dtype,
)

# Merges numbers over all ranks of a group, in place (see the docstring of `_C`).
Merge = Callable[[list[Any], str], None]

DISPATCH_KEYS = ("CPU", "CUDA")  # the compiled module tells them apart by the arrays' memory
_TYPES = {str: "str", float: "float", int: "SymInt", bool: "bool"}
PROBLEM = ", ".join(
    [f"Tensor{'?' if name in OPTIONAL else ''} {name}" for name in TENSORS]
    + [f"{_TYPES[type_]} {name}" for name, type_ in OPTIONS.items()]
)
SOLUTION = ", ".join(f"Tensor {name}" for name in Solution._fields)
GRADIENTS = ", ".join(f"Tensor grad_{name}" for name in Gradients._fields)
BACKWARD = f"Tensor? grad_output, Tensor? grad_pooled, {SOLUTION}, {PROBLEM}"

# One library holds all registrations, because torch refuses to register a name twice: if the
# package is imported again, after its removal from sys.modules, destroying this library undoes
# them.
_NAMESPACE: Any = torch.ops.setformer_ext
if hasattr(_NAMESPACE, "library"):
    _NAMESPACE.library._destroy()
LIBRARY = _NAMESPACE.library = torch.library.Library("setformer_ext", "FRAGMENT")

LIBRARY.define(f"set_attention({PROBLEM}) -> ({SOLUTION})")
LIBRARY.define(f"set_attention_backward({BACKWARD}) -> ({GRADIENTS})")


def empty_rows(like: Tensor, depth: int) -> Tensor:  # [B, H, N, *] -> [B, H, N, depth]
    """Unwritten rows in the layout of the given ones. If the heads of a token are side by side in
    memory, as after a projection, joining them again then needs no copy."""
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

    def if_cross(*sizes: int) -> Tensor:
        return empty(0) if query is None else empty(*sizes)

    queries = problem.queries.shape[2]
    return Solution(
        output=empty_rows(problem.queries, depth) if problem.distribute else key.new_empty(0),
        pooled=empty(batch, heads, references, depth),
        rows=empty(packed, heads, steps + 1, tokens),
        columns=empty(batch, heads, max(steps, 1) + 1, references),
        query_rows=if_cross(packed, heads, steps + 1, queries),
        query_columns=if_cross(batch, heads, max(steps, 1), references),
    )


def empty_gradients(problem: Problem) -> Gradients:
    """Unwritten gradients of the right shapes and types, on the problem's device."""
    key = problem.key
    packed, heads, tokens, depth = key.shape
    sizes = {"H": heads, "N": tokens, "M": problem.reference.shape[-2], "D": depth}
    accumulate = accumulate_dtype(key.dtype)

    def empty(name: str) -> Tensor:
        x, about = getattr(problem, name), TENSORS[name]
        if x is None:
            return key.new_empty(0)
        if about.type == "storage" and not about.shared:
            return empty_rows(x, x.shape[3])
        batch = packed if name in OF_KEYS else problem.batch
        shape = [batch, *(sizes[letter] for letter in about.letters[1:])]
        return key.new_empty(shape, dtype=accumulate)

    return Gradients(**{name: empty(name) for name in Gradients._fields})


def run(function: str, arrays: dict[str, Any], merge: Merge | None = None) -> None:
    """Call a function of the compiled module, on CUDA on the current stream of the key's device."""
    # OpenMP has a number of threads for each calling thread, which torch sets when it is first
    # asked: without this call torch.set_num_threads would only hold in the main thread.
    torch.get_num_threads()
    device = arrays["key"].device
    stream = 0
    on_device: AbstractContextManager[Any] = nullcontext()
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device).cuda_stream
        # The compiled module makes the device current too, but going back to a device that is not
        # in use would take memory there; torch can avoid that.
        on_device = torch.cuda.device(device)

    def workspace(size: int) -> Any:
        # On CUDA torch hands the memory out again only to work that comes later on this stream.
        return to_dlpack(torch.empty(size, dtype=torch.uint8, device=device))

    # Unlike __dlpack__, to_dlpack accepts tensors that require a gradient, and makes no stream
    # wait: all work of torch on these tensors is on the current stream already.
    capsules = {n: to_dlpack(x) if isinstance(x, Tensor) else x for n, x in arrays.items()}
    ranks = {} if merge is None else {"merge": merge}
    with on_device:
        getattr(_C, function)(**capsules, stream=stream, workspace=workspace, **ranks)


def _arrays(problem: Problem, solution: Solution) -> dict[str, Any]:
    """The given arrays and the options of a problem and its results, by the compiled module's
    names."""
    arrays: dict[str, Any] = problem.tensors()
    if problem.offsets is not None:
        arrays |= _packing(problem)
    arrays |= {name: getattr(solution, name) for name in problem.results}
    options = {name: getattr(problem, name) for name in OPTIONS if name != "distribute"}
    return options | arrays


def _packing(problem: Problem) -> dict[str, Any]:
    """The offsets of packed sequences where the kernels read them, and the greatest lengths, which
    kernels on CUDA have to know before. If they are not given, this waits for the offsets."""
    packing: dict[str, Any] = {}
    for name, longest in (("offsets", "max_seqlen"), ("query_offsets", "max_seqlen_query")):
        offsets = getattr(problem, name)
        if offsets is not None:
            packing[name] = offsets.to(problem.key.device, torch.int64).contiguous()
            packing[longest] = getattr(problem, longest) or _longest(offsets)
    return packing


def _longest(offsets: Tensor) -> int:  # [S + 1]
    """At least 0: what the kernels say of offsets that descend names these."""
    return max(int(offsets.diff().max()), 0) if offsets.shape[0] > 1 else 0


def solve(
    problem: Problem, merge: Merge | None = None, solution: Solution | None = None
) -> Solution:
    """Forward by the kernels. ``merge`` is needed if several ranks hold the tokens; ``solution``,
    from ``empty_solution``, is made if not given."""
    solution = empty_solution(problem) if solution is None else solution
    run("set_attention_forward", _arrays(problem, solution), merge)
    return solution


def differentiate(given: Backward, merge: Merge | None = None) -> Gradients:
    """Backward by the kernels."""
    problem, grad_output = given.problem, given.grad_output
    # The kernels need these contiguous, as forward wrote them, and no output whose elements share
    # memory; vmap may have changed both.
    output, *others = given.solution
    output = output.contiguous() if 0 in output.stride() else output
    solution = Solution(output, *(x.contiguous() for x in others))
    if problem.distribute and grad_output is None:
        grad_output = torch.zeros_like(solution.output)
    gradients = empty_gradients(problem)
    arrays = _arrays(problem, solution)
    arrays |= {"grad_output": grad_output, "grad_pooled": given.grad_pooled}
    arrays |= {
        f"grad_{name}": grad
        for name, grad in gradients._asdict().items()
        if getattr(problem, name) is not None
    }
    run("set_attention_backward", arrays, merge)
    return gradients


@torch.library.impl("setformer_ext::set_attention", DISPATCH_KEYS, lib=LIBRARY)
def _set_attention(*arguments: Any) -> Solution:
    return solve(Problem(*arguments))


@torch.library.impl("setformer_ext::set_attention_backward", DISPATCH_KEYS, lib=LIBRARY)
def _set_attention_backward(*arguments: Any) -> Gradients:
    return differentiate(Backward.read(*arguments))


@torch.library.register_fake("setformer_ext::set_attention", lib=LIBRARY)
def _fake_set_attention(*arguments: Any) -> Solution:
    return empty_solution(Problem(*arguments))


@torch.library.register_fake("setformer_ext::set_attention_backward", lib=LIBRARY)
def _fake_backward(*arguments: Any) -> Gradients:
    return empty_gradients(Backward.read(*arguments).problem)
