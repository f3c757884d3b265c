"""DTensors in, a DTensor out: the local shards go through the function for plain tensors."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from ..problem import OF_KEYS, OF_QUERIES
from .ranks import FUNCTION, Ranks
from .sharding import join, where

TOKENS = OF_KEYS | OF_QUERIES


def call(
    function: Callable[..., Tensor],
    given: dict[str, Any],
    group: ProcessGroup | DeviceMesh | None,
    **options: Any,
) -> Tensor:
    """function(local shards, group), in the group that the key's tokens are sharded over."""
    key: DTensor = given["key"]
    over_tokens = [axis for axis, placement in enumerate(key.placements) if placement == Shard(2)]
    others = [placement for placement in key.placements if placement != Shard(2)]
    if len(over_tokens) != 1 or any(x not in (Replicate(), Shard(0), Shard(1)) for x in others):
        raise ValueError(
            f"{FUNCTION}: key must be sharded on its tokens (dimension 2) over one dimension of "
            f"the mesh, and on batch or heads over others, got {list(key.placements)}: "
            "redistribute it"
        )
    own_group = key.device_mesh.get_group(over_tokens[0])
    try:
        if group is not None:
            raise ValueError(
                f"{FUNCTION}: group must be None for DTensors, whose mesh tells it, got "
                f"{type(group).__name__}"
            )
        local = {name: _local(name, x, key, over_tokens[0]) for name, x in given.items()}
    except Exception:
        if options["check"]:
            Ranks(own_group).refuse(key.to_local())
        raise
    output = function(local, own_group, **options)
    receivers = key if given["query"] is None else given["query"]
    return join(output, key, receivers.shape[:3] + given["value"].shape[3:])


def _local(name: str, x: Any, key: DTensor, over_tokens: int) -> Any:
    """This rank's part; its gradient is one term of a sum if several ranks have the same part."""
    if not isinstance(x, Tensor):
        return x
    if not isinstance(x, DTensor):
        raise TypeError(
            f"{FUNCTION}: {name} must be a DTensor as the key is, got a plain tensor: "
            "DTensor.from_local says how it lies on the mesh"
        )
    if x.device_mesh != key.device_mesh:
        raise ValueError(
            f"{FUNCTION}: {name} must be on the key's mesh, {key.device_mesh}, got {x.device_mesh}"
        )
    gradients: list[Placement] = []
    expected: Placement | None
    for axis, (own, of_key) in enumerate(zip(x.placements, key.placements, strict=True)):
        if axis == over_tokens:
            expected = Shard(TOKENS[name]) if name in TOKENS else Replicate()
        else:
            expected = where(name, x, of_key)
        if own != expected:
            raise ValueError(
                f"{FUNCTION}: {name} must be {expected} over dimension {axis} of the mesh, where "
                f"the key is {of_key}, got {own}: redistribute it"
            )
        shared = isinstance(own, Replicate) and isinstance(of_key, Shard)
        gradients.append(Partial() if shared else own)
    return x.to_local(grad_placements=gradients)
