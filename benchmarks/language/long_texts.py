"""Time and memory of the language encoder on long texts, with SeT and with softmax attention.

    python benchmarks/language/long_texts.py [--lengths 512 2048 ...] [--size mini]

prints a line of Markdown for each length: milliseconds of a forward pass and of forward and
backward, and the peak memory of the latter beyond what the process has before. The same encoder is
measured with SeT attention and with torch's F.scaled_dot_product_attention, each case in a process
of its own, as the medians of interleaved repetitions.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from statistics import median

import torch

from setformer_ext.language import SIZES, SetformerConfig, SetformerModel

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens N")
    parser.add_argument("--size", choices=tuple(SIZES), default="mini")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", nargs=2, metavar=("ATTENTION", "N"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case[0], int(options.case[1]), options.size)))
        return 0
    print(
        f"{options.size}, one text, {torch.get_num_threads()} threads\n\n"
        "| tokens | forward, ms: SeT | softmax | and backward, ms: SeT | softmax "
        "| memory, MiB: SeT | softmax |\n|" + " --: |" * 7
    )
    for length in options.lengths:
        found: dict[str, list[tuple[float, float, float]]] = {"set": [], "softmax": []}
        for _ in range(options.rounds):
            for attention, results in found.items():
                results.append(run_case(attention, length, options.size))
        cells = [
            f"{median(values):,.0f}"
            for pair in zip(
                *(zip(*results, strict=True) for results in found.values()), strict=True
            )
            for values in pair
        ]
        print(f"| {length:,} | {' | '.join(cells)} |", flush=True)
    return 0


def run_case(attention: str, length: int, size: str) -> tuple[float, float, float]:
    command = [sys.executable, __file__, f"--size={size}", "--case", attention, str(length)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8")
    return tuple(json.loads(answer.stdout))


def measure(attention: str, length: int, size: str) -> tuple[float, float, float]:
    """Milliseconds forward, and forward and backward, and MiB."""
    torch.manual_seed(0)
    model = SetformerModel(SetformerConfig(**SIZES[size], attention=attention)).eval()
    tokens = torch.randint(1, model.config.vocab_size, (1, length))
    model(tokens[:, :64]).last_hidden_state.sum().backward()  # gradients are there, code is loaded
    before = _peak()
    start = time.perf_counter()
    with torch.no_grad():
        model(tokens)
    forward = time.perf_counter()
    model(tokens).last_hidden_state.sum().backward()
    end = time.perf_counter()
    return 1e3 * (forward - start), 1e3 * (end - forward), _peak() - before


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    sys.exit(main())
