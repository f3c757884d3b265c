"""Other processes, none of which is waited for without a bound.

A process that is killed while it waits for a GPU may stay until the GPU lets it go: for ever.
"""

import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

SECONDS_TO_END = 5  # of a process that has closed its channel
SECONDS_TO_DIE = 1  # of one that was killed
SECONDS_TO_TELL = 2  # where it hangs: see faulthandler in worker.py
MOST_WRITTEN = 4000  # characters, the last ones


class Process:
    """Another Python, which tells and is told through a channel, and what it writes.

    It has this one's path: a source folder that it happens to be in is not this package. Its code
    finds the channel, a `multiprocessing.connection.Connection`, under that name.
    """

    def __init__(self, code: str, *arguments: str, folder: Path | None = None) -> None:
        self.channel, theirs = Pipe()
        self._written = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        start = (
            f"import sys; sys.path = {sys.path!r}; from multiprocessing.connection import "
            f"Connection; channel = Connection({theirs.fileno()}); "
        )
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", start + code, *arguments],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=self._written,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
            )

    def hear(self, seconds: float) -> Any:
        """The next that it tells.

        Raises: TimeoutError if there is nothing in time, EOFError after the last.
        """
        try:
            if self.channel.poll(max(seconds, 0)):
                return self.channel.recv()
        except OSError:  # it has left within a message, or without having read all
            raise EOFError from None
        raise TimeoutError

    def status(self, seconds: float | None = None) -> int | None:
        """What it ended with; None if it still runs after so many seconds (SECONDS_TO_END)."""
        try:
            return self.process.wait(SECONDS_TO_END if seconds is None else seconds)
        except subprocess.TimeoutExpired:
            return None

    def written(self) -> str:
        """The end of what it has written to stdout and stderr."""
        self._written.seek(0)
        return self._written.read()[-MOST_WRITTEN:].strip()

    def stack(self) -> str:
        """written() of a process that hangs, with where it does, if it can still tell."""
        before = self.written()
        self.process.send_signal(signal.SIGUSR1)
        end = time.monotonic() + SECONDS_TO_TELL
        while self.written() == before and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.1)  # the rest of it
        return self.written()

    def close(self) -> None:
        """Kill it; one that does not go is left behind."""
        self.process.kill()
        self.status(SECONDS_TO_DIE)
        self.channel.close()
        self._written.close()


def output(command: Sequence[str], seconds: float) -> str:
    """What a command writes to stdout, then to stderr.

    Raises: OSError, TimeoutError.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    )
    try:
        return "".join(process.communicate(timeout=seconds))
    except subprocess.TimeoutExpired:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=SECONDS_TO_DIE)
        raise TimeoutError(f"no answer within {seconds:g} s") from None
