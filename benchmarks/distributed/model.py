"""Very long sequences on many GPUs, on paper: not measured on a GPU.

    python benchmarks/distributed/model.py

bfloat16, H = 16, D = Dv = 64, M = 128, T = 5, H200s eight to a node. Kernels: the model of
benchmarks/cuda/model.py for a rank's tokens. Messages: bytes by formula.py at what the links carry,
and a latency for each time that ranks wait for each other. What ring attention would send is beside
it: every rank's keys and values past all others, forward.

NVLink: 450 GB/s from each GPU ("NVIDIA H100 Tensor Core GPU Architecture", 900 GB/s both ways).
InfiniBand: NDR, 400 Gb/s = 50 GB/s a GPU. Latencies are assumptions: 10 microseconds for an
all-to-all within a node, 20 and half a microsecond a peer between nodes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "cuda"))

import model as kernels
from devices import H200
from formula import Sizes, bytes_sent, messages
from layout import Problem

HEADS, DEPTH, REFERENCES, STEPS = 16, 64, 128, 5
NODE = 8  # GPUs
NVLINK, INFINIBAND = 450e9, 50e9  # bytes a second from each GPU


def network(count: int, sent: int, ranks: int) -> float:
    """Seconds of so many messages with so many bytes in all."""
    if ranks <= NODE:
        return count * 10e-6 + sent / NVLINK
    return count * (20e-6 + 0.5e-6 * (ranks - 1)) + sent / INFINIBAND


def main() -> None:
    """Prints the table."""
    print("Counted, not measured on a GPU. Milliseconds.\n")
    print(
        "| tokens | GPUs | forward, kernels | messages | sent, MB | backward, kernels | messages "
        "| sent, MB | ring attention sends, MB | keys, values and output of a GPU, MB |"
    )
    print("| --: |" + " --: |" * 9)
    for tokens in (10**6, 10**7, 10**8):
        for ranks in (8, 64, 512):
            sizes = Sizes(HEADS, tokens, REFERENCES, DEPTH, STEPS)
            p = Problem(1, HEADS, tokens // ranks, DEPTH, REFERENCES)
            cells = [f"{tokens:.0e}".replace("e+0", "e"), str(ranks)]
            for launches, count, sent in zip(
                (kernels.forward(p), kernels.backward(p)),
                messages(sizes),
                bytes_sent(sizes, ranks, on_cuda=True),
                strict=True,
            ):
                cells.append(f"{kernels.total(launches, H200) * 1e3:.2f}")
                cells.append(f"{network(count, sent, ranks) * 1e3:.2f}")
                cells.append(f"{sent / 1e6:.2f}")
            rows = tokens // ranks * HEADS * DEPTH * 2  # bytes of a rank's keys
            cells += [f"{2 * rows * (ranks - 1) / 1e6:,.0f}", f"{3 * rows / 1e6:,.0f}"]
            print("|", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
