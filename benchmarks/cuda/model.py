"""A model of the time of each kernel, counted and not measured on a GPU: work over peak rates.

    python benchmarks/cuda/model.py --shapes windows v3 v2 v1 lang long million

bfloat16 or float16. What a head executes is in executed.csv, which executed.py makes; a launch
takes as long as its slowest resource, all others overlapping, on as many multiprocessors as it has
blocks. Latencies, low occupancy and uneven last waves are not in it.

The counts are of bfloat16, the Gaussian kernel and epsilon = 0.1, without masks and masses, in the
SASS for sm_80 on both devices; of kernels that need clusters, which an A100 does not have, in that
for sm_90. Of streaming kernels memory is that of the tokens' tensors alone.

The floor: each tensor of the tokens moved once, an exponential on the special-function units for
each token and reference (two with backward, which forms scores again), and the products at the full
rate of the tensor cores. flash-attention's bound: an exponential for each pair of tokens (two with
backward), 4 N^2 D H B flop forward and 2.5 times as many backward (as its papers count) at the best
rate that they report for any shape, and its tensors moved once.
"""

import argparse
import csv
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import chain
from pathlib import Path

from devices import DEVICES, Device
from layout import Problem

# B, H, N, D, M (Dv = D)
SHAPES = {
    "windows": Problem(128, 24, 49, 32, 49),
    "v3": Problem(128, 12, 196, 32, 49),
    "v2": Problem(128, 6, 784, 32, 49),
    "v1": Problem(128, 3, 3136, 32, 49),
    "lang": Problem(32, 12, 512, 64, 64),
    "long": Problem(1, 16, 65536, 64, 128),
    "million": Problem(1, 16, 1 << 20, 64, 128),
}
EXECUTED = Path(__file__).with_name("executed.csv")
MOST_IN_A_BLOCK = 896  # tokens of a head; more stream
LAUNCH = 2e-6  # seconds between launches on one stream: an assumption
WARP = 32
MMA = 2 * 16 * 8 * 16  # flop of mma.m16n8k16
PASS = 128  # bytes
ELEMENT = 2  # bytes of a bfloat16 or float16
NUMBER = 4  # of a float32

ON_SHARES = "attention_forward_on_shares_kernel"
BACKWARD_ON_SHARES = "attention_backward_on_shares_kernel"
# Tensors of [B, H, N, D] that a launch reads or writes; kernels that are not here have none.
TOKEN_TENSORS = {
    "attention_forward_on_chip_kernel": 3,  # k, v, o
    "attention_forward_on_cluster_kernel": 3,  # k, v, o
    "attention_backward_on_chip_kernel": 6,  # k, v, o, do, dk, dv
    ON_SHARES: 1,  # k; of all launches one also v, one also o
    "sinkhorn_step_kernel": 1,  # k
    "collect_kernel": 2,  # k, v
    "distribute_kernel": 2,  # k, o
    BACKWARD_ON_SHARES: 1,  # k; of all launches one also o and do, one v, dv, one v, do, dk
    "output_product_kernel": 2,  # o, do
    "distribute_backward_kernel": 2,  # k, do
    "sinkhorn_step_backward_kernel": 1,  # k; at step T also do and dv
    "gradient_kernel": 4,  # k, v, do, dk
}
OF_SOME_LAUNCHES = {ON_SHARES: 2, BACKWARD_ON_SHARES: 7}  # the tensors beside k
ALONE = {
    "attention_forward_on_chip_kernel",
    "attention_forward_on_cluster_kernel",
    "attention_backward_on_chip_kernel",
}


@dataclass(frozen=True)
class Work:
    """What one launch does in all its blocks; the names are those of Device's rates."""

    issue: float = 0  # instructions of one thread
    special: float = 0  # exponentials, logarithms, reciprocals of one thread
    tensor: float = 0  # flop on the tensor cores
    shared: float = 0  # bytes from and to shared memory; shuffles take the same way
    cache: float = 0  # bytes asked of the L2 cache
    memory: float = 0  # bytes from and to device memory, once each

    def slowest(self, device: Device, blocks: float) -> tuple[str, float]:
        """The resource that takes longest on as many multiprocessors as there are blocks, and its
        seconds."""
        busy = min(1, blocks / device.multiprocessors)
        parts = {f.name: getattr(self, f.name) / device.rate(f.name) / busy for f in fields(Work)}
        name = most_of(parts)
        return name, parts[name]


