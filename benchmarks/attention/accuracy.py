"""Errors of the CPU kernels against the definition in float64, over the extremes of all options.

    python benchmarks/attention/accuracy.py [--quick]

For each kernel, type and epsilon: the largest error of the output, and of the gradients of key,
value and references, over similarities of scale 0.01 to 10,000 (keys and references are scaled by
its root; the gaussian kernel then sees squared distances up to four times that), T = 0, 1, 5, 100,
1000 and M = 1, 8, 64, 512. Inputs are rounded to the type first. Errors are shares of the largest
entry of the exact result. A gradient whose terms cancel (all of it with one reference, and wherever
the plans have become 0 and 1) has an error of the size of its terms: errors of gradients are shares
of a term, an N-th of |dS| / epsilon, where that is more. The exit status is 1 if anything is
infinite or not a number.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from setformer_ext import reference, set_attention

EPSILONS = (1e-3, 1e-2, 0.03, 0.1, 1.0, 10.0)
SCALES = (1e-2, 1.0, 1e2, 1e4)
ITERATIONS = (0, 1, 5, 100, 1000)
REFERENCES = (1, 8, 64, 512)
TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HEADS, TOKENS, DEPTH = 2, 40, 8


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="T up to 5, M up to 64")
    options = parser.parse_args()
    iterations = ITERATIONS[:3] if options.quick else ITERATIONS
    references = REFERENCES[:3] if options.quick else REFERENCES
    print("| kernel | type | error of | " + " | ".join(f"epsilon {e:g}" for e in EPSILONS) + " |")
    print("| --- | --- | --- |" + " --: |" * len(EPSILONS))
    finite = True
    for kernel, dtype in itertools.product(("gaussian", "linear"), TYPES):
        worst: dict[str, list[str]] = {"output": [], "gradient": []}
        for epsilon in EPSILONS:
            largest = {"output": (0.0, ""), "gradient": (0.0, "")}
            for scale, steps, count in itertools.product(SCALES, iterations, references):
                for name, error in _errors(kernel, dtype, epsilon, scale, steps, count):
                    where = f"scale {scale:g}, T {steps}, M {count}"
                    largest[name] = max(largest[name], (error, where))
            for name, (error, where) in largest.items():
                finite &= error < float("inf")
                worst[name].append(f"{error:.0e} ({where})" if error > 1e-2 else f"{error:.0e}")
        for name, cells in worst.items():
            kind = str(dtype).removeprefix("torch.")
            print(f"| {kernel} | {kind} | {name} | {' | '.join(cells)} |", flush=True)
    return 0 if finite else 1


def _errors(
    kernel: str, dtype: torch.dtype, epsilon: float, scale: float, steps: int, count: int
) -> Iterator[tuple[str, float]]:
    """Errors of the output and of each gradient; infinite where something is not finite."""
    rng = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=rng, dtype=torch.float64)

    root = scale**0.5
    key = torch.nn.functional.normalize(normal(1, HEADS, TOKENS, DEPTH), dim=-1) * root
    points = torch.nn.functional.normalize(normal(HEADS, count, DEPTH), dim=-1) * root
    inputs = [x.to(dtype) for x in (key, normal(1, HEADS, TOKENS, DEPTH), points)]
    upstream = normal(1, HEADS, TOKENS, DEPTH).to(dtype)
    options = {"kernel": kernel, "epsilon": epsilon, "iterations": steps, "normalize": False}
    found = _run(set_attention, inputs, upstream, options)
    exact = _run(reference.set_attention, [x.double() for x in inputs], upstream.double(), options)
    slope = min(root, 1.0) if kernel == "gaussian" else root
    terms = (0.0, slope / epsilon / TOKENS, 1 / TOKENS, slope / epsilon / TOKENS)
    for index, (x, wanted) in enumerate(zip(found, exact, strict=True)):
        size = max(float(wanted.abs().max()), terms[index])
        error = float((x.double() - wanted).abs().max()) / size
        yield ("gradient" if index else "output"), error if error == error else float("inf")


def _run(
    attention: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor, options: dict
) -> list[Tensor]:
    tensors = [x.detach().requires_grad_() for x in inputs]
    output = attention(None, *tensors, **options)
    return [output.detach(), *torch.autograd.grad(output, tensors, upstream)]


if __name__ == "__main__":
    sys.exit(main())
