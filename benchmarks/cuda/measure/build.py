"""Installs the checkout for the card at hand only, into a folder of the output."""

import os
import re
import sys
from importlib import metadata

import torch

from emulator.build import emulated_library, find_nvcc

from . import PACKAGE, ROOT, bounded
from .items import options
from .results import fact, tell

# What pyproject.toml requires to build, for pip does not check it without an isolated environment.
# CMake and Ninja need not be of pip.
SECONDS = 60  # to import what was built
REQUIRED = {"setuptools": 77, "scikit-build-core": 1, "pybind11": 3}


def main() -> None:
    """The machine's environment stays as it was; all output is in the step's log."""
    if options().device == "emulated":
        os.symlink(emulated_library(), PACKAGE)
        return
    if reason := missing():
        sys.exit(f"the build needs {reason}")
    os.environ |= environment()
    print({name: os.environ[name] for name in environment()}, flush=True)
    command = [
        sys.executable, "-m", "pip", "install", "--verbose", "--no-build-isolation", "--no-index",
        "--no-deps", "--no-input", "--disable-pip-version-check", "--no-cache-dir", "--target",
        PACKAGE, str(ROOT),
    ]  # fmt: skip
    status = bounded.run(command, None, stdout=None).returncode
    if status != 0:
        sys.exit(f"pip failed with status {status}")
    code = "import setformer_ext._C as c; print(c.build_info()['cuda_architectures'])"
    built = bounded.run(
        [sys.executable, "-c", code], SECONDS, env=os.environ | {"PYTHONPATH": PACKAGE}
    )
    tell("fact", name="built for", value=built.stdout.strip())
    sys.exit(built.returncode)


def missing() -> str:
    """What is not there or too old; empty where nothing is."""
    reasons = []
    for name, least in REQUIRED.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = "none"
        number = re.match(r"\d+", version)
        if number is None or int(number[0]) < least:
            reasons.append(f"{name} >= {least}, found {version}")
    return "; ".join(reasons)


def environment() -> dict[str, str]:
    """Of the build: one architecture, nvcc, no silent build without CUDA, a compiler a core."""
    found = {"SETFORMER_CUDA": "on", "CUDAARCHS": os.environ.get("CUDAARCHS") or architecture()}
    found["CMAKE_BUILD_PARALLEL_LEVEL"] = str(len(os.sched_getaffinity(0)))
    nvcc = find_nvcc()
    if nvcc is not None and not os.environ.get("CUDACXX"):
        found["CUDACXX"] = str(nvcc)
    return found


def architecture() -> str:
    """Of the card, as CMake spells it."""
    capability = fact("capability") or ask_torch()
    return str(capability).replace(".", "") + "-real"


def ask_torch() -> str:
    """Where the step `machine` has not come so far."""
    try:
        return "{}.{}".format(*torch.cuda.get_device_capability())
    except (RuntimeError, AssertionError) as error:  # the latter of a torch without CUDA
        sys.exit(f"set CUDAARCHS: torch does not tell the card's compute capability: {error}")


if __name__ == "__main__":
    main()
