"""The ranks of a process group that hold each sequence together: what they send each other.

Whatever R ranks merge goes the same way: each rank receives one R-th of every rank's numbers,
merges that in the order of the ranks, and sends the result to all. A rank so sends 2 (R - 1) / R
times the numbers, as few as any all-reduce; the order of the sums depends on nothing but R, so that
results are bitwise the same from run to run and on all ranks; and every rank waits for every other,
so that a rank that is gone is missed by all.
"""

import hashlib
import struct
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.dlpack import from_dlpack

from ..ops import Problem

FUNCTION = "distributed.set_attention"

# What all ranks must have alike, as `agree` compares it: numbers by value, tensors by their bytes.
SIZES = ("batch B", "heads H", "depth D of the key", "references M", "depth Dv of the value")
OPTIONS = ("dtype", "iterations", "kernel", "position_bandwidth", "requires_grad of the inputs")
GIVEN = ("query", "reference_positions", "reference_mass")
REPLICAS = ("reference", "bandwidth", "epsilon", "reference_mass", "reference_positions")
COMPARED = (
    "whether the arguments are refused",
    *SIZES,
    *OPTIONS,
    *(f"whether {name} is given" for name in GIVEN),
    *REPLICAS,
)


class Ranks:
    """A process group, seen from one of its ranks."""

    def __init__(self, group: ProcessGroup):
        self.group = group
        self.count = group.size()
        # Where ranks compare their arguments: one whose key is of no use must find it too.
        devices = [device.type for device in group._device_types]
        self.device = "cpu" if "cpu" in devices else devices[0]

    def exchange(self, numbers: Tensor) -> Tensor:  # [R, n] -> [R, n]
        """Row r goes to rank r; what comes back in its place is what that rank had for this one."""
        received = torch.empty_like(numbers)
        dist.all_to_all_single(received, numbers, group=self.group)
        return received

    def gather(self, numbers: Tensor) -> Tensor:  # [n] -> [R, n]
        """The numbers of every rank."""
        return self.exchange(numbers.expand(self.count, -1).contiguous())

    def merge(self, arrays: list[Any], how: str) -> None:
        """What the compiled module calls: the arrays take the numbers of all ranks, merged."""
        if self.count == 1:
            return
        own = [from_dlpack(array) for array in arrays]
        numbers = torch.cat([array.flatten() for array in own])
        each = -(-numbers.numel() // self.count)
        padded = numbers.new_zeros(self.count * each)
        padded[: numbers.numel()] = numbers
        parts = self.exchange(padded.view(self.count, each))
        merged = parts.sum(0) if how == "sum" else log2_sum(parts)
        everything = self.gather(merged).flatten()[: numbers.numel()]
        sizes = [array.numel() for array in own]
        for array, part in zip(own, everything.split(sizes), strict=True):
            array.copy_(part.view_as(array))

    def agree(self, problem: Problem, differentiated: bool) -> None:
        """Raises, on every rank, where the ranks' problems do not fit together."""
        self._compare(_description(problem, differentiated))

    def refuse(self) -> None:
        """This rank's part of `agree` where its arguments were refused: all others raise too."""
        self._compare([1] + [0] * (len(COMPARED) - 1))

    def _compare(self, own: list[int]) -> None:
        rows = self.gather(torch.tensor(own, device=self.device)).tolist()
        if own[0] != 0:
            return  # whoever refuses has an error of its own to raise
        refused = [rank for rank, row in enumerate(rows) if row[0] != 0]
        if refused:
            raise RuntimeError(
                f"{FUNCTION}: rank {refused[0]} of the group refused its arguments; its own error "
                "says why"
            )
        for index, name in enumerate(COMPARED):
            for rank, row in enumerate(rows):
                if row[index] != rows[0][index]:
                    raise ValueError(
                        f"{FUNCTION}: {name} must be the same on all ranks of the group, got "
                        f"{_value(name, rows[0][index])} on rank 0 and {_value(name, row[index])} "
                        f"on rank {rank}"
                    )


def log2_sum(x: Tensor) -> Tensor:  # [R, n] -> [n]
    """log2 sum_r 2^x_r; -inf where all are."""
    top = x.amax(0)
    base = torch.where(top == -torch.inf, 0, top)
    return (x - base).exp2().sum(0).log2() + base


def _description(problem: Problem, differentiated: bool) -> list[int]:
    """The rank's values of COMPARED."""
    batch, heads, _, depth = problem.key.shape
    sizes = (batch, heads, depth, problem.reference.shape[-2], problem.value.shape[-1])
    options = (
        _digest(str(problem.key.dtype).encode()),
        problem.iterations,
        _digest(problem.kernel.encode()),
        _digest(struct.pack("d", problem.position_bandwidth)),
        int(differentiated),
    )
    given = (int(getattr(problem, name) is not None) for name in GIVEN)
    replicas = (_checksum(getattr(problem, name)) for name in REPLICAS)
    return [0, *sizes, *options, *given, *replicas]


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:7], "little")


def _checksum(x: Tensor | None) -> int:
    """Of a tensor's bytes and their order."""
    if x is None:
        return 0
    # A copy, for what NumPy has seen FSDP can no longer free.
    own = x.detach().clone(memory_format=torch.contiguous_format).cpu()
    return _digest(own.view(torch.uint8).numpy().tobytes())


def _value(name: str, x: int) -> str:
    if name in REPLICAS:
        return f"values with the checksum {x:x}"
    if name in ("dtype", "kernel", "position_bandwidth"):
        return f"one with the checksum {x:x}"
    return str(x)
