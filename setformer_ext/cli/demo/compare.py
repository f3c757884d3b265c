"""The comparison itself: train the same network with both attentions and report."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

from torch import nn

from ...controls import SoftmaxAttention
from . import lengths
from .data import load_digits, load_folder
from .figure import draw_curves, draw_plans
from .model import Classifier, make_set_attention
from .train import History, train

ATTENTIONS: dict[str, Callable[[int, int], nn.Module]] = {
    "SeT": make_set_attention,
    "softmax": SoftmaxAttention,
}


def compare(options: argparse.Namespace) -> None:
    """Train, print a table and write ``curves.png`` and ``references.png`` into ``--output``.

    Raises:
        UserError: if ``--data`` cannot be learned from.
        OSError: if the output cannot be written.
    """
    output, size, seed = options.output, options.image_size, options.seed
    if options.data is None:
        images = load_digits(size, seed)
    else:
        images = load_folder(options.data, size, seed, options.max_pixels)
    output.mkdir(parents=True, exist_ok=True)
    print(
        f"{images.source}: {len(images.train)} images to train on, {len(images.test)} to test, "
        f"{len(images.classes)} classes, {size} x {size}"
    )
    models, histories = {}, {}
    sizes = (images.train.shape[1], size, len(images.classes))
    for name, make_attention in ATTENTIONS.items():
        make_model = partial(Classifier, *sizes, make_attention)
        models[name], histories[name] = train(
            make_model, images, steps=options.steps, seed=seed, description=f"{name:>7}"
        )
    print(_table(models, histories))
    seconds = lengths.measure()
    print(f"\nattention alone, forward and backward:\n{lengths.table(seconds)}")
    draw_curves(histories, images.source, seconds, output / "curves.png")
    draw_plans(models["SeT"], images, output / "references.png")
    print(f"\nPictures of the training and of what the references look at: {output.resolve()}")


def _table(models: dict[str, Classifier], histories: dict[str, History]) -> str:
    lines = ["", f"{'attention':<10}{'test accuracy':>15}{'parameters':>12}{'ms per step':>13}"]
    for name, history in histories.items():
        parameters = sum(p.numel() for p in models[name].parameters())
        lines.append(
            f"{name:<10}{history.accuracy:>15.1%}{parameters:>12,}"
            f"{history.milliseconds_per_step:>13.1f}"
        )
    return "\n".join(lines)
