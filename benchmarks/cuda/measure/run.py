"""Runs the process of one step until it ends or its deadline has come."""

import contextlib
import math
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import bounded, results

POLL = 0.1  # seconds between looks at the process and its output
MOST_LOG = 256 << 20  # bytes that a step may write
LOG_END = 1500  # characters of them that a report shows
PIECE = 1 << 20  # bytes that are read at once


@dataclass(frozen=True)
class Ended:
    """How the process of a step ended."""

    status: str  # ok, failed, timed out, or hung: no result for too long
    seconds: float
    note: str = ""


class Log:
    """The file that a step's process writes to, and the results in it."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(b"")
        self.path = path
        self.position = 0
        self.line = b""  # begun, not ended

    def new_results(self) -> list[dict[str, Any]]:
        """Of the lines written since the last call."""
        found = []
        end = self.size
        with self.path.open("rb") as file:
            file.seek(self.position)
            while self.position < end:  # and no further: the process may write faster than this
                piece = file.read(min(PIECE, end - self.position))
                self.position += len(piece)
                *lines, self.line = (self.line + piece).split(b"\n")
                self.line = self.line[-PIECE:]  # a line without end is no result
                found += [results.read(line.decode(errors="replace")) for line in lines]
        return [result for result in found if result is not None]

    @property
    def size(self) -> int:
        """In bytes."""
        return self.path.stat().st_size

    def end(self) -> str:
        """Its last lines, without the results."""
        with self.path.open("rb") as file:
            file.seek(max(0, self.size - 4 * LOG_END))
            lines = file.read(4 * LOG_END).decode(errors="replace").splitlines()
        return "\n".join(x for x in lines if not x.startswith(results.MARK))[-LOG_END:].strip()


def run(
    command: list[str],
    log: Log,
    seconds: float,
    environment: dict[str, str],
    add: Callable[[dict[str, Any]], None],
    patience: float = math.inf,
) -> Ended:
    """Each result in the log is handed to `add` within moments.

    Patience is for the next of them; twice that for the first, before which much is loaded.

    Of its group, whatever is left in the end is killed. Nothing is waited for without a bound: a
    process that a GPU holds may stay beyond any signal.
    """
    start = time.monotonic()
    last = start + patience
    status, note = "ok", ""
    options = {"stderr": subprocess.STDOUT, "cwd": log.path.parent, "env": environment}
    with log.path.open("ab") as output, bounded.group(command, stdout=output, **options) as process:
        while process.poll() is None and status == "ok":
            time.sleep(POLL)
            now = time.monotonic()
            for result in log.new_results():
                add(result)
                last = now
            if now - start > seconds:
                status, note = "timed out", f"ended after {seconds:.0f} s"
            elif now - last > patience:
                status, note = "hung", f"ended after {patience:.0f} s without a new result"
            elif log.size > MOST_LOG:
                status, note = "failed", f"ended for having written {MOST_LOG >> 20} MiB"
        if status != "ok" and not bounded.end(process):
            note += "; it could not be killed and was left behind"
    for result in log.new_results():
        add(result)
    if status == "ok" and process.returncode != 0:
        status, note = "failed", _how_it_ended(process.returncode)
    return Ended(status, time.monotonic() - start, note)


def _how_it_ended(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    with contextlib.suppress(ValueError):
        return f"ended by {signal.Signals(-status).name}"
    return f"ended by signal {-status}"
