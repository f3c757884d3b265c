"""Installs the checkout for the card at hand only, into a folder of the output."""

import os
import subprocess
import sys

from emulator.build import emulated_library, find_nvcc

from . import PACKAGE, ROOT
from .items import options
from .machine import ask_driver
from .results import fact, tell


def main() -> None:
    """The machine's environment stays as it was; all output is in the step's log."""
    if options().device == "emulated":
        os.symlink(emulated_library(), PACKAGE)
        return
    os.environ |= environment()
    print({name: os.environ[name] for name in environment()}, flush=True)
    command = [
        sys.executable, "-m", "pip", "install", "--verbose", "--no-build-isolation", "--no-index",
        "--no-deps", "--no-input", "--disable-pip-version-check", "--no-cache-dir", "--target",
        PACKAGE, str(ROOT),
    ]  # fmt: skip
    status = subprocess.run(command).returncode
    if status != 0:
        sys.exit(f"pip failed with status {status}")
    code = "import setformer_ext._C as c; print(c.build_info()['cuda_architectures'])"
    built = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": PACKAGE},
        capture_output=True,
        encoding="utf-8",
    )
    print(built.stderr)
    tell("fact", name="built for", value=built.stdout.strip())
    sys.exit(built.returncode)


def environment() -> dict[str, str]:
    """Of the build: one architecture, nvcc, no silent build without CUDA, a compiler a core."""
    found = {"SETFORMER_CUDA": "on", "CUDAARCHS": os.environ.get("CUDAARCHS") or architecture()}
    found["CMAKE_BUILD_PARALLEL_LEVEL"] = str(len(os.sched_getaffinity(0)))
    nvcc = find_nvcc()
    if nvcc is not None:
        found["CUDACXX"] = str(nvcc)
    return found


def architecture() -> str:
    """Of the card, as CMake spells it."""
    capability = fact("capability") or ask_driver("compute_cap").get("compute_cap")
    if capability is None:
        sys.exit("neither torch nor nvidia-smi tells the card's compute capability: set CUDAARCHS")
    return str(capability).replace(".", "") + "-real"


if __name__ == "__main__":
    main()
