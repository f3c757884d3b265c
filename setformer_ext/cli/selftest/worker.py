"""A process that runs tasks for this one, and the code that runs in it."""

import contextlib
import faulthandler
import os
import queue
import signal
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
SECONDS_TO_GET_DEVICE = 15  # to get a GPU's context, which a killed process may still block
USUAL_SECONDS_TO_IMPORT = 10  # deadlines assume that importing takes at most this;
MOST_SLOWNESS = 2  # they grow with a slower import, up to twice: it may only be a cold disk


class LostError(Exception):
    """A process was lost; says its status, or where it hung, and the end of what it wrote."""


class Worker(Process):
    """Answers each request; touches no device before `take_device`."""

    def __init__(self, device: torch.device, quick: bool) -> None:
        super().__init__(code(device, quick))
        self._started = time.monotonic()
        self.slowness = 1.0  # the time of its start, in multiples of the usual

    def take_device(self, blocking: bool, most: float) -> None:
        """Wait until the process has started and can use the device.

        blocking: every launch waits for its kernel, so that an error names the kernel.

        Raises: LostError, after at most `most` seconds.
        """
        end = time.monotonic() + most
        self._answer(min(SECONDS_TO_IMPORT, most))
        seconds = time.monotonic() - self._started
        self.slowness = min(max(1.0, seconds / USUAL_SECONDS_TO_IMPORT), MOST_SLOWNESS)
        self.ask(blocking, min(SECONDS_TO_GET_DEVICE, end - time.monotonic()))

    def ask(self, request: Any, seconds: float) -> Any:
        """The answer.

        Raises: LostError.
        """
        with contextlib.suppress(OSError):  # if the process is gone, _answer reports it
            self.channel.send(request)
        return self._answer(seconds)

    def _answer(self, seconds: float) -> Any:
        try:
            return self.hear(seconds)
        except TimeoutError:
            how, wrote = f"hung: no result within {seconds:.0f} s", self.stack()
        except EOFError:
            how, wrote = f"the process ended with status {self.status()}", self.written()
        raise LostError(f"{how}; it wrote:\n{wrote}" if wrote else how)


def code(device: torch.device, quick: bool) -> str:
    """What the process runs: `work` below."""
    return f"from {__name__} import work; work(channel, {str(device)!r}, {quick!r})"


def work(channel: Any, name: str, quick: bool) -> None:
    """Answer requests through the channel until there are no more."""
    faulthandler.register(signal.SIGUSR1)
    requests: queue.Queue[Any] = queue.Queue()
    threading.Thread(target=_read_requests, args=(channel, requests), daemon=True).start()
    device = torch.device(name)
    tasks = {task.name: task for task in all_tasks(device, quick)}
    _import_what_torch_puts_off()
    channel.send("ready")
    if requests.get():
        os.environ["CUDA_LAUNCH_BLOCKING"] = "1"  # CUDA reads it when it starts
    torch.ones(2, device=device).sum().item()
    channel.send("on the device")
    while True:
        task, backward = requests.get()
        channel.send(execute(tasks[task], device, backward))


def _import_what_torch_puts_off() -> None:
    """Run once, on no device, what torch imports at the first backward: it takes seconds, which
    would count against a task's deadline."""
    arguments = random_problem(dtype=torch.float32, device="meta")  # without memory or kernels
    run(set_attention, arguments, output_gradient(set_attention, arguments))


def _read_requests(channel: Any, requests: "queue.Queue[Any]") -> None:
    """Read requests; end this process when the other one ends, even while a kernel hangs."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            requests.put(channel.recv())
    os._exit(0)
