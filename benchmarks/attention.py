"""``python benchmarks/attention.py``: time of the operation and of its peers, float32, as ratios.

All competitors of a case run in turn, round after round, so that a change of the machine's speed
meets them alike; each figure is the minimum and the median over rounds. Inputs have unit norm,
epsilon is 0.1, T = 5.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import peers
from setformer_ext import _C, set_attention

# name: B, H, N, D, M (Dv = D)
SHAPES = {
    "v1": (8, 3, 3136, 32, 49),
    "v2": (8, 6, 784, 32, 49),
    "v3": (8, 12, 196, 32, 49),
    "lang": (8, 12, 512, 64, 64),
    "long": (1, 8, 16384, 64, 128),
}
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def competitors() -> dict[str, Attention]:
    """Ours and its peers, by the names of the table."""
    torch._dynamo.config.cache_size_limit = 64
    return {
        "setformer_ext": lambda key, value, y: set_attention(None, key, value, y),
        "eager, log domain": peers.log_domain,
        "torch.compile, scaling": torch.compile(peers.scaling, dynamic=False),
    }


def inputs(shape: tuple[int, ...], gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Key [B, H, N, D], value [B, H, N, D] and references [H, M, D]."""
    batch, heads, tokens, depth, count = shape
    torch.manual_seed(0)
    key = F.normalize(torch.randn(batch, heads, tokens, depth), dim=-1)
    value = torch.randn(batch, heads, tokens, depth)
    references = F.normalize(torch.randn(heads, count, depth), dim=-1)
    for x in (key, value, references):
        x.requires_grad_(gradient)
    return key, value, references


def step(attention: Attention, tensors: tuple[Tensor, ...], gradient: bool) -> Callable[[], object]:
    """One forward, or forward and backward, of these inputs."""
    if not gradient:
        return lambda: attention(*tensors)
    grad_output = torch.randn_like(tensors[1])
    return lambda: torch.autograd.grad(attention(*tensors), tensors, grad_output)


def interleaved(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every step in every round, after one untimed round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(rounds + 1):
        for name, run in steps.items():
            start = time.perf_counter()
            run()
            if round_number > 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=["v1", "v2", "lang"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", metavar="FILE", help="write every time measured to FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{_C.cpu_isa()}, {options.threads} threads, torch {torch.__version__}, milliseconds")
    print("| shape | direction | competitor | minimum | median | times ours (of medians) |")
    print("| --- | --- | --- | --: | --: | --: |")
    records = []
    for name in options.shapes:
        for gradient in (False, True):
            tensors = inputs(SHAPES[name], gradient)
            direction = "forward + backward" if gradient else "forward"
            with torch.set_grad_enabled(gradient):
                steps = {
                    who: step(attention, tensors, gradient)
                    for who, attention in competitors().items()
                }
                times = interleaved(steps, options.rounds)
            ours = statistics.median(times["setformer_ext"])
            for who, measured in times.items():
                middle = statistics.median(measured)
                print(
                    f"| {name} | {direction} | {who} | {min(measured):.2f} | {middle:.2f} "
                    f"| {middle / ours:.2f} |",
                    flush=True,
                )
                records.append(
                    {
                        "shape": name,
                        "direction": direction,
                        "competitor": who,
                        "milliseconds": measured,
                    }
                )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(records, file, indent=1)


if __name__ == "__main__":
    main()
