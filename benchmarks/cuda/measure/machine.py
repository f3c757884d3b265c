"""What a figure is worth nothing without: the card, its clocks, the tools and the commit."""

import platform
import shutil
import subprocess
import sys

from emulator.build import find_nvcc

from . import ROOT
from .items import options
from .results import tell

SECONDS = 15  # for a tool to answer
CARD = (  # of nvidia-smi
    "name,driver_version,compute_cap,memory.total,power.limit,temperature.gpu,"
    "clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem"
)


def main() -> None:
    """The cheap facts first: what hangs ends the step."""
    device = options().device
    tell("fact", name="commit", value=commit())
    tell("fact", name="python", value=f"{platform.python_version()} ({sys.executable})")
    tell("fact", name="system", value=platform.platform())
    nvcc = find_nvcc()
    for name, command in {
        "nvcc": [str(nvcc) if nvcc else "nvcc", "--version"],
        "compiler": ["c++", "--version"],
        "cmake": ["cmake", "--version"],
        "ninja": ["ninja", "--version"],
        "ncu": ["ncu", "--version"],
        "compute-sanitizer": ["compute-sanitizer", "--version"],
    }.items():
        tell("fact", name=name, value=version(command))
    if device == "emulated":
        tell("fact", name="card", value="emulated: times mean nothing")
    else:
        for name, value in ask_driver(CARD).items():
            tell("fact", name=name, value=value)
    ask_torch(device)


def commit() -> str:
    """Of the checkout, and whether files differ from it."""
    try:
        described = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True, encoding="utf-8", timeout=SECONDS, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return described.stdout.strip()


def version(command: list[str]) -> str:
    """The line of the answer that has the release, or that the tool is missing."""
    if shutil.which(command[0]) is None:
        return "not found"
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=SECONDS
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"failed: {error}"
    lines = [line for line in done.stdout.splitlines() if any(map(str.isdigit, line))]
    telling = [line for line in lines if "release" in line or "ersion" in line]
    return (telling or lines or [f"status {done.returncode}"])[0].strip()


def ask_driver(query: str) -> dict[str, str]:
    """nvidia-smi's answers by name."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--id=0", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True, encoding="utf-8", errors="replace", timeout=SECONDS, check=True,
        )  # fmt: skip
    except FileNotFoundError:
        return {"nvidia-smi": "not found"}
    except subprocess.CalledProcessError as error:
        return {"nvidia-smi": (error.stdout + error.stderr).strip()[:300]}
    return dict(zip(query.split(","), done.stdout.strip().split(", "), strict=False))


def ask_torch(device: str) -> None:
    """What torch and the card say of each other."""
    import torch

    tell("fact", name="torch", value=torch.__version__)
    tell("fact", name="CUDA of torch", value=torch.version.cuda)
    tell("fact", name="cuDNN of torch", value=torch.backends.cudnn.version())
    if device == "emulated":
        return
    properties = torch.cuda.get_device_properties(0)
    for name, value in {
        "card": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "L2 cache": f"{properties.L2_cache_size / 2**20:.0f} MiB",
        "shared memory of a block": properties.shared_memory_per_block_optin,
    }.items():
        tell("fact", name=name, value=value)


if __name__ == "__main__":
    main()
