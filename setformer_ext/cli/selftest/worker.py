"""A process that does tasks for this one, and what runs in it."""

import faulthandler
import json
import os
import queue
import signal
import sys
import threading
import time
from typing import Any

import torch

from ... import set_attention
from .outcome import execute
from .problems import output_gradient, random_problem, run
from .processes import Process
from .tasks import all_tasks

SECONDS_TO_IMPORT = 120  # Python and torch, from a slow disk
SECONDS_TO_GET_DEVICE = 15  # the context of a GPU, which a killed process may still block
USUAL_SECONDS_TO_IMPORT = 10  # deadlines are for a machine that needs no more,
MOST_SLOWNESS = 2  # and at most twice as long elsewhere: the first import may have met a cold disk

MARK = "setformer_ext selftest: "  # before each answer, for others may write to stdout too


class Worker(Process):
    """Answers a line of JSON with another; touches no device before `take_device`."""

    def __init__(self, device: torch.device, quick: bool) -> None:
        super().__init__([sys.executable, "-c", code(device, quick)])
        self._started = time.monotonic()
        self._hung_for: float | None = None
        self.slowness = 1.0  # how many times as long as usual its start took

    def take_device(self, blocking: bool, most: float) -> bool:
        """Whether the process has come up and can use the device, within `most` seconds.

        blocking: every launch waits for its kernel, so that an error names the kernel.
        """
        end = time.monotonic() + most
        if self._answer(min(SECONDS_TO_IMPORT, most)) is None:
            return False
        seconds = time.monotonic() - self._started
        self.slowness = min(max(1.0, seconds / USUAL_SECONDS_TO_IMPORT), MOST_SLOWNESS)
        most = min(SECONDS_TO_GET_DEVICE, end - time.monotonic())
        return self.ask({"blocking": blocking}, most) is not None

    def ask(self, request: dict[str, Any], seconds: float) -> Any:
        """The answer; None if the process was lost over it."""
        self.send(json.dumps(request))
        return self._answer(seconds)

    def _answer(self, seconds: float) -> Any:
        end = time.monotonic() + seconds
        while line := self.line(end - time.monotonic()):
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        self._hung_for = seconds if line is None else None
        return None

    def how_it_was_lost(self) -> str:
        """Its status, or that it hung and where, and the end of what it wrote to stderr."""
        if self._hung_for is not None:
            how, wrote = f"hung: no result within {self._hung_for:.0f} s", self.stack()
        else:
            how, wrote = f"the process ended with status {self.status()}", self.stderr()
        return f"{how}; it wrote:\n{wrote}" if wrote else how


def code(device: torch.device, quick: bool) -> str:
    """What the process runs: `work` below."""
    # with this process's path: a source folder that one happens to be in is not this package
    return (
        f"import sys; sys.path = {sys.path!r}; "
        f"from {__name__} import work; work({str(device)!r}, {quick!r})"
    )


def work(name: str, quick: bool) -> None:
    """Answer requests until there are no more."""
    faulthandler.register(signal.SIGUSR1)
    requests: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()
    device = torch.device(name)
    tasks = all_tasks(device, quick)
    _import_what_torch_puts_off()
    _tell("ready")
    if requests.get()["blocking"]:
        os.environ["CUDA_LAUNCH_BLOCKING"] = "1"  # CUDA reads it when it starts
    torch.ones(2, device=device).sum().item()
    _tell("on the device")
    while True:
        request = requests.get()
        _tell(execute(tasks[request["task"]], device, request["backward"]).to_json())


def _import_what_torch_puts_off() -> None:
    """Seconds that the first backward takes else, at the expense of its deadline."""
    arguments = random_problem(dtype=torch.float32, device="meta")  # without memory or kernels
    run(set_attention, arguments, output_gradient(set_attention, arguments, 0))


def _read_requests(requests: "queue.Queue[dict[str, Any]]") -> None:
    """Ends this process with the other, even while a kernel hangs."""
    for line in sys.stdin:
        requests.put(json.loads(line))
    os._exit(0)


def _tell(answer: Any) -> None:
    print(MARK + json.dumps(answer), flush=True)
