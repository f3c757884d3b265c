"""`setformer selftest` on the device, which may be the emulated one."""

import argparse
import importlib.util
import math
import sys
import time

from .results import tell


def main() -> None:
    """Its own two options, then the command's."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--device", required=True)
    parser.add_argument("--end", type=float, default=math.inf)
    given, arguments = parser.parse_known_args()
    name = given.device
    if "--suite" in arguments:
        if importlib.util.find_spec("pytest") is None:
            tell("skipped", note="pytest is not installed")
            return
        if given.end < math.inf:
            seconds = max(1.0, given.end - start)
            arguments += ["--suite-seconds", f"{seconds:.1f}"]
    from setformer_ext import cli  # loads torch, of which the command takes account itself

    from . import device

    if name == "emulated":
        device.find(name)
        name, arguments = "cpu", ["--in-process", *arguments]
    sys.exit(cli.main(["selftest", "--device", name, *arguments]))


if __name__ == "__main__":
    main()
