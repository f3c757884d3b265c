"""The facts of a bug report: versions, processor, threads and CUDA."""

import argparse
import importlib.util
import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path

from .. import __version__
from .._C import build_info, cpu_isa, cuda_devices, cuda_driver_version, max_threads
from ..errors import first_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``info`` takes no options."""


def run(options: argparse.Namespace) -> None:
    """Print the report."""
    print(table(collect()))


def table(facts: dict[str, str]) -> str:
    """One line per fact, names on the left."""
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())


def collect() -> dict[str, str]:
    """Name and value of each fact, in the order of the report."""
    build = build_info()
    return {
        "setformer_ext": f"{__version__} in {Path(__file__).parents[1]}",
        "Python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{platform.platform()}, {platform.machine()}",
        "torch": _torch_version(),
        "NumPy": _version("numpy"),
        "compiler": f"{build['compiler']}, {build['build_type']}",
        "processor": f"{_processor()}, {os.cpu_count()} threads",
        "instruction set": f"{_instruction_set()} (compiled: {build['instruction_sets']})",
        "OpenMP": f"{max_threads()} threads, {_openmp_libraries()}",
        "CUDA": build["cuda"],
        "CUDA architectures": build["cuda_architectures"].replace(";", " ") or "none",
        "CUDA runtime": build["cuda_runtime"] or "none",
        "CUDA driver": cuda_driver_version() or "none",
        "NVTX ranges": "compiled" if build["nvtx"] == "yes" else "not compiled: no NVTX headers",
        "CUDA devices": "; ".join(cuda_devices()) or "none",
        "environment": _environment(),
    }


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _torch_version() -> str:
    if importlib.util.find_spec("torch") is None:
        return "not installed"
    import torch

    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    return f"{torch.__version__}, {cuda}, {torch.get_num_threads()} threads"


def processor_field(name: str) -> str | None:
    """The first entry of this name in Linux's /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else None


def _processor() -> str:
    """The processor's model, as the system names it; Linux on ARM does not."""
    return processor_field("model name") or platform.processor() or platform.machine()


def _instruction_set() -> str:
    """The instruction set in use, or what is wrong with the variable that chooses it."""
    try:
        return cpu_isa()
    except ValueError as error:
        return f"none: {first_line(error)}"


def _openmp_libraries() -> str:
    """The OpenMP runtimes in this process: two of them mean two pools of threads."""
    try:
        text = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "runtime unknown"
    return ", ".join(sorted(set(re.findall(r"/\S*lib(?:g|i|)omp\d*[^/\s]*\.so\S*", text))))


def _environment() -> str:
    """The environment variables that change what runs, and where."""
    prefixes = ("OMP_", "GOMP_", "SETFORMER_", "CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING")
    settings = [
        f"{name}={value}" for name, value in os.environ.items() if name.startswith(prefixes)
    ]
    return " ".join(sorted(settings)) or "nothing set"