@dataclass(frozen=True)
class Launch:
    """Launches of one kernel, alike."""

    kernel: str
    times: float
    blocks: float  # of one of them
    work: Work

    def seconds(self, device: Device) -> float:
        """Of all of them."""
        return self.times * (LAUNCH + self.work.slowest(device, self.blocks)[1])


def forward(p: Problem, device: Device) -> list[Launch]:
    """All launches of attention."""
    return list(_launches(p, device, "forward"))


def backward(p: Problem, device: Device) -> list[Launch]:
    """All launches of its gradients by keys, values and references."""
    return list(_launches(p, device, "backward"))


def _launches(p: Problem, device: Device, pass_: str) -> Iterator[Launch]:
    counted = [n for _, n, d, m in _executed() if (d, m) == (p.depth, p.references)]
    tokens = p.tokens if p.tokens in counted else max(counted, default=0)
    if tokens != p.tokens and min(tokens, p.tokens) <= MOST_IN_A_BLOCK:
        raise ValueError(f"executed.csv has no head of {p.tokens} x {p.depth}, {p.references}")
    longer = p.tokens / tokens  # where kernels stream, work is in proportion to the tokens
    by_steps = _executed()[80, tokens, p.depth, p.references]
    if device.capability >= 90:  # a cluster holds heads of exactly so many tokens
        own = _executed().get((90, tokens, p.depth, p.references), {})
        by_steps = by_steps | {
            key: rows for key, rows in own.items() if longer == 1 or key[1] == "backward"
        }
    # Each step from the second on is as much work; T = 0 is taken for T = 1, an upper bound.
    first, last, part = (2, 5, (p.steps - 2) / 3) if p.steps > 1 else (1, 1, 0)
    at_first, at_last = by_steps[first, pass_], by_steps[last, pass_]
    on_chip = {*ALONE, BACKWARD_ON_SHARES} & at_first.keys()
    for kernel, row in at_first.items():
        end = at_last[kernel]
        counts = {n: x + (end[n] - x) * part for n, x in row.items()}
        # what is launched beside a kernel that makes a head's passes finds no tokens left
        yield _launch(kernel, counts, p, longer, moves=kernel in on_chip or not on_chip)


def _launch(kernel: str, row: dict[str, float], p: Problem, longer: float, moves: bool) -> Launch:
    times = row["launches"]
    scale = p.problems * longer / times
    tensors = TOKEN_TENSORS.get(kernel, 0) + OF_SOME_LAUNCHES.get(kernel, 0) / times
    moved = moves * tensors * p.tokens * p.depth * ELEMENT
    if kernel in ALONE:  # rows and columns of each step, and A
        moved += NUMBER * ((p.steps + 1) * (p.tokens + p.references) + p.references * p.depth)
    work = Work(
        issue=WARP * scale * row["issued"],
        special=WARP * scale * row["special"],
        tensor=MMA * scale * row["tensor"],
        shared=PASS * scale * (row["shared"] + row["shuffle"]),
        cache=PASS * scale * row["global"],
        memory=p.problems * moved,
    )
    return Launch(kernel, times, scale * row["blocks"], work)


@cache
def _executed() -> dict[tuple[int, ...], dict[tuple[int, str], dict[str, dict[str, float]]]]:
    """By compute capability, tokens, depth and references; by steps and pass; by kernel; by
    column."""
    found: dict[tuple[int, ...], dict[tuple[int, str], dict[str, dict[str, float]]]] = {}
    with EXECUTED.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            *head, steps = (
                int(row.pop(name))
                for name in ("capability", "tokens", "depth", "references", "steps")
            )
            pass_, kernel = row.pop("pass"), row.pop("kernel")
            kernels = found.setdefault(tuple(head), {}).setdefault((steps, pass_), {})
            assert kernel not in kernels, f"two instances of {kernel}"
            kernels[kernel] = {k: float(x) for k, x in row.items()}
    return found


def total(launches: list[Launch], device: Device) -> float:
    """Seconds one after the other."""
    return sum(launch.seconds(device) for launch in launches)


