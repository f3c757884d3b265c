"""The vision backbone beside other networks, and with other attentions, on Fashion-MNIST.

    python benchmarks/vision/fashion_mnist.py [--quick] [--validate] [NAME ...]

trains small networks on the same images in the same order, over several seeds: the backbone with
SeT, with softmax attention, with the mean of all tokens and without attention, of equal parameters;
and timm's ResNet (of basic blocks), ConvNeXt, FocalNet and Swin, of equal parameters and
multiply-adds, to 5 %. The backbone's convolutions do well without attention; what needs attention
is in benchmarks/evidence. Prints a line of Markdown for each: the accuracy of every seed, their
mean and spread, the mean training loss of the last 50 steps, parameters, multiply-adds of an image
and time. A plot goes to ``--output``, and every run to ``--results``, from where it is taken the
next time.

``--validate`` holds out the last 5,000 training images and measures on these: for choices.
``--quick`` takes one seed, the first and a minute, and fails if it learns too little.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch
from matplotlib.figure import Figure
from timm.models.convnext import ConvNeXt
from timm.models.focalnet import FocalNet
from timm.models.resnet import BasicBlock, ResNet
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from setformer_ext.cli.demo.data import Images
from setformer_ext.cli.demo.train import train
from setformer_ext.vision import Setformer

CLASSES = [str(label) for label in range(10)]
SIZE = 56  # twice the images' own: the four stages then have 196, 49, 16 and 4 tokens
QUICK_STEPS = 150
QUICK_ACCURACY = 0.6  # that --quick asks for; a guess has 0.1
VALIDATION = 5000  # images
FOLDER = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
OURS = partial(
    Setformer, dims=(32, 64, 96, 128), depths=(1, 2, 1, 1), num_references=(36, 36, 16, 4)
)
COMPARED: dict[str, Callable[..., nn.Module]] = {
    "SeT": OURS,
    # Of the same parameters to 0.2 %, by the MLPs' width.
    "softmax": partial(OURS, attention="softmax", mlp_ratio=2.89),
    "mean": partial(OURS, attention="mean", mlp_ratio=4.3),
    "none": partial(OURS, attention="none", mlp_ratio=4.77),
    # Of the same parameters and multiply-adds to 5 %, by widths and depths.
    "ResNet": partial(ResNet, BasicBlock, [1, 2, 1, 1], channels=(24, 48, 80, 160), stem_width=24),
    "ConvNeXt": partial(ConvNeXt, dims=(40, 64, 96, 128), depths=(2, 2, 3, 1)),
    "FocalNet": partial(FocalNet, embed_dim=16, depths=(8, 6, 4, 1)),
    "Swin": partial(
        SwinTransformer, img_size=SIZE, embed_dim=16, depths=(4, 6, 4, 1), num_heads=(1, 2, 4, 8)
    ),
}


@dataclass
class Run:
    """One training, and what came out."""

    name: str
    data: str  # that it was measured on
    steps: int
    seed: int
    accuracy: float
    loss: float  # of the last 50 steps
    parameters: int
    multiply_adds: int  # of an image
    milliseconds_per_step: float


def load(folder: Path) -> Images:
    """The images, [N, 1, 28, 28]."""

    def read(name: str, offset: int) -> np.ndarray:
        return np.frombuffer(gzip.decompress((folder / name).read_bytes()), np.uint8, offset=offset)

    def pair(name: str) -> tuple[Tensor, Tensor]:
        images = torch.tensor(read(f"{name}-images-idx3-ubyte.gz", 16)).view(-1, 1, 28, 28)
        return images.float() / 255, torch.tensor(read(f"{name}-labels-idx1-ubyte.gz", 8)).long()

    return Images(*pair("train"), *pair("t10k"), CLASSES, "test")


def hold_out(images: Images) -> Images:
    """The last training images in place of the test's."""
    x, labels = images.train, images.train_labels
    kept, held = slice(-VALIDATION), slice(-VALIDATION, None)
    return Images(x[kept], labels[kept], x[held], labels[held], CLASSES, "validation")


