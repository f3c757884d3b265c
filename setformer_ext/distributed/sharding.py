"""How the operations of one process work on DTensors: on shards of the batch or of the heads.

Such shards need no numbers of each other. Shards of tokens do: DTensors that are sharded on the
tokens are gathered first (`placed`), while `setformer_ext.distributed.set_attention` leaves them
where they are. Importing this module registers how operations are cut.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from ..problem import TENSORS, Backward, Gradients, Problem, Solution, is_per_sample

OPERATIONS = torch.ops.setformer_ext


def where(name: str, x: Any, key: Placement) -> Placement | None:
    """Where an argument lies for a key that is sharded on batch (0) or heads (1), or replicated.

    Args:
        name: of the argument, as in `Problem`.
        x: the argument, or an object that has its shape.
        key: the placement of the key.
    """
    if x is None or isinstance(x, (str, int, float, torch.SymInt)):
        return None
    if not isinstance(key, Shard):
        return key
    per_sample = is_per_sample(name, x)
    if key.dim == 0:
        return Shard(0) if per_sample else Replicate()
    of_all_heads = "H" not in TENSORS[name].letters or math.prod(x.shape) == 1
    return Replicate() if of_all_heads else Shard(1 if per_sample else 0)


def placed(problem: Problem) -> Problem:
    """The problem with its DTensors placed as the operations need them, so that those move none.

    An operation takes the memory layout of its results from the whole tensors, and each process
    takes it from its own part. If the two differ, views of the results fail. Redistributing may
    change the layout of a part; therefore `join` gives the whole tensor the layout of the parts.
    Plain tensors count as the same in all processes.
    """
    key: Any = problem.key
    mesh = key.device_mesh
    of_key = [
        p if p in (Shard(0), Shard(1)) and key.shape[p.dim] >= mesh.size(axis) else Replicate()
        for axis, p in enumerate(key.placements)
    ]

    def place(name: str, x: Any) -> Any:
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
        x = x.redistribute(placements=[where(name, x, p) for p in of_key])
        if name not in ("key", "value", "query"):
            return x
        return join(x.to_local(), x, x.shape)

    return problem.with_tensors({name: place(name, x) for name, x in problem.tensors().items()})


def join(local: Tensor, like: DTensor, shape: torch.Size) -> DTensor:
    """The whole tensor of these parts, placed like another, with the memory layout of the parts."""
    strides, stride = [0] * len(shape), 1
    for dimension in sorted(range(len(shape)), key=lambda d: (local.stride(d), -d)):
        strides[dimension] = stride
        stride *= max(shape[dimension], 1)
    whole: dict[str, Any] = {"shape": shape, "stride": tuple(strides), "run_check": False}
    return DTensor.from_local(local, like.device_mesh, like.placements, **whole)


# For each placement of the key: the placements of the results [B, H, ..] and of the arguments.
# Results that a problem lacks are empty.
KEYS: tuple[Placement, ...] = (Replicate(), Shard(0), Shard(1))


def _of_problem(problem: Problem, key: Placement) -> list[Placement | None]:
    return [where(name, x, key) for name, x in problem._asdict().items()]


def _of_solution(problem: Problem, key: Placement) -> list[Placement]:
    return [key if name in problem.results else Replicate() for name in Solution._fields]


@register_sharding(OPERATIONS.set_attention.default)
def _set_attention(*arguments: Any) -> list[Any]:
    problem = Problem(*arguments)
    return [(_of_solution(problem, key), _of_problem(problem, key)) for key in KEYS]


@register_sharding(OPERATIONS.set_attention_backward.default)
def _set_attention_backward(*arguments: Any) -> list[Any]:
    grad_output, grad_pooled, _, problem = Backward.read(*arguments)
    choices = []
    for key in KEYS:
        given = [None if x is None else key for x in (grad_output, grad_pooled)]
        given += [*_of_solution(problem, key), *_of_problem(problem, key)]
        there = (getattr(problem, name) is not None for name in Gradients._fields)
        choices.append(([key if x else Replicate() for x in there], given))
    return choices
