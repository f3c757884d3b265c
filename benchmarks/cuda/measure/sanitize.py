"""compute-sanitizer on the smoke checks, in one process."""

import os
import shutil
import sys

from . import bounded
from .items import options
from .results import tell


def main() -> None:
    """Ends with the tool's status, which is not 0 where it found something."""
    given = options("--tool")
    if given.device == "emulated":
        tell("skipped", note="the emulated device has its own checks of memory and races")
        return
    if shutil.which("compute-sanitizer") is None:
        tell("skipped", note="compute-sanitizer was not found on PATH")
        return
    # torch's pools would hide what lies outside of an array but inside of a pool
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [
        "compute-sanitizer", "--tool", given.tool, "--kernel-regex", "kns=setformer",
        "--error-exitcode", "9", "--print-limit", "20",
        sys.executable, "-m", "measure.selftest", "--device", given.device,
        "--only", "smoke", "--in-process",
    ]  # fmt: skip
    sys.exit(bounded.run(command, None, env=environment, stdout=None).returncode)


if __name__ == "__main__":
    main()
