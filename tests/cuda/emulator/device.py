"""What tests ask of a library built for the emulator, and the launches it has seen."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Order = Literal["forward", "reverse", "random"]
Mode = Literal["plain", "address", "race", "trace", "count"]
Arithmetic = Literal["exact", "perturbed"]


@dataclass(frozen=True)
class Launch:
    kernel: str  # the mangled name
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int  # dynamic
    device: int
    stream: int
    status: int  # cudaError_t


@dataclass(frozen=True)
class Limit:
    """What cudaFuncSetAttribute has allowed a kernel on a device, static shared memory included."""

    kernel: str  # the mangled name
    device: int
    bytes: int


@dataclass(frozen=True)
class AccessCount:
    """What an instruction's accesses have cost: in shared memory passes over the banks, in global
    memory 32-byte sectors."""

    kernel: str
    file: str
    line: int
    instruction: str
    space: str  # shared or global
    access: str  # read or write
    requests: int  # of warps
    bytes: int
    cost: int
    least: int  # the cost of the best arrangement of as many bytes


class _Launch(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_char_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint64),
        ("stream", ctypes.c_void_p),
        ("device", ctypes.c_int),
        ("status", ctypes.c_int),
    ]


class _Limit(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_char_p),
        ("device", ctypes.c_int),
        ("bytes", ctypes.c_uint64),
    ]


def three(size: int | Sequence[int]) -> ctypes.Array[ctypes.c_uint32]:
    sizes = (size,) if isinstance(size, int) else tuple(size)
    return (ctypes.c_uint32 * 3)(*sizes, *[1] * (3 - len(sizes)))


class Emulator:
    """The emulated devices inside of one library: `Emulator(module.__file__)`."""

    def __init__(self, path: str | Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.emulator_last_message.restype = ctypes.c_char_p
        self.library.emulator_error_count.restype = ctypes.c_long
        self.library.emulator_configure.argtypes = [
            ctypes.c_char_p,
            ctypes.c_uint64,
            ctypes.c_char_p,
            ctypes.c_char_p,
        ]
        self.library.emulator_configure.restype = ctypes.c_bool

    def configure(
        self,
        order: Order = "forward",
        seed: int = 1,
        mode: Mode = "plain",
        arithmetic: Arithmetic | None = None,
    ) -> None:
        """In which order threads and blocks run, what is checked, and whether ex2, lg2, rcp and
        their like are exact or err by as much as the PTX manual allows, in directions that the
        seed chooses; by default as EMULATOR_ARITHMETIC has it."""
        arithmetic = arithmetic or os.environ.get("EMULATOR_ARITHMETIC") or "exact"
        words = [word.encode() for word in (order, mode, arithmetic)]
        if not self.library.emulator_configure(words[0], seed, *words[1:]):
            raise ValueError(f"unknown order {order!r}, mode {mode!r} or arithmetic {arithmetic!r}")

    @contextlib.contextmanager
    def configured(
        self,
        order: Order = "forward",
        seed: int = 1,
        mode: Mode = "plain",
        arithmetic: Arithmetic | None = None,
    ) -> Iterator[None]:
        """configure() for a while."""
        self.configure(order, seed, mode, arithmetic)
        try:
            yield
        finally:
            self.configure()

    @property
    def errors(self) -> int:
        return int(self.library.emulator_error_count())

    @property
    def last_message(self) -> str:
        return str(self.library.emulator_last_message().decode())

    def clear_errors(self) -> None:
        self.library.emulator_clear_errors()

    def launches(self) -> list[Launch]:
        """Those since the last clear_launches()."""
        found = []
        for i in range(self.library.emulator_launch_count()):
            raw = _Launch()
            self.library.emulator_launch(i, ctypes.byref(raw))
            found.append(
                Launch(
                    raw.kernel.decode(),
                    (raw.grid[0], raw.grid[1], raw.grid[2]),
                    (raw.block[0], raw.block[1], raw.block[2]),
                    raw.shared,
                    raw.device,
                    raw.stream or 0,
                    raw.status,
                )
            )
        return found

    def clear_launches(self) -> None:
        self.library.emulator_clear_launches()

    def limits(self) -> list[Limit]:
        """All that cudaFuncSetAttribute has set, in order."""
        found = []
        for i in range(self.library.emulator_limit_count()):
            raw = _Limit()
            self.library.emulator_limit(i, ctypes.byref(raw))
            found.append(Limit(raw.kernel.decode(), raw.device, raw.bytes))
        return found

    @contextlib.contextmanager
    def after_limit(self, function: Callable[[], None]) -> Iterator[None]:
        """For a while calls function() whenever cudaFuncSetAttribute has set a limit."""
        called = ctypes.CFUNCTYPE(None)(function)
        self.library.emulator_after_limit(called)
        try:
            yield
        finally:
            self.library.emulator_after_limit(None)

    def trace(self) -> list[AccessCount]:
        """Counts of mode trace since the last clear_trace()."""
        self.library.emulator_trace.restype = ctypes.c_char_p
        counts = []
        for row in self.library.emulator_trace().decode().splitlines():
            kernel, file, line, instruction, space, access, *numbers = row.split("\t")
            counts.append(
                AccessCount(kernel, file, int(line), instruction, space, access, *map(int, numbers))
            )
        return counts

    def clear_trace(self) -> None:
        self.library.emulator_clear_trace()

    def executed(self) -> dict[str, dict[int, int]]:
        """Of mode count since the last clear_executed(): how often warps have executed each of the
        stretches() of a kernel, by its mangled name."""
        self.library.emulator_counts.restype = ctypes.c_char_p
        found: dict[str, dict[int, int]] = {}
        for row in self.library.emulator_counts().decode().splitlines():
            kernel, stretch, times = row.split("\t")
            found.setdefault(kernel, {})[int(stretch)] = int(times)
        return found

    def clear_executed(self) -> None:
        self.library.emulator_clear_counts()

    def set_device(self, device: int) -> None:
        """cudaSetDevice for the calling thread."""
        if self.library.emulator_set_device(device):
            raise ValueError(f"there is no device {device}")

    def get_device(self) -> int:
        return int(self.library.emulator_get_device())

    def set_capability(self, capability: int) -> None:
        """What the devices are, as 86 for 8.6, whatever the kernels were compiled for."""
        self.library.emulator_set_capability.restype = ctypes.c_bool
        if not self.library.emulator_set_capability(capability):
            raise ValueError(f"no facts are known about compute capability {capability}")

    @contextlib.contextmanager
    def of_capability(self, capability: int) -> Iterator[None]:
        """set_capability() for a while; before and after devices are of 8.0."""
        self.set_capability(capability)
        try:
            yield
        finally:
            self.set_capability(80)

    def set_most_ranks(self, ranks: int) -> None:
        """The largest cluster that the devices can hold at once, as a part of a device may."""
        self.library.emulator_set_most_ranks(ctypes.c_uint(ranks))

    def run(
        self,
        kernel: str,
        *arguments: ctypes._SimpleCData,
        grid: int | Sequence[int] = 1,
        block: int | Sequence[int] = 32,
        shared_bytes: int = 0,
    ) -> int:
        """Launches a kernel by its name in the PTX. Returns: the cudaError_t."""
        places = (ctypes.c_void_p * max(len(arguments), 1))(
            *(ctypes.cast(ctypes.byref(argument), ctypes.c_void_p) for argument in arguments)
        )
        status = self.library.emulator_run(
            kernel.encode(), three(grid), three(block), ctypes.c_uint32(shared_bytes), places
        )
        if status < 0:
            raise ValueError(f"there is no kernel {kernel}")
        return int(status)
