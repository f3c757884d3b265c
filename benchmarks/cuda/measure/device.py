"""The card, or the emulated device in its place: where tensors live and how calls are timed."""

import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from sass import short_names, shorten
from torch.profiler import ProfilerActivity, profile

from emulator.build import load
from emulator.device import Emulator
from setformer_ext import ops
from setformer_ext.timing import find_device, milliseconds

from . import PACKAGE

CALLS = 20  # that a graph holds at most
GRAPH_US = 1000.0  # work of a graph that makes its launch small
REPLAYS = 15
NAMESPACE = "setformer::"  # of the kernels' names
HOST_CALLS = 8  # that no queue is full of


class Device(Protocol):
    """What the steps need of it."""

    emulated: bool
    torch: torch.device

    def microseconds(self, call: Callable[[], object]) -> list[float]:
        """Of single calls on the device, several times."""

    def kernels(self, call: Callable[[], object]) -> dict[str, tuple[int, float]]:
        """This package's kernels in one call: launches, and the microseconds of all of them."""

    def usable(self) -> bool:
        """Whether it still works: after some errors every call fails until the process ends."""


class Card:
    """The current GPU."""

    emulated = False

    def __init__(self) -> None:
        self.torch = find_device("cuda")

    def microseconds(self, call: Callable[[], object]) -> list[float]:
        """By replays of a CUDA graph of several calls, between two events."""
        stream = torch.cuda.Stream(self.torch)
        with torch.cuda.stream(stream):  # what is captured has run before
            for _ in range(2):
                call()
        stream.synchronize()
        once = 1e3 * min(milliseconds(call, self.torch, 3))
        calls = max(1, min(CALLS, round(GRAPH_US / once)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
        milliseconds(graph.replay, self.torch, 2)
        return [1e3 * ms / calls for ms in milliseconds(graph.replay, self.torch, REPLAYS)]

    def kernels(self, call: Callable[[], object]) -> dict[str, tuple[int, float]]:
        call()
        torch.cuda.synchronize(self.torch)
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            call()
            torch.cuda.synchronize(self.torch)
        return {
            shorten(event.key): (event.count, event.self_device_time_total)
            for event in profiler.key_averages()
            if NAMESPACE in event.key
        }

    def usable(self) -> bool:
        try:
            return torch.ones(2, device=self.torch).sum().item() == 2
        except RuntimeError:
            return False


class Emulated:
    """The kernels of the emulated device on CPU tensors. Its times mean nothing."""

    emulated = True

    def __init__(self) -> None:
        self.module = load(Path(PACKAGE).resolve())  # its name says what it is
        ops._C = self.module
        self.torch = torch.device("cpu")

    def microseconds(self, call: Callable[[], object]) -> list[float]:
        """By the clock."""
        return [1e3 * ms for ms in milliseconds(call, self.torch, 1)]

    def kernels(self, call: Callable[[], object]) -> dict[str, tuple[int, float]]:
        emulator = Emulator(self.module.__file__)
        emulator.clear_launches()
        call()
        symbols = Counter(launch.kernel for launch in emulator.launches())
        names = short_names(set(symbols))
        return {names[symbol]: (count, 0.0) for symbol, count in symbols.items()}

    def usable(self) -> bool:
        return True


def find(name: str) -> Device:
    """By the name that options have: cuda or emulated."""
    return Emulated() if name == "emulated" else Card()


def host_microseconds(device: Device, call: Callable[[], object]) -> float:
    """Of a call until it returns, which does not wait for the device."""
    call()
    times = []
    for _ in range(3 if not device.emulated else 1):
        if not device.emulated:
            torch.cuda.synchronize(device.torch)
        for _ in range(HOST_CALLS if not device.emulated else 1):
            start = time.perf_counter()
            call()
            times.append(1e6 * (time.perf_counter() - start))
    if not device.emulated:
        torch.cuda.synchronize(device.torch)
    return statistics.median(times)
