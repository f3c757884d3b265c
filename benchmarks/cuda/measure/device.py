"""The card, or the emulated device in its place: where tensors live and how calls are timed."""

import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from sass import short_names, shorten
from torch.profiler import ProfilerActivity, profile

from emulator.build import load
from emulator.device import Emulator
from setformer_ext.cli.selftest.outcome import works
from setformer_ext.cli.timing import by_the_clock, milliseconds

from . import PACKAGE

Call = Callable[[], object]

CALLS = 20  # that a graph holds at most
GRAPH_US = 1000.0  # of work in a graph: much more than launching it takes
LEAST_REPLAYS, MOST_REPLAYS = 3, 15
REPLAYS_US = 300_000.0  # for all of them
HOST_CALLS = 8  # in a row: few enough that the queue of launches is never full
NAMESPACE = "setformer::"  # of the kernels


class Device(Protocol):
    """What the steps need of it."""

    emulated: bool
    torch: torch.device

    def microseconds(self, call: Call) -> list[float]:
        """Of single calls on the device, several times."""

    def host_microseconds(self, call: Call) -> float:
        """Median of a call until it returns, which is before its work is done."""

    def kernels(self, call: Call) -> dict[str, tuple[int, float]]:
        """This package's kernels in one call: launches, and the microseconds of all of them."""

    def usable(self) -> bool:
        """Whether it still works: after some errors every call fails until the process ends."""


class Card:
    """The current GPU."""

    emulated = False

    def __init__(self) -> None:
        self.torch = torch.device("cuda", torch.cuda.current_device())

    def microseconds(self, call: Call) -> list[float]:
        """By replays of a CUDA graph of several calls, between two events."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())  # for the inputs
        with torch.cuda.stream(stream):  # all that is set up at a first call is so before capture
            call()
            call()
        stream.synchronize()
        calls = max(1, min(CALLS, round(GRAPH_US / min(self._elapsed(call, 3)))))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
        replays = round(REPLAYS_US / min(self._elapsed(graph.replay, 2)))
        replays = max(LEAST_REPLAYS, min(MOST_REPLAYS, replays))
        return [us / calls for us in self._elapsed(graph.replay, replays)]

    def host_microseconds(self, call: Call) -> float:
        times = []
        for _ in range(3):
            torch.cuda.synchronize()
            times += by_the_clock(call, HOST_CALLS)
        torch.cuda.synchronize()
        return 1e3 * statistics.median(times)

    def kernels(self, call: Call) -> dict[str, tuple[int, float]]:
        call()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            call()
            torch.cuda.synchronize()
        return {
            shorten(event.key): (event.count, event.self_device_time_total)
            for event in profiler.key_averages()
            if NAMESPACE in event.key
        }

    def usable(self) -> bool:
        return works(self.torch)

    def _elapsed(self, call: Call, repeats: int) -> list[float]:
        return [1e3 * ms for ms in milliseconds(call, self.torch, repeats)]


class Emulated:
    """The kernels of the emulated device on CPU tensors. Its times mean nothing."""

    emulated = True

    def __init__(self) -> None:
        from setformer_ext import ops

        self.module = load(Path(PACKAGE).resolve())  # its name says what it is
        ops._C = self.module
        self.torch = torch.device("cpu")

    def microseconds(self, call: Call) -> list[float]:
        return [self.host_microseconds(call)]

    def host_microseconds(self, call: Call) -> float:
        return 1e3 * by_the_clock(call, 1)[0]

    def kernels(self, call: Call) -> dict[str, tuple[int, float]]:
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
