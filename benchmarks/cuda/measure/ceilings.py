"""What the card reaches at best at the things that the kernels do: of torch, and of ceilings.cu."""

import json
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from emulator.build import find_nvcc

from . import bounded
from .device import Device, find
from .items import Item, options, work

SOURCE = Path(__file__).with_name("ceilings.cu")
PROGRAM = Path("ceilings").absolute()  # in the folder of the report
SECONDS = 20  # of one of its measurements
SECONDS_TO_COMPILE = 60
EMULATED = (8, 0)  # what is compiled for where there is no card
RATES = ("ex2", "fma", "movm", "mma", "shared", "cache")
STEPS = (
    "step of one block",
    *(f"step of {ranks} by {how}" for how in ("barrier", "st.async") for ranks in (2, 4, 8)),
)
COPIED = 1 << 30  # bytes
SIZE = 8192  # of a matrix


def main() -> None:
    """The safe ones first."""
    given = options()
    device = find(given.device)
    torch_ones: dict[str, Callable[[], dict[str, Any]]] = {
        "copy": partial(copy, device),
        "matmul bfloat16": partial(matmul, device, torch.bfloat16),
        "matmul float32": partial(matmul, device, torch.float32),
    }
    items = [Item({"name": name}, call, "ceiling") for name, call in torch_ones.items()]
    items += [Item({"name": SOURCE.name}, partial(compile_program, device), "program")]
    if not device.emulated:
        items += [Item({"name": name}, partial(run, name), "ceiling") for name in RATES]
        items += [Item({"name": name}, partial(run, name), "step") for name in STEPS]
    work(items, given.start, given.end, device.usable)


def copy(device: Device) -> dict[str, Any]:
    """Bytes read and written, of a copy larger than any cache."""
    count = 1024 if device.emulated else COPIED
    x = torch.zeros(count, dtype=torch.uint8, device=device.torch)
    y = torch.empty_like(x)
    us = min(device.microseconds(lambda: y.copy_(x)))
    return {"rate": 2 * count / us * 1e6, "unit": "B/s"}


def matmul(device: Device, dtype: torch.dtype) -> dict[str, Any]:
    """Of square matrices, by what torch calls; float32 is not rounded to TF32."""
    size = 32 if device.emulated else SIZE
    x = torch.randn(size, size, dtype=torch.float32, device=device.torch).to(dtype)
    out = torch.empty_like(x)
    us = min(device.microseconds(lambda: torch.mm(x, x, out=out)))
    return {"rate": 2 * size**3 / us * 1e6, "unit": "flop/s"}


def compile_program(device: Device) -> dict[str, Any]:
    """ceilings.cu, for the card alone."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError("nvcc was not found: set CUDA_HOME")
    capability = EMULATED if device.emulated else torch.cuda.get_device_capability(device.torch)
    number = "{}{}".format(*capability)
    target = f"-gencode=arch=compute_{number},code=sm_{number}"
    command = [nvcc, "-std=c++17", "-O3", target, SOURCE, "-o", PROGRAM]
    done = bounded.run(command, SECONDS_TO_COMPILE, stdout=None)
    if done.returncode != 0:
        raise RuntimeError(f"nvcc failed with status {done.returncode}")
    return {"compiled_for": number}


def run(name: str) -> dict[str, Any]:
    """What the program prints of one measurement."""
    done = bounded.run([PROGRAM, name], SECONDS, stderr=subprocess.PIPE)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip() or f"status {done.returncode}")
    found = json.loads(done.stdout)
    return dict(found)


if __name__ == "__main__":
    main()
