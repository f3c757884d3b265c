"""Other processes, none of which is waited for without a bound.

A process that is killed while it waits for a GPU may stay until the GPU lets it go: for ever.
"""

import contextlib
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

SECONDS_TO_END = 5  # of a process that has closed its stdout
SECONDS_TO_DIE = 1  # of one that was killed
SECONDS_TO_TELL = 2  # where it hangs: see faulthandler in worker.py
MOST_OF_STDERR = 4000  # characters, the last ones


class Process:
    """A process, its lines of stdout as they come and what it writes to stderr."""

    def __init__(self, command: Sequence[str], folder: Path | None = None) -> None:
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            encoding="utf-8",
            errors="replace",
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True).start()

    def _read(self, stdout: IO[str]) -> None:
        for line in stdout:
            self._lines.put(line)
        self._lines.put("")

    def line(self, seconds: float) -> str | None:
        """The next line with its end; "" after the last, None if none came in time."""
        try:
            return self._lines.get(timeout=max(seconds, 0))
        except queue.Empty:
            return None

    def send(self, line: str) -> None:
        """To its stdin; one that has gone is found out by `line`."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def status(self, seconds: float | None = None) -> int | None:
        """What it ended with; None if it still runs after so many seconds (SECONDS_TO_END)."""
        try:
            return self.process.wait(SECONDS_TO_END if seconds is None else seconds)
        except subprocess.TimeoutExpired:
            return None

    def stderr(self) -> str:
        """The end of what it has written there."""
        self.errors.seek(0)
        return self.errors.read()[-MOST_OF_STDERR:].strip()

    def stack(self) -> str:
        """stderr() of a process that hangs, with where it does, if it can still tell."""
        before = self.stderr()
        self.process.send_signal(signal.SIGUSR1)
        end = time.monotonic() + SECONDS_TO_TELL
        while self.stderr() == before and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.1)  # the rest of it
        return self.stderr()

    def close(self) -> None:
        """Kill it; one that does not go is left behind."""
        self.process.kill()
        self.status(SECONDS_TO_DIE)
        self.errors.close()
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # of what it has not read
            self.process.stdin.close()


def output(command: Sequence[str], seconds: float) -> str:
    """What a command writes to stdout, then to stderr.

    Raises: OSError, TimeoutError.
    """
    with contextlib.closing(Process(command)) as process:
        end = time.monotonic() + seconds
        lines = []
        while line := process.line(end - time.monotonic()):
            lines.append(line)
        if line is None:
            raise TimeoutError(f"no answer within {seconds:g} s")
        process.status(SECONDS_TO_DIE)
        return "".join(lines) + process.stderr()
