"""Processes that are not waited for without a bound, and that leave nothing behind on the card.

A process that a GPU holds may stay beyond any signal.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

TO_END = 3.0  # seconds for a process to end when asked to, and again when killed
GUARD = str(Path(__file__).with_name("guard.py"))


@contextlib.contextmanager
def group(command: Sequence[str | Path], **options: Any) -> Iterator["subprocess.Popen[Any]"]:
    """The process leads a group: killed where this context ends, or this process does.

    Options are those of subprocess.Popen.
    """
    read, write = os.pipe()  # closed by the system when this process is killed
    try:
        process = subprocess.Popen(
            [sys.executable, "-S", "-E", GUARD, str(read), *command],
            stdin=subprocess.DEVNULL,
            pass_fds=(read,),
            start_new_session=True,
            **options,
        )
    except BaseException:
        os.close(write)
        raise
    finally:
        os.close(read)
    try:
        yield process
    finally:
        signal_group(process, signal.SIGKILL)
        os.close(write)


def run(
    command: Sequence[str | Path], seconds: float | None, **options: Any
) -> "subprocess.CompletedProcess[str]":
    """As subprocess.run with text; its stdout is returned unless told otherwise.

    Raises: subprocess.TimeoutExpired, when all of its group has been killed.
    """
    options = {"stdout": subprocess.PIPE, "encoding": "utf-8", "errors": "replace"} | options
    with group(command, **options) as process:
        try:
            out, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            end(process)
            raise subprocess.TimeoutExpired([str(word) for word in command], seconds) from None
    return subprocess.CompletedProcess(command, process.returncode, out or "", errors or "")


def end(process: "subprocess.Popen[Any]") -> bool:
    """Asks it to end, then kills it; whether it is gone."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        signal_group(process, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=TO_END)
            return True
    return False


def signal_group(process: "subprocess.Popen[Any]", number: int) -> None:
    """To all of its group, whether or not it is there itself."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
