"""The errors of the CUDA kernels, emulated on the CPU, beside those of the definition in float32.

    python benchmarks/cuda/accuracy.py
    python benchmarks/cuda/accuracy.py --arithmetic exact

Largest difference from the definition in float64 as a part of the largest entry, over three seeds:
unit-norm keys and references, N = 300, D = 32, M = 49, epsilon = 0.1, T = 5. Exponentials,
logarithms and quotients of float32 are exact, that is rounded to the nearest, or perturbed: off by
the most that NVIDIA's PTX manual allows a GPU.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

import setformer_ext
from setformer_ext import ops, reference

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "cuda"))

from emulator.build import emulated_module
from emulator.device import Emulator

SHAPE = (1, 2, 300, 32)  # [B, H, N, D]
REFERENCES = (2, 49, 32)  # [H, M, D]
NAMES = ["output", "d key", "d value", "d reference"]


def results(function: Callable[..., Tensor], tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Output and gradients of attention in a type, [4, entries] padded with zeros, in float64."""
    key, value, points, upstream = (x.to(dtype) for x in tensors)
    leaves = [x.detach().clone().requires_grad_() for x in (key, value, points)]
    output = function(None, *leaves, epsilon=0.1, iterations=5, normalize=False)
    found = [output, *torch.autograd.grad(output, leaves, upstream)]
    flat = [x.detach().double().flatten() for x in found]
    return torch.nn.utils.rnn.pad_sequence(flat, batch_first=True)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="Errors of the emulated CUDA kernels.")
    kinds = ["exact", "perturbed"]
    parser.add_argument("--arithmetic", choices=kinds, nargs="+", default=kinds)
    options = parser.parse_args()
    ops._C = emulated_module()
    emulator = Emulator(ops._C.__file__)
    print("| kernels in | " + " | ".join(NAMES) + " |\n" + "| --- " * (1 + len(NAMES)) + "|")
    rows: dict[str, Tensor] = {}
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for seed in range(3):
            torch.manual_seed(seed)
            key, points = (normalize(torch.randn(s), dim=-1) for s in (SHAPE, REFERENCES))
            # as the type holds them: what is measured is the kernels' error, not the inputs'
            tensors = [x.to(dtype) for x in (key, torch.randn(SHAPE), points, torch.randn(SHAPE))]
            exact = results(reference.set_attention, tensors, torch.float64)
            found: dict[str, Tensor] = {}
            for arithmetic in options.arithmetic if dtype != torch.float64 else ["exact"]:
                name = str(dtype).removeprefix("torch.") + ", perturbed" * (arithmetic != "exact")
                with emulator.configured(seed=1 + seed, arithmetic=arithmetic):
                    found[name] = results(setformer_ext.set_attention, tensors, dtype)
            low = results(reference.set_attention, tensors, torch.float32)
            for name, result in {**found, "(the definition in float32)": low}.items():
                relative = (result - exact).abs().amax(1) / exact.abs().amax(1)
                rows[name] = torch.maximum(rows.get(name, relative), relative)
    for name, errors in rows.items():
        print(f"| {name} | " + " | ".join(f"{error:.1e}" for error in errors.tolist()) + " |")


if __name__ == "__main__":
    main()
