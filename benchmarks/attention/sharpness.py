"""How many tokens a reference gathers, by epsilon, bandwidth, references and depth.

    python benchmarks/attention/sharpness.py [--picture docs/sharpness.png]

The effective number of tokens is exp of the entropy of collect's weights C_ij over the tokens i,
the mean of all references: N where a reference gathers the plain mean, 1 where it gathers a token.
Keys and references are random of unit length, 196 tokens; those of a trained model are clustered,
and its plans sharper.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from setformer_ext import transport_plan

TOKENS, HEADS = 196, 8
EPSILONS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
DEFAULTS: dict[str, Any] = {
    "D": 32,
    "M": 16,
    "bandwidth": 1.0,
    "kernel": "gaussian",
    "iterations": 5,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "bandwidth 1, D = 32, M = 16, T = 5": {},
    "bandwidth 0.5": {"bandwidth": 0.5},
    "bandwidth 0.25": {"bandwidth": 0.25},
    "bandwidth 2": {"bandwidth": 2.0},
    "linear kernel": {"kernel": "linear"},
    "D = 8": {"D": 8},
    "D = 128": {"D": 128},
    "M = 4": {"M": 4},
    "M = 128": {"M": 128},
    "T = 0": {"iterations": 0},
    "T = 100": {"iterations": 100},
}


def effective_tokens(epsilon: float, D: int, M: int, **options: Any) -> float:
    """exp of the entropy of collect's weights, the mean over references and heads."""
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(1, HEADS, TOKENS, D, generator=generator, dtype=torch.float64)
    reference = torch.randn(HEADS, M, D, generator=generator, dtype=torch.float64)
    plan = transport_plan(key, reference, epsilon=epsilon, **options)
    weights = plan / plan.sum(2, keepdim=True)  # [B, H, N, M]
    return float(torch.special.entr(weights).sum(2).exp().mean())


def draw(rows: dict[str, list[float]], path: Path) -> None:
    """Effective tokens against epsilon, a line for each variant."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, (name, row) in enumerate(rows.items()):
        style = {"color": "black", "lw": 2.5} if index == 0 else {"lw": 1.2}
        axes.loglog(EPSILONS, row, marker="o", ms=3, label=name, **style)
    axes.axhline(TOKENS, color="grey", ls=":", lw=1)
    axes.set(
        xlabel="epsilon",
        ylabel=f"tokens that a reference gathers, of {TOKENS}",
    )
    axes.set_xticks(EPSILONS, [f"{epsilon:g}" for epsilon in EPSILONS])
    axes.set_yticks(
        [1, 2, 5, 10, 20, 50, 100, 196], ["1", "2", "5", "10", "20", "50", "100", "196"]
    )
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.suptitle("A small epsilon makes a plan sharp; a small bandwidth does not", fontsize=11)
    figure.legend(loc="outside right center", fontsize="small", frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Prints the table, and draws it where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--picture", type=Path, help="draw the table there")
    options = parser.parse_args()
    print("| | " + " | ".join(f"epsilon {epsilon:g}" for epsilon in EPSILONS) + " |")
    print("| --- |" + " --: |" * len(EPSILONS))
    rows = {}
    for name, changes in VARIANTS.items():
        rows[name] = [effective_tokens(epsilon, **DEFAULTS | changes) for epsilon in EPSILONS]
        print(f"| {name} | " + " | ".join(f"{tokens:.1f}" for tokens in rows[name]) + " |")
    if options.picture is not None:
        draw(rows, options.picture)


if __name__ == "__main__":
    main()
