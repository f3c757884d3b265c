"""What the ranks of a process group that together hold each sequence send to each other.

R ranks merge all numbers in the same way: each rank receives one R-th of every rank's numbers,
merges that part in the order of the ranks, and sends the result to all. So a rank sends 2 (R - 1) /
R times the numbers, as few as any all-reduce. The order of the sums depends only on R, so results
are bitwise the same from run to run and on all ranks. And every rank waits for every other, so all
notice a rank that is gone.
"""

import struct
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.dlpack import from_dlpack

from ..problem import KERNELS, STORAGE_TYPES, TENSORS, Problem, Solution

FUNCTION = "distributed.set_attention"
# Tensors without rows of tokens: they must be the same on all ranks.
REPLICAS = tuple(
    name for name, about in TENSORS.items() if not {"N", "Nq", "S+1"} & set(about.letters)
)
GIVEN = ("query", "reference_positions", "reference_mass")
Show = Callable[[int], object]


# What must be the same on all ranks: its name, and a function that turns its integer into words.
ARGUMENTS: Sequence[tuple[str, Show]] = (
    ("batch B", int),
    ("heads H", int),
    ("depth D of the key", int),
    ("references M", int),
    ("depth Dv of the value", int),
    ("the type of the key", lambda index: str(STORAGE_TYPES[index]).removeprefix("torch.")),
    ("iterations", int),
    ("kernel", lambda index: repr(KERNELS[index])),
    ("position_bandwidth", lambda bits: struct.unpack("d", struct.pack("q", bits))[0]),
    ("normalize", bool),
    ("whether a gradient is wanted", bool),
    *((f"whether {name} is given", bool) for name in GIVEN),
    *((name, lambda sum_: f"values with the checksum {sum_ % 2**64:x}") for name in REPLICAS),
)
CALL: Sequence[tuple[str, Show]] = (
    ("the call that backward is of", lambda sum_: f"one with the checksum {sum_ % 2**64:x}"),
)


class Ranks:
    """A process group, seen from one of its ranks."""

    bytes_sent: ClassVar[int] = 0  # to other ranks, by this process so far

    def __init__(self, group: ProcessGroup):
        self.group = group
        self.count = group.size()

    def exchange(self, numbers: Tensor) -> Tensor:  # [R, n] -> [R, n]
        """Send row r to rank r; row r of the result is the row that rank r has sent to this one."""
        received = torch.empty_like(numbers)
        dist.all_to_all_single(received, numbers, group=self.group)
        Ranks.bytes_sent += numbers.nbytes - numbers.nbytes // self.count
        return received

    def gather(self, numbers: Tensor) -> Tensor:  # [n] -> [R, n]
        """The numbers of every rank."""
        return self.exchange(numbers.expand(self.count, -1).contiguous())

    def merge(self, arrays: list[Any], how: str) -> None:
        """Called by the compiled module: replace the arrays' numbers by the merged ones of all
        ranks."""
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
        """Raise an error on every rank if the ranks' problems do not fit together."""
        batch, heads, _, depth = problem.key.shape
        numbers = (
            *(batch, heads, depth, problem.reference.shape[-2], problem.value.shape[-1]),
            STORAGE_TYPES.index(problem.key.dtype),
            problem.iterations,
            KERNELS.index(problem.kernel),
            struct.unpack("q", struct.pack("d", problem.position_bandwidth))[0],
            problem.normalize,
            differentiated,
            *(getattr(problem, name) is not None for name in GIVEN),
        )
        self._compare(ARGUMENTS, numbers, [getattr(problem, name) for name in REPLICAS])

    def agree_on_call(self, solution: Solution) -> None:
        """Raise an error on every rank if the ranks are in the backward of different calls, whose
        order a compiler may have changed. A call is known by its columns, which are merged and so
        the same on all ranks."""
        self._compare(CALL, (), [solution.columns])

    def refuse(self, key: object) -> None:
        """This rank's part of `agree` if it cannot go on: all others raise an error."""
        if torch.compiler.is_compiling():
            return  # a graph is only traced: nothing can be sent
        device = self._device(key.device if isinstance(key, Tensor) else None)
        self.gather(torch.ones(1 + len(ARGUMENTS), dtype=torch.int64, device=device))

    def _compare(
        self,
        compared: Sequence[tuple[str, Show]],
        numbers: Sequence[int],
        replicas: list[Tensor | None],
    ) -> None:
        device = self._device(next(x.device for x in replicas if x is not None))
        sums = [torch.zeros((), dtype=torch.int64) if x is None else checksum(x) for x in replicas]
        own = [torch.tensor([0, *numbers]).to(device), *(x.view(1).to(device) for x in sums)]
        rows = self.gather(torch.cat(own)).tolist()
        for rank, row in enumerate(rows):
            if row[0] != 0:
                raise RuntimeError(
                    f"{FUNCTION}: rank {rank} of the group refused its arguments or cannot go on; "
                    "its own error says why"
                )
        for index, (name, show) in enumerate(compared, start=1):
            for rank, row in enumerate(rows):
                if row[index] != rows[0][index]:
                    raise ValueError(
                        f"{FUNCTION}: {name} must be the same on all ranks of the group, got "
                        f"{show(rows[0][index])} on rank 0 and {show(row[index])} on rank {rank}"
                    )

    def _device(self, key: torch.device | None) -> torch.device:
        """The device to compare on: the CPU, if the group supports it, to save the GPU the work."""
        supported = [device.type for device in self.group._device_types]
        if "cpu" in supported or key is None or key.type not in supported:
            return torch.device("cpu" if "cpu" in supported else supported[0])
        return key


def log2_sum(x: Tensor) -> Tensor:  # [R, n] -> [n]
    """log2 sum_r 2^x_r; -inf where all x_r are -inf."""
    top = x.amax(0)
    base = torch.where(top == -torch.inf, 0, top)
    return (x - base).exp2().sum(0).log2() + base


def checksum(x: Tensor) -> Tensor:  # [...] -> [] int64
    """A checksum of bits and their order. A change of any one element changes it."""
    words = {8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()]
    bits = x.detach().contiguous().view(words).flatten().to(torch.int64)
    return (bits * torch.arange(1, 2 * bits.numel(), 2, device=x.device)).sum()
