"""Runs a command, and kills its whole group of processes when whoever began it is gone.

guard.py PIPE COMMAND...: the other end of the pipe, a file descriptor, is closed by then. A group,
for tools have processes of their own on the card, some of which no longer know their parent.
"""

import os
import resource
import signal
import subprocess
import sys
import threading


def main() -> None:
    """Ends as the command does, by its signal too."""
    pipe, command = int(sys.argv[1]), sys.argv[2:]
    signal.signal(signal.SIGTERM, lambda *_: None)  # the command's to obey: then this ends as well
    threading.Thread(target=watch, args=(pipe,), daemon=True).start()
    try:
        status = subprocess.Popen(command).wait()
    except OSError as error:
        sys.exit(f"{command[0]} could not be started: {error.strerror}")
    if status < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # one core is enough
        if -status not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


def watch(pipe: int) -> None:
    """Reads until there is nobody who could write."""
    os.read(pipe, 1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
