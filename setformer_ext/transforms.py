"""vmap, autocast and FLOP counts of the operations."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .ops import LIBRARY
from .problem import TENSORS, Backward, Gradients, Problem, Solution, is_per_sample

OPERATIONS = torch.ops.setformer_ext
# What vmap can fold into the batch; positions, bandwidth and epsilon belong to all samples.
FOLDED = {name for name, about in TENSORS.items() if about.per_sample} - {"bandwidth", "epsilon"}


def _batch_problem(size: int, problem: Problem, in_dims: Problem) -> Problem | None:
    """One problem for all vmapped samples, with the vmapped dimension folded into the batch.

    None if that is impossible: bandwidth, epsilon, positions and packed sequences have no batch
    dimension.
    """
    if problem.offsets is not None:
        return None
    batched: dict[str, Any] = {}
    for name, tensor in problem.tensors().items():
        dim = getattr(in_dims, name)
        if name not in FOLDED:
            if dim is not None:
                return None
            continue
        if dim is None:
            if not is_per_sample(name, tensor):
                continue  # learned: shared by all samples
            tensor = tensor.expand(size, *tensor.shape)
        else:
            tensor = tensor.movedim(dim, 0)
            if is_per_sample(name, tensor):  # learned, one per sample of the vmap
                batch = _batch_size(problem, in_dims)
                tensor = tensor.unsqueeze(1).expand(size, batch, *tensor.shape[1:])
        batched[name] = tensor.flatten(0, 1)
    return problem.with_tensors(batched)


def _batch_size(problem: Problem, in_dims: Problem) -> int:
    shape = list(problem.key.shape)
    if in_dims.key is not None:
        del shape[in_dims.key]
    return int(shape[0])


def _fold(size: int, tensor: Any, dim: Any) -> Any:  # [V, B, ...] -> [V * B, ...]
    if not isinstance(tensor, Tensor) or (dim is None and tensor.numel() == 0):
        return tensor
    tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.flatten(0, 1) if tensor.dim() > 1 else tensor[0]


def _unfold(size: int, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(
        t.unflatten(0, (size, -1)) if t.dim() > 1 else t.expand(size, *t.shape) for t in tensors
    )


def _one_by_one(
    operation: Any, size: int, in_dims: tuple[int | None, ...], arguments: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    """Call the operation for each sample, if samples cannot be folded into the batch."""
    results = [
        operation(
            *(
                x.select(dim, sample) if isinstance(x, Tensor) and dim is not None else x
                for x, dim in zip(arguments, in_dims, strict=True)
            )
        )
        for sample in range(size)
    ]
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True))


def _vmap_set_attention(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    size = info.batch_size
    problem = _batch_problem(size, Problem(*arguments), Problem(*in_dims))
    if problem is None:
        results = _one_by_one(OPERATIONS.set_attention, size, in_dims, arguments)
    else:
        results = _unfold(size, OPERATIONS.set_attention(*problem))
    return results, (0,) * len(Solution._fields)


def _vmap_backward(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    size = info.batch_size
    given, dims = Backward.read(*arguments), Backward.read(*in_dims)
    problem = _batch_problem(size, given.problem, dims.problem)
    if problem is None:
        results = _one_by_one(OPERATIONS.set_attention_backward, size, in_dims, arguments)
    else:
        folded = given._replace(
            grad_output=_fold(size, given.grad_output, dims.grad_output),
            grad_pooled=_fold(size, given.grad_pooled, dims.grad_pooled),
            solution=Solution(
                *(_fold(size, x, d) for x, d in zip(given.solution, dims.solution, strict=True))
            ),
            problem=problem,
        )
        results = _unfold(size, OPERATIONS.set_attention_backward(*folded.arguments()))
    return results, (0,) * len(Gradients._fields)


torch.library.register_vmap("setformer_ext::set_attention", _vmap_set_attention, lib=LIBRARY)
torch.library.register_vmap("setformer_ext::set_attention_backward", _vmap_backward, lib=LIBRARY)


def _register_autocast(device: str) -> None:
    """Under autocast keys, queries, values and references take the autocast type.

    Masses, bandwidth, epsilon and positions stay float32, which the kernels accumulate in.
    """
    key = getattr(torch._C.DispatchKey, f"Autocast{device.upper()}")

    def kernel(_: Any, *arguments: Any) -> Any:
        problem = Problem(*arguments)
        if problem.key.dtype != torch.float64 and problem.key.device.type == device:
            problem = problem.in_storage_type(torch.get_autocast_dtype(device))
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return OPERATIONS.set_attention.default(*problem)

    LIBRARY.impl("set_attention", kernel, key.name, with_keyset=True)


for _device in ("cpu", "cuda"):
    _register_autocast(_device)


def attention_flops(
    batch: int,
    heads: int,
    tokens: int,
    queries: int | None,
    references: int,
    depth: int,
    value_depth: int,
    iterations: int,
    distribute: bool = True,
) -> int:
    """Floating-point operations of a forward call, two for each multiply-add.

    Per token and reference: 2 D for the similarity, 4 for each Sinkhorn step, 2 Dv to collect;
    then 2 Dv (and 2 for its normaliser) to distribute. Exponentials are not counted.
    """
    pairs = batch * heads * references
    per_key = 2 * depth + 4 * iterations + 2 * value_depth
    if not distribute:
        return pairs * tokens * per_key
    if queries is None:
        return pairs * tokens * (per_key + 2 * value_depth + 2)
    per_query = 2 * depth + 4 * iterations + 2 * value_depth + 2
    return pairs * (tokens * per_key + queries * per_query)


def _sizes(problem: Problem) -> dict[str, Any]:
    """The sizes, from a problem that holds shapes in place of tensors."""
    batch, heads, tokens, depth = problem.key
    return {
        "batch": batch,
        "heads": heads,
        "tokens": tokens,
        "queries": None if problem.query is None else problem.query[2],
        "references": problem.reference[-2],
        "depth": depth,
        "value_depth": problem.value[-1],
        "iterations": problem.iterations,
        "distribute": problem.distribute,
    }


@register_flop_formula(OPERATIONS.set_attention)
def set_attention_flops(*shapes: Any, **_: Any) -> int:
    return attention_flops(**_sizes(Problem(*shapes)))


@register_flop_formula(OPERATIONS.set_attention_backward)
def set_attention_backward_flops(*shapes: Any, **_: Any) -> int:
    """Recomputes the similarity (2 D), then the gradient of the scores (4 Dv + 4 + 4 T), of the
    pooled outputs and of the values (2 Dv each), the T adjoint steps (4 each), and keys and
    references from the scores (2 D each)."""
    sizes = _sizes(Backward.read(*shapes).problem)
    pairs = sizes["batch"] * sizes["heads"] * sizes["references"]
    depth, value_depth, steps = sizes["depth"], sizes["value_depth"], sizes["iterations"]
    solve = 6 * depth + 8 * steps
    tokens, queries = sizes["tokens"], sizes["queries"]
    if not sizes["distribute"]:
        return pairs * tokens * (solve + 4 * value_depth + 2)
    if queries is None:
        return pairs * tokens * (solve + 8 * value_depth + 4)
    return pairs * (tokens + queries) * (solve + 4 * value_depth + 2)
