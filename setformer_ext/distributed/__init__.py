"""SeT attention over sequences that several processes hold together (sequence parallelism).

A rank sends none of its tokens. It sends M sums per head for each Sinkhorn step, M Dv more where
values are collected, and as much in backward.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from typing_extensions import Unpack

from .. import arguments
from ..autograd import refuse_tangents, wants_gradient
from ..foreign import answers_foreign_names
from ..functional import Options, make_problem, with_defaults
from . import (
    dtensors,
    operations,  # noqa: F401  (registers torch.ops.setformer_ext.distributed_set_attention)
)
from .ranks import FUNCTION, Ranks

__all__ = ["set_attention"]


@answers_foreign_names
def set_attention(
    query: Tensor | None,
    key: Tensor,
    value: Tensor,
    reference: Tensor,
    *,
    group: ProcessGroup | DeviceMesh | None = None,
    check: bool = True,
    query_mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """:func:`setformer_ext.set_attention` of sequences whose tokens are spread over a group.

    Every rank of the group calls it with its own tokens and gets the outputs of its own queries:
    together they are those of one call with the tokens of all ranks side by side, to rounding, and
    bitwise the same from run to run. Ranks may have different numbers of tokens, also none.

    The gradient is exact, for the sum of the losses of all ranks. Each rank gets the whole gradient
    of its own tokens. Of arguments that are the same on all ranks (reference, reference_mass,
    bandwidth, epsilon) it gets a share; the shares of all ranks add up to the gradient. The same
    holds for every other weight of a model that each rank applies to its own tokens, so whatever
    sums or averages their gradients (DDP, FSDP, an all-reduce) also works here.

    Each rank sends ``2 (R - 1) / R`` times the numbers it shares, of four bytes (eight for
    float64): for self attention with S = max(T, 1) ``B H (S M + M Dv + 3)`` forward and
    ``B H ((S - 1) M + M (Dv + 1) + 3)`` backward. Cross attention shares ``B H S M`` and
    ``B H (S - 1) M`` more. The CPU shares ``B H M`` more both ways in the log domain, that is for
    the linear kernel and below epsilon = 1/32 (float64: 1/256), and rounds Dv up to a vector, 2 to
    16 numbers. CUDA shares ``B H M`` more forward and no 3.

    Args:
        query, key, value, query_mask, query_positions: this rank's, as in
            ``setformer_ext.set_attention``.
        reference: the same on all ranks.
        options: those of ``setformer_ext.set_attention``: mask, token_mass and token_positions of
            this rank's tokens, the others the same on all ranks. The masses of all ranks' tokens
            add up in float32 (float64 for float64).
        group: a process group, a one-dimensional device mesh, or None for all processes, with a
            backend for the tensors' device (gloo for the CPU, nccl for CUDA).
        check: compare on all ranks the arguments that must be the same, ``check`` included, and in
            backward whether all ranks are at the same call. This sends 160 bytes (16 in backward)
            to every other rank, reads all references and, on CUDA, waits for the device. Without it
            ranks that disagree may wait for each other until the group's timeout, or give wrong
            results.

    Tensors may be DTensors, then all of them: key, value, query and token_mass sharded on the
    tokens (dimension 2), masks and positions likewise, the rest replicated over that dimension of
    the mesh, which is the group; other dimensions of the mesh may shard the batch or the heads.

    Returns:
        [B, H, Nq, Dv] of this rank's queries, of the key's type; a DTensor for DTensors.

    Backward too must run on every rank of the group: a loss that leaves out a rank's output must
    still depend on it, if only by ``0 * output.sum()``. (The compiler of torch 2.9 also leaves out
    a forward call whose output a rank does not use.) All ranks must make their calls in the same
    order. Inductor may exchange two calls if neither needs the other's result: that raises (with
    ``check``), and ``torch._inductor.config.reorder_for_peak_memory = False`` prevents it. Second
    derivatives and transforms of torch.func are not supported.

    Raises:
        ValueError, TypeError: as ``setformer_ext.set_attention``, and on all ranks where they do
            not agree.
        RuntimeError: another rank refused its arguments, or is gone; if it is gone, the group
            cannot be used any more. While torch.compile traces, a rank that refuses its arguments
            cannot tell the others: they wait for it until its process ends or the group's timeout.
        NotImplementedError: within a transform of torch.func, or by a second derivative.
    """
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            f"{FUNCTION}: the transforms of torch.func do not reach over the ranks of a group; use "
            "torch.autograd"
        )
    given = {
        "query": None if query is key else query,
        "key": key,
        "value": value,
        "reference": reference,
        "query_mask": query_mask,
        "query_positions": query_positions,
    } | with_defaults(FUNCTION, options)
    if isinstance(key, DTensor):
        return dtensors.call(_set_attention, given, group, check=check)
    return _set_attention(given, _process_group(group), check=check)


def _set_attention(given: Mapping[str, Any], group: ProcessGroup, *, check: bool) -> Tensor:
    """Of plain tensors."""
    key = given["key"]
    try:
        for name, x in given.items():
            if isinstance(x, DTensor):
                raise TypeError(
                    f"{FUNCTION}: {name} must be a plain tensor as the key is, got a DTensor"
                )
        arguments.check(FUNCTION, given)
        problem = make_problem(given)
    except Exception:
        if check:
            Ranks(group).refuse(key)
        raise
    problem = problem.in_storage_type(arguments.storage_type(key))
    refuse_tangents(problem)
    output: Tensor = torch.ops.setformer_ext.distributed_set_attention(
        *problem, group.group_name, check, wants_gradient(problem)
    )[0]
    return output


def _process_group(group: ProcessGroup | DeviceMesh | None) -> ProcessGroup:
    if not dist.is_initialized():
        raise RuntimeError(
            f"{FUNCTION}: there is no process group yet: call "
            "torch.distributed.init_process_group first"
        )
    if group is None:
        group = dist.group.WORLD
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"{FUNCTION}: group must be a mesh of one dimension, got {group.ndim}: take the "
                "one that shares sequences, mesh['name']"
            )
        return group.get_group()
    if not isinstance(group, ProcessGroup):
        raise TypeError(
            f"{FUNCTION}: group must be a process group that this process is in, a DeviceMesh or "
            f"None, got {type(group).__name__}"
        )
    return group
