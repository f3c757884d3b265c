"""The demo's pictures: how the trainings went, and what the references draw their mass from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor

from .data import Images
from .model import GRID, Classifier
from .train import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Bright on black, and told apart also by people who see no red or no green.
COLOURS = ["#56b4e9", "#e69f00", "#2ee6a0", "#f0e442", "#ff6ec7", "#d55e00", "#9d8cff", "#ffffff"]
CURVE_COLOURS = ["#d1495b", "#30638e"]
SHOWN_REFERENCES = len(COLOURS)
SHOWN_IMAGES = 10


def draw_curves(histories: dict[str, History], source: str, path: Path) -> None:
    """Training loss and test accuracy of each network against the step."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    for (name, history), colour in zip(histories.items(), CURVE_COLOURS, strict=False):
        steps = np.arange(1, len(history.losses) + 1)
        loss_axes.plot(steps, history.losses, color=colour, alpha=0.2, linewidth=0.8)
        loss_axes.plot(steps, _smooth(history.losses), color=colour, label=name)
        accuracy_axes.plot(
            history.tested_at,
            history.accuracies,
            color=colour,
            marker="o",
            markersize=3,
            label=f"{name}: {history.accuracy:.1%} at the end",
        )
    loss_axes.set(title="Training loss, smoothed", xlabel="step", ylabel="cross-entropy")
    accuracy_axes.set(title="Test accuracy", xlabel="step", ylabel="share of images right")
    accuracy_axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
    for axes in (loss_axes, accuracy_axes):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.suptitle(f"The same network with two kinds of attention, trained on {source}")
    figure.savefig(path, dpi=150)


def draw_plans(model: Classifier, images: Images, path: Path) -> None:
    """Which tokens each reference draws its mass from, for one test image of each class.

    Shows the head whose plan says most about its tokens: the one of the largest mutual information
    sum_ij P_ij log(P_ij / (a_i b_j)), which is 0 where every reference draws alike.
    """
    chosen = _one_of_each_class(images)
    pictures = images.test[chosen]
    depth, head, plan = _most_telling_head(model, pictures)  # plan [K, N, M]
    references = plan.sum((0, 1)).topk(min(SHOWN_REFERENCES, plan.shape[-1])).indices
    shares = plan / plan.sum(-1, keepdim=True)  # of token i's mass, the part that goes to j
    token_mass = _relative(plan.sum(-1))
    drawn = _relative(plan.mT / plan.sum(1).unsqueeze(-1))  # [K, M, N]
    colours = torch.tensor([to_rgb(colour) for colour in COLOURS[: len(references)]])

    titles = ["image", "all", *(f"reference {j}" for j in range(1, len(references) + 1))]
    rows, columns = len(chosen), len(titles)
    figure = Figure(figsize=(1.05 * columns, 1.05 * rows + 1), facecolor="black")
    grid = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(0.05, 0.01, 0.99, 1 - 1 / (1.05 * rows + 1), 0.05, 0.05)
    for row in range(rows):
        grey = pictures[row].mean(0)
        _show(grid[row][0], pictures[row].permute(1, 2, 0).expand(-1, -1, 3))
        grid[row][0].set_ylabel(images.classes[images.test_labels[chosen[row]]], color="white")
        mixture = shares[row][:, references] @ colours  # [N, 3]
        _show(grid[row][1], _glow(grey, token_mass[row], mixture))
        for column, reference in enumerate(references, start=2):
            colour = colours[column - 2].expand(len(mixture), 3)
            _show(grid[row][column], _glow(grey, drawn[row, reference], colour))
    for axes, title, shade in zip(grid[0], titles, ["white", "white", *COLOURS], strict=False):
        axes.set_title(title, color=shade, fontsize=9)
    figure.suptitle(
        "Which tokens each reference draws its mass from "
        f"(block {depth + 1}, head {head + 1}; bright = much; all = whose token it is)",
        color="white",
    )
    figure.savefig(path, dpi=150)


def _one_of_each_class(images: Images) -> Tensor:
    """Indices of the first test image of up to SHOWN_IMAGES classes."""
    labels = range(min(len(images.classes), SHOWN_IMAGES))
    return torch.stack([(images.test_labels == label).nonzero()[0, 0] for label in labels])


@torch.no_grad()
def _most_telling_head(model: Classifier, pictures: Tensor) -> tuple[int, int, Tensor]:
    """Block and head of the largest mutual information, and that head's plans [K, N, M]."""
    plans = torch.stack(
        [model.transport_plan(pictures, depth) for depth in range(len(model.blocks))]
    )  # [blocks, K, H, N, M]
    independent = plans.sum(-1, keepdim=True) * plans.sum(-2, keepdim=True)
    information = torch.xlogy(plans, plans / independent.clamp_min(1e-30)).sum((-1, -2)).mean(1)
    depth, head = divmod(int(information.argmax()), information.shape[1])
    return depth, head, plans[depth, :, head]


def _relative(x: Tensor) -> Tensor:  # [..., N], the largest becomes 1
    return x / x.amax(-1, keepdim=True)


def _glow(grey: Tensor, strength: Tensor, colour: Tensor) -> Tensor:  # [S, S], [N], [N, 3]
    """A dim grey image under coloured light, one strength and colour per token."""
    size = len(grey) // GRID[0]
    light = (strength.unsqueeze(-1) * colour).unflatten(0, GRID)
    light = light.repeat_interleave(size, 0).repeat_interleave(size, 1)
    return (0.35 * grey.unsqueeze(-1) + 0.9 * light).clamp(0, 1)


def _show(axes: Axes, picture: Tensor) -> None:  # [S, S, 3]
    axes.imshow(picture.numpy(), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color("#444444")


def _smooth(values: list[float]) -> np.ndarray:
    """Running mean over a twentieth of the training; at the start, over what there is."""
    window = max(1, len(values) // 20)
    sums = np.cumsum(np.concatenate([[0.0], values]))
    last = np.arange(1, len(values) + 1)
    first = np.maximum(0, last - window)
    return (sums[last] - sums[first]) / (last - first)
