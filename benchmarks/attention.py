"""``python benchmarks/attention.py``: time of the operation and of its peers, as ratios.

All competitors of a case run in turn, round after round, so that a change of the machine's speed
meets them alike; each figure is the minimum and the median over rounds. Inputs have unit norm,
epsilon is 0.1, T = 5.
"""

import argparse
import json
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

import peers
from setformer_ext import _C, set_attention
from setformer_ext.timing import (
    DTYPES,
    SHAPES,
    describe,
    find_device,
    inputs,
    milliseconds,
    step,
)

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def competitors() -> dict[str, Attention]:
    """Ours and its peers, by the names of the table."""
    torch._dynamo.config.cache_size_limit = 64
    return {
        "setformer_ext": lambda key, value, y: set_attention(None, key, value, y),
        "eager, log domain": peers.log_domain,
        "torch.compile, scaling": torch.compile(peers.scaling, dynamic=False),
    }


def interleaved(
    steps: dict[str, Callable[[], object]], device: torch.device, rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of every step in every round, after one untimed round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(rounds + 1):
        for name, run in steps.items():
            measured = milliseconds(run, device, 1)
            if round_number > 0:
                times[name] += measured
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=["v1", "v2", "lang"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--json", metavar="FILE", help="write every time measured to FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = find_device(options.device)
    print(
        f"{options.dtype} on {describe(device)}, {_C.cpu_isa()}, torch {torch.__version__}, "
        "milliseconds"
    )
    print("| shape | direction | competitor | minimum | median | times ours (of medians) |")
    print("| --- | --- | --- | --: | --: | --: |")
    records = []
    for name in options.shapes:
        for gradient in (False, True):
            tensors = inputs(
                SHAPES[name], dtype=DTYPES[options.dtype], device=device, gradient=gradient
            )
            direction = "forward + backward" if gradient else "forward"
            steps = {
                who: step(attention, tensors, gradient) for who, attention in competitors().items()
            }
            times = interleaved(steps, device, options.rounds)
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
