"""A model of the time of each kernel, not measured on a GPU: counted work over peak rates.

    python benchmarks/cuda/model.py --shapes v1 v2 v3 lang long

bfloat16 or float16, T = 5. A launch takes between its slowest resource's time (all overlap) and the
sum of all (nothing overlaps), on as many multiprocessors as it has blocks. Latencies, low occupancy
and uneven last waves are not in it.

flash-attention: 4 N^2 D H B flop forward, 2.5 times as many backward (as its papers count), at the
best rate they report for any shape, which short or shallow heads do not reach.
"""

import argparse
from dataclasses import dataclass, fields, replace
from itertools import groupby

import counts
from counts import Work
from devices import DEVICES, Device
from layout import Needs, Problem, divide_up, dynamic_shared

# B, H, N, D, M (Dv = D), as in benchmarks/attention.py
SHAPES = {
    "v1": Problem(8, 3, 3136, 32, 49),
    "v2": Problem(8, 6, 784, 32, 49),
    "v3": Problem(8, 12, 196, 32, 49),
    "lang": Problem(8, 12, 512, 64, 64),
    "long": Problem(1, 8, 16384, 64, 128),
}
LAUNCH = 2e-6  # seconds between launches on one stream: an assumption
MERGE_THREADS = 128
WARPS = 4


@dataclass(frozen=True)
class Launch:
    """`times` launches of one kernel."""

    kernel: str
    blocks: int
    work: Work  # of one of them
    times: int = 1
    collects: bool = False  # sinkhorn_step_backward_kernel of the step T of the keys

    def shared(self, p: Problem, arch: int = 80) -> int:
        """Bytes of shared memory that it asks for."""
        return dynamic_shared(self.kernel, p, arch, self.collects)

    def part(self, device: Device, resource: str) -> float:
        """Seconds that one resource takes for one launch."""
        busy = min(1, self.blocks / device.multiprocessors)
        return float(getattr(self.work, resource)) / (device.rate(resource) * busy)

    def seconds(self, device: Device) -> tuple[float, float]:
        """Of all `times`: where everything overlaps, and where nothing does."""
        parts = [self.part(device, f.name) for f in fields(Work)]
        return self.times * (LAUNCH + max(parts)), self.times * (LAUNCH + sum(parts))

    def slowest(self, device: Device) -> str:
        """The resource that takes longest, or "launch"."""
        parts = {f.name: self.part(device, f.name) for f in fields(Work)} | {"launch": LAUNCH}
        return max(parts, key=lambda name: parts[name])


def forward(p: Problem) -> list[Launch]:
    """ForwardKernels<Storage>::run"""
    states = counts.numbers(p.problems * p.references)
    rows = counts.numbers(p.problems * p.tokens)
    keys = Work(memory=counts.token_rows(p).memory)
    if p.on_chip:
        work = counts.on_chip(p) + p.steps * (rows + states)
        return [Launch("attention_forward_on_chip_kernel", p.problems, work)]
    blocks = p.problems * p.splits
    step = counts.sinkhorn_step(p) + keys + rows + 2 * p.splits * states
    collect = counts.pool(p, False) + keys + p.splits * (p.depth + 1) * states
    return [
        Launch("sinkhorn_step_kernel", blocks, step, p.steps),
        *merge("merge_columns_kernel", p, p.references, 2 * p.splits * states, p.steps),
        Launch("collect_kernel", blocks * p.chunks * p.groups, collect),
        *merge(
            "merge_pooled_kernel",
            p,
            p.references * p.depth,
            p.splits * (p.depth + 1) * states,
        ),
        Launch("distribute_kernel", blocks, counts.distribute(p) + keys + rows),
    ]


