"""What a figure is worth nothing without: the card, its clocks, the tools and the commit."""

import platform
import shutil
import subprocess
import sys

from emulator.build import find_nvcc

from . import ROOT, bounded
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
        tell("fact", name="multiprocessors", value=1)
    card = "0"
    try:
        card = ask_torch(device) or card
    finally:  # where torch cannot use the card, the driver may tell why
        if device != "emulated":
            for name, value in ask_driver(CARD, card).items():
                tell("fact", name=name, value=value)


def commit() -> str:
    """Of the checkout, and whether files differ from it."""
    # in a container the checkout may well belong to somebody else
    command = ["git", "-c", "safe.directory=*", "-C", str(ROOT)]
    command += ["describe", "--always", "--dirty", "--abbrev=40"]
    try:
        described = bounded.run(command, SECONDS)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return described.stdout.strip() or "unknown"


def version(command: list[str]) -> str:
    """The line of the answer that has the release, or that the tool is missing."""
    if shutil.which(command[0]) is None:
        return "not found"
    try:
        done = bounded.run(command, SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        return f"failed: {error}"
    lines = [line for line in done.stdout.splitlines() if any(map(str.isdigit, line))]
    telling = [line for line in lines if "release" in line or "ersion" in line]
    return (telling or lines or [f"status {done.returncode}"])[0].strip()


def ask_driver(query: str, card: str) -> dict[str, str]:
    """nvidia-smi's answers by name; a card is told by its UUID or index."""
    if shutil.which("nvidia-smi") is None:
        return {"nvidia-smi": "not found"}
    command = ["nvidia-smi", f"--id={card}", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = bounded.run(command, SECONDS, stderr=subprocess.STDOUT)
    except subprocess.TimeoutExpired:
        return {"nvidia-smi": f"no answer within {SECONDS} s"}
    if done.returncode != 0:
        return {"nvidia-smi": done.stdout.strip()[:300]}
    return dict(zip(query.split(","), done.stdout.strip().split(", "), strict=False))


def ask_torch(device: str) -> str | None:
    """What torch and the card say of each other; the card's name for nvidia-smi, if it has one."""
    import torch

    tell("fact", name="torch", value=torch.__version__)
    tell("fact", name="CUDA of torch", value=torch.version.cuda)
    tell("fact", name="cuDNN of torch", value=torch.backends.cudnn.version())
    if device == "emulated":
        return None
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
    uuid = getattr(properties, "uuid", None)  # torch may have another order than the driver
    return "0" if uuid is None else f"GPU-{uuid}"


if __name__ == "__main__":
    main()
