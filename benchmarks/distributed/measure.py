"""One sequence over 1, 2 and 4 processes of this machine: time, and bytes sent against the formula.

    python benchmarks/distributed/measure.py [--tokens 65536] [--processes 1 2 4] [--rounds 7]

prints a table in Markdown: medians over rounds of the slowest process, one thread each, beside
set_attention in one process. "counted" are the bytes that each rank hands to the process group for
others; "loopback" what the system says went over its loopback device, by the number of ranks:
headers and acknowledgements included. More processes than cores share them.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from formula import Sizes, bytes_sent
from torch import Tensor
from torch.multiprocessing.spawn import spawn

import setformer_ext
from setformer_ext.distributed import set_attention
from setformer_ext.distributed.ranks import Ranks


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    sizes = Sizes(heads=8, tokens=options.tokens, references=128, depth=64, iterations=5)
    print(f"{sizes}, float32, {os.cpu_count()} cores\n")
    print(
        "| processes | forward, ms | with backward, ms | forward, bytes counted | formula "
        "| loopback | backward, bytes counted | formula | loopback |"
    )
    print("| --: |" + " --: |" * 8)
    for processes in (0, *options.processes):
        with tempfile.TemporaryDirectory() as folder:
            spawn(_rank, (processes, sizes, options.rounds, folder), nprocs=max(processes, 1))


def _rank(rank: int, processes: int, sizes: Sizes, rounds: int, folder: str) -> None:
    """Of no processes, rank 0 is set_attention alone."""
    torch.set_num_threads(1)
    ranks = max(processes, 1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    torch.manual_seed(0)
    shape = (1, sizes.heads, sizes.tokens // ranks, sizes.depth)
    key = F.normalize(torch.randn(shape), dim=-1).requires_grad_()
    value = torch.randn(shape, requires_grad=True)
    reference = F.normalize(torch.randn(sizes.heads, sizes.references, sizes.depth), dim=-1)
    attend = set_attention if processes > 0 else setformer_ext.set_attention

    def forward() -> Tensor:
        return attend(None, key, value, reference, iterations=sizes.iterations)

    def with_backward() -> None:
        torch.autograd.grad(forward().sum(), (key, value))

    milliseconds = [_median(step, rounds) for step in (forward, with_backward)]
    cells = [str(processes) if processes > 0 else "set_attention"]
    cells += [f"{time:.1f}" for time in milliseconds]
    if processes > 0:
        output = attend(None, key, value, reference, iterations=sizes.iterations, check=False)
        steps = (
            lambda: attend(None, key, value, reference, iterations=sizes.iterations, check=False),
            lambda: torch.autograd.grad(output.sum(), (key, value)),
        )
        for step, formula in zip(steps, bytes_sent(sizes, ranks), strict=True):
            counted, loopback = _bytes_of(step)
            cells += [f"{counted:,}", f"{formula:,}", f"{loopback // ranks:,}"]
    else:
        cells += ["0", "", ""] * 2
    if rank == 0:
        print("|", " | ".join(cells), "|", flush=True)
    dist.destroy_process_group()


def _median(step: Callable[[], object], rounds: int) -> float:
    """Milliseconds of the slowest rank."""
    taken = []
    for _ in range(rounds + 1):
        dist.barrier()
        start = time.perf_counter()
        step()
        slowest = torch.tensor(time.perf_counter() - start)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        taken.append(slowest.item() * 1e3)
    return statistics.median(taken[1:])


def _bytes_of(step: Callable[[], object]) -> tuple[int, int]:
    """Handed over by this rank for others, and seen on the loopback device of all ranks."""
    dist.barrier()
    counted, before = Ranks.bytes_sent, _loopback()
    step()
    dist.barrier()
    return Ranks.bytes_sent - counted, _loopback() - before


def _loopback() -> int:
    """Bytes that were sent over the loopback device so far."""
    lines = Path("/proc/net/dev").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[9]) for line in lines if line.strip().startswith("lo:"))


if __name__ == "__main__":
    main()