def backward(p: Problem) -> list[Launch]:
    """BackwardKernels<Storage>::run, all gradients of keys, values and references."""
    states = counts.numbers(p.problems * p.references)
    rows = counts.numbers(p.problems * p.tokens)
    keys = Work(memory=counts.token_rows(p).memory)
    in_one = p.chunks == 1 and p.groups == 1
    both = [(True, True)] if in_one else [(True, False), (False, True)]
    steps = range(p.steps, 0, -1)
    if p.resident(Needs.DIFFERENTIATES):
        work = counts.token_rows(p) + counts.key_copies(p)
        work += 2 * counts.token_rows(p) + counts.pool(p, True)  # delta, then dA
        for t in steps:
            work += counts.sinkhorn_step_backward(p, t, True) + 2 * rows
        for to_tokens, to_references in both:
            work += counts.gradient(p, to_tokens, to_references, True) + 2 * p.steps * rows
        work += 2 * (p.depth + 1) * states + 2 * (1 + p.steps) * states  # dA, dy, columns
        return [Launch("attention_backward_resident_kernel", p.problems, work)]
    blocks = p.problems * p.splits
    sums = p.splits * (p.depth + 1) * states
    launches = [
        Launch("output_product_kernel", blocks, 2 * counts.token_rows(p) + rows),
        Launch(
            "distribute_backward_kernel",
            blocks * p.chunks * p.groups,
            counts.pool(p, False) + keys + rows + sums,
        ),
        Launch("merge_pooled_gradient_kernel", p.problems * divide_up(p.references, WARPS), sums),
        *merge("merge_sums_kernel", p, p.references, p.splits * states, p.steps - 1),
    ]
    for t in steps:
        work = counts.sinkhorn_step_backward(p, t, False) + keys + 2 * rows + p.splits * states
        collects = t == p.steps
        launches.append(Launch("sinkhorn_step_backward_kernel", blocks, work, collects=collects))
    for to_tokens, to_references in both:
        parts = p.chunks * p.groups if to_references else 1
        work = counts.gradient(p, to_tokens, to_references, False) + keys + 2 * p.steps * rows
        launches.append(Launch("gradient_kernel", blocks * parts, work))
    merging = p.problems * divide_up(p.references, WARPS)
    launches.append(Launch("merge_gradient_kernel", merging, sums))
    scalars = counts.numbers(2 * p.problems * p.splits) + states
    launches.append(Launch("head_gradient_kernel", divide_up(p.problems, WARPS), scalars))
    return launches


def merge(kernel: str, p: Problem, results: int, work: Work, times: int = 1) -> list[Launch]:
    """Of what the blocks that share a head leave; one thread a result."""
    if p.splits == 1 or times <= 0:
        return []
    return [Launch(kernel, divide_up(p.problems * results, MERGE_THREADS), work, times)]


def flash_attention(p: Problem, device: Device, gradient: bool) -> float:
    """Seconds of its forward, or of forward and backward."""
    flop = 4.0 * p.tokens**2 * p.depth * p.problems * (3.5 if gradient else 1)
    return flop / device.flash_attention + LAUNCH * (3 if gradient else 1)


def total(launches: list[Launch], device: Device) -> tuple[float, float]:
    """Seconds one after the other: all overlapping, nothing overlapping."""
    times = [launch.seconds(device) for launch in launches]
    return sum(low for low, _ in times), sum(high for _, high in times)


def span(times: tuple[float, float]) -> str:
    """In microseconds."""
    return f"{times[0] * 1e6:.0f}-{times[1] * 1e6:.0f}"


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description="A model of the time of each kernel.")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    shapes = parser.parse_args().shapes
    print("Model, not measured on a GPU. Microseconds: all overlapping - nothing overlapping.\n")
    print("| shape | device | forward | flash-attention | with backward | flash-attention |")
    print("| --- | --- | --- | --- | --- | --- |")
    for shape in shapes:
        p = SHAPES[shape]
        for device in DEVICES:
            cells = [shape, device.name]
            for launches, gradient in ((forward(p), False), (forward(p) + backward(p), True)):
                cells += [span(total(launches, device))]
                cells += [f"{flash_attention(p, device, gradient) * 1e6:.0f}"]
            print("|", " | ".join(cells), "|")
    print(
        "\n| shape | kernel | launches | blocks | MB | Gflop | float32 G | exponentials G |", end=""
    )
    print("".join(f" {device.name} | slowest |" for device in DEVICES))
    print("|" + " --- |" * (8 + 2 * len(DEVICES)))
    for shape in shapes:
        launches = forward(SHAPES[shape]) + backward(SHAPES[shape])
        for launch, alike in groupby(launches):
            times = launch.times * len(list(alike))
            print("|", " | ".join([shape, *cells_of(replace(launch, times=times))]), "|")


def cells_of(launch: Launch) -> list[str]:
    """Of the table of kernels; work of one launch, time of all `times`."""
    work = launch.work
    scaled = [work.memory / 1e6, work.tensor / 1e9, work.float32 / 1e9, work.special / 1e9]
    cells = [launch.kernel, str(launch.times), str(launch.blocks)]
    cells += [f"{figure:.3g}" for figure in scaled]
    for device in DEVICES:
        cells += [span(launch.seconds(device)), launch.slowest(device)]
    return cells


if __name__ == "__main__":
    main()
