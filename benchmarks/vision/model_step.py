"""A step of whole models of about equal multiply-adds: setformer_small and what it stands beside.

    python benchmarks/vision/model_step.py [--batch-size 8] [--rounds 5] [--threads 2]

prints a line of Markdown for each model, on images of 224 x 224 in float32: parameters,
multiply-adds, milliseconds of a forward pass and of a training step (forward, backward, AdamW),
medians of interleaved rounds, and then where the time of setformer_small's training step goes. The
peers are timm's Swin-T and other hierarchical transformers of its size, with attention in windows,
in focal neighbourhoods and over channels (neighbourhood attention itself has no compiled CPU
kernel), a convolutional network, and our backbone with softmax attention. Our backbone also runs
with its norms fused, for inference.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from setformer_ext.cli.timing import keep_memory
from setformer_ext.vision import fuse_norms

OURS = "setformer_small"
FUSED = f"{OURS}, norms fused"
PEERS = {
    OURS: {},
    "setformer_small, softmax attention": {"attention": "softmax"},
    "swin_tiny_patch4_window7_224": {},
    "focalnet_tiny_srf": {},
    "davit_tiny": {},
    "convnext_tiny": {},
}
CLASSES = 1000
# Operators of torch by what they are for; the first that an operator's name starts with.
KINDS = {
    "setformer_ext::": "SeT attention",
    "GeneratedBackwardFor_setformer_ext": "SeT attention",
    "aten::addmm": "linear layers",
    "aten::mm": "linear layers",
    "aten::bmm": "linear layers",
    "aten::mkldnn_convolution": "convolutions",
    "aten::convolution": "convolutions",
    "aten::_slow_conv": "convolutions",
    "aten::thnn_conv": "convolutions",
    "aten::native_layer_norm": "norms",
    "aten::native_batch_norm": "norms",
    "aten::gelu": "GELU",
    "aten::_fused_adam": "optimizer",
    "aten::copy_": "copies",
    "aten::add": "sums",
    "aten::sum": "sums",
    "aten::mul": "products by element",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    keep_memory()
    torch.set_num_threads(options.threads)
    images = torch.randn(options.batch_size, 3, 224, 224, generator=torch.manual_seed(0))
    labels = torch.arange(options.batch_size) % CLASSES
    models = {
        name: timm.create_model(name.partition(",")[0], num_classes=CLASSES, **settings)
        for name, settings in PEERS.items()
    }
    steps: dict[str, tuple[Callable[[], object], ...]] = {
        name: (forward_step(model, images), training_step(model, images, labels))
        for name, model in models.items()
    }
    models[FUSED] = fuse_norms(models[OURS].eval())
    steps[FUSED] = (forward_step(models[FUSED], images),)
    times: dict[str, tuple[list[float], ...]] = {
        name: tuple([] for _ in of_model) for name, of_model in steps.items()
    }
    for turn in range(options.rounds + 1):
        for name, of_model in steps.items():
            for step, taken in zip(of_model, times[name], strict=True):
                start = time.perf_counter()
                step()
                if turn > 0:  # the first also allocates
                    taken.append(1e3 * (time.perf_counter() - start))
    print(
        f"{options.batch_size} images, {options.threads} threads\n\n"
        "| model | parameters, M | multiply-adds, G | forward, ms | training step, ms |\n"
        "| --- | --: | --: | --: | --: |"
    )
    ours = [statistics.median(taken) for taken in times[OURS]]
    for name, model in models.items():
        parameters = sum(x.numel() for x in model.parameters()) / 1e6
        medians = [statistics.median(taken) for taken in times[name]]
        cells = [f"{t:.0f} ({t / o:.2f})" for t, o in zip(medians, ours, strict=False)]
        cells += [""] * (len(ours) - len(cells))
        print(
            f"| {name} | {parameters:.1f} | {multiply_adds(model, images):.1f} "
            f"| {' | '.join(cells)} |"
        )
    print("\n" + "\n".join(shares(steps[OURS][1])))


def forward_step(model: nn.Module, images: torch.Tensor) -> Callable[[], object]:
    """A forward pass as for prediction."""

    def run() -> None:
        model.eval()
        with torch.no_grad():
            model(images)

    return run


def training_step(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor
) -> Callable[[], object]:
    """A forward and backward pass and a step of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def run() -> None:
        model.train()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def multiply_adds(model: nn.Module, images: torch.Tensor) -> float:
    """Of one image, in billions: half of torch's count."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(images[:1])
    return counter.get_total_flops() / 2e9


def shares(step: Callable[[], object]) -> list[str]:
    """Which kinds of operators take the time of a step, the largest first."""
    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    taken: dict[str, float] = {}
    for event in profiler.key_averages():
        kind = next((k for prefix, k in KINDS.items() if event.key.startswith(prefix)), "others")
        taken[kind] = taken.get(kind, 0.0) + event.self_cpu_time_total
    total = sum(taken.values())
    lines = [f"| where {OURS}'s training step spends its time | |", "| --- | --: |"]
    for kind, time_of_kind in sorted(taken.items(), key=lambda item: -item[1]):
        lines.append(f"| {kind} | {time_of_kind / total:.0%} |")
    return lines


if __name__ == "__main__":
    main()
