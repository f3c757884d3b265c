"""DTensors in, a DTensor out: the local shards go through the function for plain tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from ..ops import RANKS
from .ranks import FUNCTION

# The dimension of each tensor that runs over the tokens, from the left.
TOKENS = {
    "query": 2,
    "key": 2,
    "value": 2,
    "token_mass": 2,
    "mask": 1,
    "query_mask": 1,
    "token_positions": 0,
    "query_positions": 0,
}


def are_given(tensors: dict[str, Any]) -> bool:
    """Whether the tensors are DTensors; an error where some are and some are not."""
    kinds = {name: isinstance(x, DTensor) for name, x in tensors.items() if isinstance(x, Tensor)}
    if not any(kinds.values()):
        return False
    for name, is_dtensor in kinds.items():
        if not is_dtensor:
            raise TypeError(
                f"{FUNCTION}: {name} must be a DTensor where others are, got a plain tensor: "
                "DTensor.from_local says how it lies on the mesh"
            )
    return True


def call(
    function: Callable[..., Tensor],
    tensors: dict[str, Any],
    group: ProcessGroup | DeviceMesh | None,
    **options: Any,
) -> Tensor:
    """``function`` of the local shards, on the group that the key's tokens are sharded over."""
    if group is not None:
        raise ValueError(
            f"{FUNCTION}: group must be None for DTensors, whose mesh tells it, got "
            f"{type(group).__name__}"
        )
    key: DTensor = tensors["key"]
    mesh = key.device_mesh
    over_tokens = [axis for axis, placement in enumerate(key.placements) if placement == Shard(2)]
    if len(over_tokens) != 1 or Shard(3) in key.placements:
        raise ValueError(
            f"{FUNCTION}: key must be sharded on its tokens (dimension 2) over one dimension of "
            f"the mesh, and on batch or heads over others, got {list(key.placements)}: "
            "redistribute it"
        )
    local = {
        name: _local(name, x, key, over_tokens[0]) if isinstance(x, DTensor) else x
        for name, x in tensors.items()
    }
    output = function(**local, group=mesh.get_group(over_tokens[0]), **options)
    receivers = key if tensors["query"] is None else tensors["query"]
    shape = receivers.shape[:3] + tensors["value"].shape[3:]
    return DTensor.from_local(
        output,
        mesh,
        key.placements,
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )


def _local(name: str, x: DTensor, key: DTensor, over_tokens: int) -> Tensor:
    """This rank's part; the gradient of what several ranks have alike is a part of a sum."""
    gradients: list[Placement] = []
    for axis, (own, of_key) in enumerate(zip(x.placements, key.placements, strict=True)):
        expected = _expected(name, x.dim(), of_key, axis == over_tokens)
        if own != expected:
            raise ValueError(
                f"{FUNCTION}: {name} must be {expected} over dimension {axis} of the mesh, where "
                f"the key is {of_key}, got {own}: redistribute it"
            )
        shared = isinstance(own, Replicate) and isinstance(of_key, Shard)
        gradients.append(Partial() if shared else own)
    local: Tensor = x.to_local(grad_placements=gradients)
    return local


def _expected(name: str, rank: int, of_key: Placement, over_tokens: bool) -> Placement:
    """Where a tensor of this rank must lie for a key that lies so."""
    if not isinstance(of_key, Shard):
        return of_key
    if over_tokens:
        return Shard(TOKENS[name]) if name in TOKENS else Replicate()
    per_sample = rank == RANKS.get(name)
    if of_key.dim == 0:
        return Shard(0) if per_sample else Replicate()
    of_all_heads = name in ("mask", "query_mask") or name.endswith("positions") or rank == 0
    return Replicate() if of_all_heads else Shard(1 if per_sample else 0)
