"""A step of whole models of about equal multiply-adds: our backbone and what it stands beside.

    python benchmarks/vision/model_step.py [--size small] [--image-size 224] [--compile]

prints a line of Markdown for each model in float32: parameters, multiply-adds, milliseconds of a
forward pass and of a training step (forward, backward, AdamW), medians of interleaved rounds, and
then where the time of our training step goes. The peers are timm's Swin and other hierarchical
transformers, with attention in windows, in focal neighbourhoods and over channels (neighbourhood
attention itself has no compiled CPU kernel), and a convolutional network, with 2 to 8% more
multiply-adds at 224 x 224. Our backbone also runs with its norms fused, for inference, and with
``--softmax`` with softmax attention. ``--compile`` runs all of them through ``torch.compile``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.models.focalnet import FocalNet
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from setformer_ext.cli.timing import keep_memory
from setformer_ext.vision import fuse_norms

CLASSES = 1000
# timm's names and options of the peers of each size. Tiny ones exist of ConvNeXt alone: of the
# others these are the next larger ones, narrower and with other depths.
PEERS: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {
        "swin_tiny_patch4_window7_224": {
            "embed_dim": 64,
            "num_heads": (2, 4, 8, 16),
            "depths": (2, 2, 7, 2),
        },
        "focalnet_tiny_srf": {"embed_dim": 68, "depths": (2, 2, 6, 2)},
        "davit_tiny": {
            "embed_dims": (64, 128, 256, 512),
            "num_heads": (2, 4, 8, 16),
            "depths": (1, 1, 4, 1),
        },
        "convnext_nano": {"dims": (76, 152, 304, 608)},
    },
    "small": {
        "swin_tiny_patch4_window7_224": {},
        "focalnet_tiny_srf": {},
        "davit_tiny": {},
        "convnext_tiny": {},
    },
    "base": {
        "swin_small_patch4_window7_224": {},
        "focalnet_small_srf": {},
        "davit_small": {},
        "convnext_small": {},
    },
}
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
    parser.add_argument("--size", choices=PEERS, default="small")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--compile", action="store_true", help="by torch.compile")
    parser.add_argument("--softmax", action="store_true", help="also with softmax attention")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    keep_memory()
    torch.set_num_threads(options.threads)
    sides = (options.image_size, options.image_size)
    images = torch.randn(options.batch_size, 3, *sides, generator=torch.manual_seed(0))
    labels = torch.arange(options.batch_size) % CLASSES
    ours = f"setformer_{options.size}"
    models = build_models(ours, options.size, options.image_size, options.softmax)
    fused = f"{ours}, norms fused"
    models[fused] = fuse_norms(models[ours].eval())
    steps: dict[str, tuple[Callable[[], object], ...]] = {}
    for name, model in models.items():
        if options.compile:
            model.compile()
        steps[name] = (forward_step(model, images),)
        if name != fused:
            steps[name] += (training_step(model, images, labels),)
    times = take_times(steps, options.rounds)
    print(
        f"{options.batch_size} images of {sides[0]} x {sides[1]}, {options.threads} threads"
        f"{', compiled' if options.compile else ''}\n\n"
        "| model | parameters, M | multiply-adds, G | forward, ms | training step, ms |\n"
        "| --- | --: | --: | --: | --: |"
    )
    reference = [statistics.median(taken) for taken in times[ours]]
    for name, model in models.items():
        parameters = sum(x.numel() for x in model.parameters()) / 1e6
        medians = [statistics.median(taken) for taken in times[name]]
        cells = [f"{t:.0f} ({t / o:.2f})" for t, o in zip(medians, reference, strict=False)]
        cells += [""] * (len(reference) - len(cells))
        print(
            f"| {name} | {parameters:.1f} | {multiply_adds(model, images):.1f} "
            f"| {' | '.join(cells)} |"
        )
    if not options.compile:
        print("\n" + "\n".join(shares(ours, steps[ours][1])))


def build_models(ours: str, size: str, image_size: int, softmax: bool) -> dict[str, nn.Module]:
    """Our backbone and its peers by the names of timm."""
    models = {ours: timm.create_model(ours, num_classes=CLASSES)}
    if softmax:
        models[f"{ours}, softmax attention"] = timm.create_model(
            ours, num_classes=CLASSES, attention="softmax"
        )
    for name, settings in PEERS[size].items():
        if name.startswith("focalnet") and settings:  # timm's function takes neither option
            models[name] = FocalNet(num_classes=CLASSES, **settings)
        else:
            sizes = {"img_size": image_size} if name.startswith("swin") else {}
            models[name] = timm.create_model(name, num_classes=CLASSES, **settings, **sizes)
    return models


def take_times(
    steps: dict[str, tuple[Callable[[], object], ...]], rounds: int
) -> dict[str, tuple[list[float], ...]]:
    """Milliseconds of each step in each round, the models in turn."""
    times: dict[str, tuple[list[float], ...]] = {
        name: tuple([] for _ in of_model) for name, of_model in steps.items()
    }
    for turn in range(rounds + 1):
        for name, of_model in steps.items():
            for step, taken in zip(of_model, times[name], strict=True):
                start = time.perf_counter()
                step()
                if turn > 0:  # the first also allocates and compiles
                    taken.append(1e3 * (time.perf_counter() - start))
    return times


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
        model.eval().forward(images[:1])  # not the compiled call, which is not counted
    return counter.get_total_flops() / 2e9


def shares(ours: str, step: Callable[[], object]) -> list[str]:
    """Which kinds of operators take the time of a step, the largest first."""
    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    taken: dict[str, float] = {}
    for event in profiler.key_averages():
        kind = next((k for prefix, k in KINDS.items() if event.key.startswith(prefix)), "others")
        taken[kind] = taken.get(kind, 0.0) + event.self_cpu_time_total
    total = sum(taken.values())
    lines = [f"| where {ours}'s training step spends its time | |", "| --- | --: |"]
    for kind, time_of_kind in sorted(taken.items(), key=lambda item: -item[1]):
        lines.append(f"| {kind} | {time_of_kind / total:.0%} |")
    return lines


if __name__ == "__main__":
    main()
