"""Other processes; each wait for them has a limit.

A process that is killed while it waits for a GPU may never end.
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

SECONDS_TO_END = 5  # for a process that has closed its channel
SECONDS_TO_DIE = 1  # for a process that was killed
SECONDS_TO_TELL = 2  # for a process to write where it hangs (faulthandler in worker.py)
MOST_WRITTEN = 4000  # characters, the last ones


class Process:
    """Another Python process, a channel to and from it, and what it writes.

    It gets this process's sys.path, so that it does not import a source folder that it is started
    in. Its code finds the channel, a `multiprocessing.connection.Connection`, under the name
    `channel`.
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
        """The next message of the process.

        Raises: TimeoutError if there is none in time, EOFError after the last.
        """
        try:
            if self.channel.poll(max(seconds, 0)):
                return self.channel.recv()
        except OSError:  # it ended within a message, or before it had read all
            raise EOFError from None
        raise TimeoutError

    def status(self, seconds: float | None = None) -> int | None:
        """Its exit status; None if it still runs after these seconds (by default
        SECONDS_TO_END)."""
        try:
            return self.process.wait(SECONDS_TO_END if seconds is None else seconds)
        except subprocess.TimeoutExpired:
            return None

    def written(self) -> str:
        """The end of what it has written to stdout and stderr."""
        self._written.seek(0)
        return self._written.read()[-MOST_WRITTEN:].strip()

    def stack(self) -> str:
        """written() of a process that hangs, with its stack if it can still write that."""
        before = self.written()
        self.process.send_signal(signal.SIGUSR1)
        end = time.monotonic() + SECONDS_TO_TELL
        while self.written() == before and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.1)  # the rest of it
        return self.written()

    def close(self) -> None:
        """Kill the process; if it does not end, it is left behind."""
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