def seconds_by_resource(launches: list[Launch], device: Device) -> dict[str, float]:
    """Of each launch its slowest resource's; what lies between launches is not in it."""
    seconds: dict[str, float] = {}
    for launch in launches:
        name, time = launch.work.slowest(device, launch.blocks)
        seconds[name] = seconds.get(name, 0) + launch.times * time
    return seconds


def most_of(seconds: dict[str, float]) -> str:
    """The resource that most of the time is spent on."""
    return max(seconds, key=lambda name: seconds[name])


def floor(p: Problem, device: Device, gradient: bool) -> float:
    """Seconds of what cannot be left out."""
    pairs = p.problems * p.tokens * p.references
    # s, A, O; and backward s again, the two factors of each plan's gradient, dv, dA, dk and dy
    products = 3 + 7 * gradient
    work = Work(
        special=(1 + gradient) * pairs,
        tensor=2.0 * products * pairs * p.depth * device.tensor / device.full_tensor,
        memory=(3 + 6 * gradient) * p.problems * p.tokens * p.depth * ELEMENT,
    )
    return LAUNCH * (1 + gradient) + work.slowest(device, device.multiprocessors)[1]


def flash_attention(p: Problem, device: Device, gradient: bool) -> float:
    """Seconds of its forward, or of forward and backward, at least."""
    pairs = float(p.problems * p.tokens**2)
    work = Work(
        special=(1 + gradient) * pairs,
        memory=(4 + 8 * gradient) * p.problems * p.tokens * p.depth * ELEMENT,
    )
    products = 4 * pairs * p.depth * (3.5 if gradient else 1) / device.flash_attention
    slowest = work.slowest(device, device.multiprocessors)[1]
    return LAUNCH * (3 if gradient else 1) + max(products, slowest)


def figure(seconds: float) -> str:
    """In microseconds, three digits."""
    micro = seconds * 1e6
    return f"{micro:,.0f}" if micro >= 100 else f"{micro:.3g}"


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description="A model of the time of each kernel.")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    shapes = parser.parse_args().shapes
    print("Counted, not measured on a GPU. Microseconds.\n")
    print("| shape | T | device | floor | forward | bound by | flash-attention ", end="")
    print("| floor | with backward | bound by | flash-attention |")
    print("| --- | --: | --- |" + " --: | --: | --- | --: |" * 2)
    for shape in shapes:
        for steps in (1, 5):
            for device in DEVICES:
                print("|", " | ".join(_cells(shape, steps, device)), "|")
    print(
        "\n| shape | T | device | kernel | launches | blocks | instructions of a warp, G ", end=""
    )
    print("| Gflop | special G | shared GB | L2 GB | MB | time | bound by |")
    print("|" + " --- |" * 14)
    for shape in shapes:
        for steps in (1, 5):
            p = replace(SHAPES[shape], steps=steps)
            for device in DEVICES:
                for launch in chain(forward(p, device), backward(p, device)):
                    cells = [shape, str(steps), device.name, *_cells_of(launch, device)]
                    print("|", " | ".join(cells), "|")


def _cells(shape: str, steps: int, device: Device) -> Iterator[str]:
    """Of the table of totals."""
    p = replace(SHAPES[shape], steps=steps)
    yield from (shape, str(steps), device.name)
    ahead = forward(p, device)
    for launches, gradient in ((ahead, False), (ahead + backward(p, device), True)):
        yield figure(floor(p, device, gradient))
        yield figure(total(launches, device))
        between = LAUNCH * sum(launch.times for launch in launches)
        yield most_of(seconds_by_resource(launches, device) | {"launches": between})
        yield figure(flash_attention(p, device, gradient))


def _cells_of(launch: Launch, device: Device) -> list[str]:
    """Of the table of kernels: work of one launch, time of all."""
    work = launch.work
    cells = [launch.kernel, f"{launch.times:g}", f"{launch.blocks:.0f}"]
    scaled = (
        *(work.issue / WARP / 1e9, work.tensor / 1e9, work.special / 1e9),
        *(work.shared / 1e9, work.cache / 1e9, work.memory / 1e6),
    )
    cells += [f"{x:.3g}" for x in scaled]
    return [*cells, figure(launch.seconds(device)), work.slowest(device, launch.blocks)[0]]


if __name__ == "__main__":
    main()