class Network(nn.Module):
    """A network on images in [0, 1], enlarged so that its four stages have something to do."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.network = COMPARED[name](in_chans=1, num_classes=len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:  # [B, 1, 28, 28] -> [B, 10]
        return self.network(F.interpolate(4 * x - 2, (SIZE, SIZE), mode="bilinear"))


def multiply_adds(name: str) -> int:
    """Of one image: half of torch's count, of products of matrices, convolutions and attention."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        Network(name).eval()(torch.empty(1, 1, 28, 28))
    return counter.get_total_flops() // 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(COMPARED)}")
    parser.add_argument("--quick", action="store_true", help="one seed, a minute: does it learn?")
    parser.add_argument("--validate", action="store_true", help="measure on held-out images")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000, help="of 64 images each")
    parser.add_argument("--data", type=Path, default=FOLDER, help="folder of the four .gz files")
    parser.add_argument("--output", type=Path, default=Path("fashion_mnist.png"), help="the plot")
    parser.add_argument("--results", type=Path, metavar="FILE.jsonl", help="keep each run here")
    options = parser.parse_args()
    unknown = set(options.names) - set(COMPARED)
    if unknown:
        parser.error(f"NAME must be of {', '.join(COMPARED)}, got {', '.join(sorted(unknown))}")
    if not options.data.is_dir():
        parser.error(
            f"--data: {options.data} is no folder; install Debian's package dataset-fashion-mnist, "
            "or name a folder with the four gzipped files of the data set"
        )
    if options.quick:
        options.seeds, options.steps = 1, QUICK_STEPS
    names = options.names or list(COMPARED)[: 1 if options.quick else None]
    images = load(options.data)
    if options.validate:
        images = hold_out(images)
    print(
        f"| network | {images.source} accuracy per seed | mean | spread | loss | parameters "
        "| multiply-adds, M | ms per step |\n| --- | --- | --: | --: | --: | --: | --: | --: |"
    )
    runs: dict[str, list[Run]] = {}
    for name in names:
        runs[name] = [
            _run(name, images, options.steps, seed, options.results)
            for seed in range(options.seeds)
        ]
        print(_row(name, runs[name]), flush=True)
    _plot(runs, options.output)
    print(f"\nPlot: {options.output}")
    if options.quick:
        worst = min(run.accuracy for of_name in runs.values() for run in of_name)
        if worst < QUICK_ACCURACY:
            print(f"an accuracy of {worst:.3f} is below {QUICK_ACCURACY}", file=sys.stderr)
            return 1
    return 0


def _run(name: str, images: Images, steps: int, seed: int, results: Path | None) -> Run:
    """Train and test, or take what an earlier call has left in the file."""
    made = (
        []
        if results is None or not results.exists()
        else results.read_text(encoding="utf-8").splitlines()
    )
    for run in (Run(**json.loads(line)) for line in made):
        if (run.name, run.data, run.steps, run.seed) == (name, images.source, steps, seed):
            return run
    model, history = train(
        partial(Network, name),
        images,
        steps=steps,
        seed=seed,
        description=f"{name}, seed {seed}",
        tests=1,
    )
    run = Run(
        name,
        images.source,
        steps,
        seed,
        history.accuracy,
        fmean(history.losses[-50:]),
        sum(p.numel() for p in model.parameters()),
        multiply_adds(name),
        history.milliseconds_per_step,
    )
    if results is not None:
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(run)) + "\n")
    return run


def _row(name: str, runs: list[Run]) -> str:
    accuracies = [run.accuracy for run in runs]
    each = " ".join(f"{accuracy:.4f}" for accuracy in accuracies)
    spread = stdev(accuracies) if len(accuracies) > 1 else float("nan")
    loss = fmean(run.loss for run in runs)
    time = fmean(run.milliseconds_per_step for run in runs)
    return (
        f"| {name} | {each} | {fmean(accuracies):.4f} | {spread:.4f} | {loss:.4f} "
        f"| {runs[0].parameters:,} | {runs[0].multiply_adds / 1e6:.1f} | {time:.0f} |"
    )


def _plot(runs: dict[str, list[Run]], path: Path) -> None:
    """Each seed a dot, each mean a line, in the order of the means."""
    order = sorted(runs, key=lambda name: fmean(run.accuracy for run in runs[name]))
    figure = Figure(figsize=(8, 1.2 + 0.35 * len(order)), layout="constrained")
    axes = figure.subplots()
    for row, name in enumerate(order):
        accuracies = [run.accuracy for run in runs[name]]
        colour = "#d1495b" if name == "SeT" else "#30638e"
        axes.plot(accuracies, [row] * len(accuracies), "o", color=colour, alpha=0.6)
        axes.plot([fmean(accuracies)] * 2, [row - 0.3, row + 0.3], color=colour, linewidth=2)
    axes.set(
        yticks=range(len(order)),
        yticklabels=order,
        xlabel="accuracy on Fashion-MNIST: each seed a dot, the mean a line",
    )
    axes.grid(alpha=0.25, axis="x")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
