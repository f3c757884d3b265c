"""Networks of equal cost on small images: trained alike, over several seeds, and compared.

What fashion_mnist.py and kinds.py share: the networks, the options of the command, the record of
runs, the table and the plot.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

import torch
from matplotlib.figure import Figure
from timm.models.convnext import ConvNeXt
from timm.models.focalnet import FocalNet
from timm.models.resnet import BasicBlock, ResNet
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from setformer_ext import SetAttention
from setformer_ext.cli.demo.data import Images
from setformer_ext.cli.demo.train import train
from setformer_ext.vision import Setformer

SIZE = 56  # of the images that networks get: the four stages have 196, 49, 16 and 4 tokens


def _resnet(in_chans: int, num_classes: int) -> ResNet:
    """Of basic blocks; the usual 7 x 7 stem would take half of all products on three channels."""
    stem = {"stem_width": 24} if in_chans == 1 else {"stem_type": "deep", "stem_width": 13}
    sizes = {"layers": [1, 2, 1, 1], "channels": (24, 48, 80, 160)}
    return ResNet(BasicBlock, in_chans=in_chans, num_classes=num_classes, **sizes, **stem)


OURS = partial(
    Setformer, dims=(32, 64, 96, 128), depths=(1, 2, 1, 1), num_references=(36, 36, 16, 4)
)


def _late(**sizes: int) -> Setformer:
    """Attention in the last two stages alone."""
    network = OURS(mlp_ratio=3.61, **sizes)
    for stage in network.stages[:2]:
        for block in stage.blocks:
            block.attends = False
            del block.attention, block.attention_norm
    return network


@torch.no_grad()
def _loud(**sizes: int) -> Setformer:
    """What attention adds to the tokens starts five times as large."""
    network = OURS(**sizes)
    for module in network.modules():
        if isinstance(module, SetAttention):
            module.projection.weight *= 5
    return network


COMPARED: dict[str, Callable[..., nn.Module]] = {
    "SeT": OURS,
    # Of the same parameters to 0.2 %, by the MLPs' width.
    "softmax": partial(OURS, attention="softmax", mlp_ratio=2.89),
    "mean": partial(OURS, attention="mean", mlp_ratio=4.3),
    "none": partial(OURS, attention="none", mlp_ratio=4.77),
    # Of the same parameters and multiply-adds to 5 %, by widths and depths.
    "ResNet": _resnet,
    "ConvNeXt": partial(ConvNeXt, dims=(40, 64, 96, 128), depths=(2, 2, 3, 1)),
    "FocalNet": partial(FocalNet, embed_dim=16, depths=(8, 6, 4, 1)),
    "Swin": partial(
        SwinTransformer, img_size=SIZE, embed_dim=16, depths=(4, 6, 4, 1), num_heads=(1, 2, 4, 8)
    ),
}
# The backbone with a single thing changed, to find what its accuracy depends on; of the same
# parameters to 0.2 %. Trained only when named.
STUDIED: dict[str, Callable[..., nn.Module]] = {
    "SeT-many": partial(OURS, num_references=(128, 49, 16, 4), mlp_ratio=2.86),
    "SeT-queries": partial(OURS, attention_options={"query_projection": True}, mlp_ratio=2.53),
    "SeT-late": _late,
    "SeT-loud": _loud,
}
NETWORKS = COMPARED | STUDIED


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


class Network(nn.Module):
    """A network on images in [0, 1], enlarged so that its four stages have something to do."""

    def __init__(self, name: str, channels: int, classes: int) -> None:
        super().__init__()
        self.network = NETWORKS[name](in_chans=channels, num_classes=classes)

    def forward(self, x: Tensor) -> Tensor:  # [B, channels, S, S] -> [B, classes]
        return self.network(F.interpolate(4 * x - 2, (SIZE, SIZE), mode="bilinear"))


def multiply_adds(name: str, channels: int, classes: int) -> int:
    """Of one image: half of torch's count, of products of matrices, convolutions and attention."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        Network(name, channels, classes).eval()(torch.empty(1, channels, SIZE, SIZE))
    return counter.get_total_flops() // 2


def command(program: str, steps: int, output: str) -> argparse.ArgumentParser:
    """What all these commands take.

    Args:
        program: its docstring.
        steps: the default length of a training.
        output: the default of the plot.
    """
    parser = argparse.ArgumentParser(description=program.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--quick", action="store_true", help="one seed, a minute: does it learn?")
    parser.add_argument("--validate", action="store_true", help="measure on what is kept to choose")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=steps, help="of 64 images each (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path(output), help="the plot")
    parser.add_argument("--results", type=Path, metavar="FILE.jsonl", help="keep each run here")
    return parser


def parse(parser: argparse.ArgumentParser, quick_steps: int) -> argparse.Namespace:
    """The options, with the names of networks checked and, if it is to be quick, few steps."""
    options = parser.parse_args()
    unknown = set(options.names) - set(NETWORKS)
    if unknown:
        parser.error(f"NAME must be of {', '.join(NETWORKS)}, got {', '.join(sorted(unknown))}")
    if options.quick:
        options.seeds, options.steps = 1, quick_steps
    options.names = options.names or list(COMPARED)[: 1 if options.quick else None]
    return options


def compare(images: Images, options: argparse.Namespace, quick_accuracy: float) -> int:
    """Train the networks, print the table and draw the plot; 1 if a quick one learned too little.

    Args:
        images: square images of one size.
        options: of :func:`parse`.
        quick_accuracy: that ``--quick`` asks for.
    """
    print(
        f"| network | {images.source} accuracy per seed | mean | spread | loss | parameters "
        "| multiply-adds, M | ms per step |\n| --- | --- | --: | --: | --: | --: | --: | --: |"
    )
    runs: dict[str, list[Run]] = {}
    for name in options.names:
        runs[name] = [
            _run(name, images, options.steps, seed, options.results)
            for seed in range(options.seeds)
        ]
        print(_row(name, runs[name]), flush=True)
    _plot(runs, images.source, options.output)
    print(f"\nPlot: {options.output}")
    if options.quick:
        worst = min(run.accuracy for of_name in runs.values() for run in of_name)
        if worst < quick_accuracy:
            print(f"an accuracy of {worst:.3f} is below {quick_accuracy}", file=sys.stderr)
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
    channels, classes = images.train.shape[1], len(images.classes)
    model, history = train(
        partial(Network, name, channels, classes),
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
        multiply_adds(name, channels, classes),
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


def _plot(runs: dict[str, list[Run]], source: str, path: Path) -> None:
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
        xlabel=f"{source} accuracy: each seed a dot, the mean a line",
    )
    axes.grid(alpha=0.25, axis="x")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
