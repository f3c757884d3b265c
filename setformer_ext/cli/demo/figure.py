"""The demo's pictures: how the trainings went, and what the references draw their mass from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, PercentFormatter, StrMethodFormatter
from torch import Tensor

from ..fonts import add_title, shortened
from ..themes import CHOICE, COLOURS, covering_references, mutual_information, resized, style
from .data import Images
from .lengths import LENGTHS
from .model import GRID, Classifier
from .train import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVE_COLOURS = ["#d1495b", "#30638e"]
SHOWN_REFERENCES = len(COLOURS)
SHOWN_IMAGES = 10
SHOWN_SIZE = (128, 128)  # pixels


def draw_curves(
    histories: dict[str, History], source: str, seconds: dict[str, list[float]], path: Path
) -> None:
    """Training loss and test accuracy of each network against the step, and the time of each
    attention against the number of tokens."""
    with style("light", [source]):
        figure = Figure(figsize=(14, 3.8), layout="constrained")
        loss_axes, accuracy_axes, time_axes = figure.subplots(1, 3)
        for (name, of_name), colour in zip(seconds.items(), CURVE_COLOURS, strict=True):
            milliseconds = [1e3 * each for each in of_name]
            time_axes.loglog(
                LENGTHS[: len(of_name)], milliseconds, color=colour, marker="o", label=name
            )
        time_axes.set(
            title="Attention alone, forward and backward",
            xlabel="tokens",
            ylabel="milliseconds",
            xticks=LENGTHS,
            xticklabels=[f"{length:,}" for length in LENGTHS],
        )
        time_axes.minorticks_off()
        # Ticks say 100, not 10^2: no text is read as mathematics, because class names may hold "$".
        time_axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        time_axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
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
        loss_axes.set(
            title="Training loss, running mean",
            xlabel="step",
            ylabel="cross-entropy (labels smoothed by 0.1)",
        )
        accuracy_axes.set(title="Test accuracy", xlabel="step", ylabel="share of images right")
        accuracy_axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        for axes in (loss_axes, accuracy_axes, time_axes):
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False)
        add_title(figure, f"The same network with two kinds of attention, trained on {source}", 12)
        figure.savefig(path, dpi=150)


def draw_plans(model: Classifier, images: Images, path: Path) -> None:
    """Which tokens each reference draws its mass from, for one test image of each class.

    Shows the head whose plan says most about its tokens, by mutual information.
    """
    chosen = _one_of_each_class(images)
    pictures = images.test[chosen]
    depth, head, plan = _most_telling_head(model, pictures)  # plan [K, N, M]
    drawn = plan.mT / plan.sum(1).unsqueeze(-1)  # [K, M, N], the weights of collect
    references = _from_top_to_bottom(
        covering_references(plan.flatten(0, 1), SHOWN_REFERENCES), drawn.mean(0)
    )
    shares = plan / plan.sum(-1, keepdim=True)  # of token i's mass, the part that goes to j
    colours = torch.tensor([to_rgb(colour) for colour in COLOURS[: len(references)]])

    titles = ["image", "all", *(f"reference {j}" for j in range(1, len(references) + 1))]
    names = [images.classes[label] for label in images.test_labels[chosen].tolist()]
    rows, columns = len(chosen), len(titles)
    with style("dark", names) as theme:
        figure = Figure(figsize=(1.05 * columns, 1.05 * rows + 0.6), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for row in range(rows):
            picture = resized(pictures[row], SHOWN_SIZE, "bicubic").expand(-1, -1, 3)
            grey = picture.mean(-1, keepdim=True)
            mixture = shares[row][:, references] @ colours  # [N, 3]
            _show(grid[row][0], picture)
            _show(grid[row][1], _glow(grey, plan[row].sum(-1), mixture))
            for axes, reference, colour in zip(grid[row][2:], references, colours, strict=True):
                _show(axes, _glow(grey, drawn[row, reference], colour.expand_as(mixture)))
            grid[row][0].set_ylabel(shortened(names[row], 10, 1.0), fontsize=10)
        for axes, title, shade in zip(grid[0], titles, [theme.text] * 2 + COLOURS, strict=False):
            axes.set_title(title, color=shade, fontsize=9)
        add_title(
            figure,
            "Which tokens each reference draws its mass from",
            15,
            f"{len(references)} of {plan.shape[-1]} references of block {depth + 1}, head "
            f"{head + 1}: {CHOICE}. Bright: draws much. All: every token in the colours of those "
            "that draw from it.",
        )
        figure.savefig(path, dpi=150)


def _from_top_to_bottom(references: list[int], drawn: Tensor) -> Tensor:  # drawn [M, N]
    """The references ordered by the mean row that they draw from."""
    chosen = torch.tensor(references)
    row = torch.arange(drawn.shape[-1]) // GRID[1]
    return chosen[(drawn[chosen] @ row.to(drawn.dtype)).argsort()]


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
    information = mutual_information(plans).mean(1)
    depth, head = divmod(int(information.argmax()), information.shape[1])
    return depth, head, plans[depth, :, head]


def _glow(grey: Tensor, strength: Tensor, colour: Tensor) -> Tensor:  # [S, S, 1], [N], [N, 3]
    """A dim grey image under coloured light, with a strength and a colour for each token."""
    light = (strength / strength.max()).unsqueeze(-1) * colour
    return 0.35 * grey + 0.9 * resized(light.mT.unflatten(1, GRID), SHOWN_SIZE, "nearest")


def _show(axes: Axes, picture: Tensor) -> None:  # [S, S, 3]
    axes.imshow(picture.clamp(0, 1).numpy())
    axes.set(xticks=[], yticks=[])


def _smooth(values: list[float]) -> np.ndarray:
    """Running mean over a twentieth of the training; at the start, over the steps so far."""
    window = max(1, len(values) // 20)
    sums = np.cumsum(np.concatenate([[0.0], values]))
    last = np.arange(1, len(values) + 1)
    first = np.maximum(0, last - window)
    return (sums[last] - sums[first]) / (last - first)
