"""The picture of a layer's references over the image."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from ..pictures import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = ("png", "pdf", "svg", "jpg", "webp", "tiff")
COLUMNS = 5
PANEL = (2.4, 3.2)  # inches, the largest width and height of an image
TITLE, HEADER = 0.32, 1.0  # inches over each panel, and over all of them
RESOLUTION = 480  # pixels of an image's longer side
REST = "#3a3a3a"  # tokens that give most to a reference that is not shown


def draw_references(
    image: Tensor,  # [3, height, width] in [0, 1]
    plan: Tensor,  # [N, M], of one head
    grid: tuple[int, int],
    layer: str,
    path: Path,
) -> None:
    """The references of largest mass, each over the tokens that it draws from.

    The panel before them shows every token in the colour of the reference that it gives most to.

    Args:
        image: what the network saw.
        plan: mass from token i to reference j.
        grid: rows and columns of the tokens.
        layer: names the layer in the title.
        path: of the picture, with one of SUFFIXES.
    """
    longer = max(image.shape[1:])
    size = tuple(max(1, round(RESOLUTION * side / longer)) for side in image.shape[1:])
    image = _resize(image, size, "bicubic")
    mass = plan.sum(0) / plan.sum()  # [M]
    shown = mass.argsort(descending=True, stable=True)[: len(COLOURS)].tolist()
    colours = {j: torch.tensor(to_rgb(colour)) for j, colour in zip(shown, COLOURS, strict=False)}
    rest = torch.tensor(to_rgb(REST))
    of_token = torch.stack([colours.get(j, rest) for j in plan.argmax(1).tolist()])  # [N, 3]

    figure, panels = _panels(len(shown) + 2, size[0] / size[1])
    grey = image.mean(-1, keepdim=True)
    tint = _resize(of_token.mT.unflatten(1, grid), size, "nearest")
    _show(panels[0], image, "what the network sees")
    _show(panels[1], tint * (0.5 + 0.5 * grey), "where each token gives most")
    for axes, j, name in zip(panels[2:], shown, COLOURS, strict=False):
        light = _light(plan[:, j]).unflatten(0, grid)
        glow = 0.85 * _resize(light.unsqueeze(0), size, "nearest") * colours[j]
        title = f"reference {j + 1}: {mass[j]:.0%} of the mass"
        _show(axes, 0.25 * grey + glow, title, name)
    note = "Bright: the reference draws much from there."
    if len(shown) < len(mass):
        note += " Dark grey: tokens that give most to a reference that is not shown."
    which = f"{len(shown)} of {len(mass)} references, those of largest mass"
    _head(figure, f"{layer}: {which}", note)
    figure.savefig(path, dpi=150)


def _light(drawn: Tensor) -> Tensor:  # [N] -> [N]
    """In [0, 1]; a few tokens that give many times what others do shall not leave those dark."""
    brightest = torch.maximum(drawn.quantile(0.99), drawn.max() / 4)
    return (drawn / brightest).clamp(max=1)


def _panels(count: int, aspect: float) -> tuple[Figure, list[Axes]]:
    """A figure with room for that many images of that height / width, and titles."""
    rows = -(-count // COLUMNS)
    panel = min(PANEL[0] * aspect, PANEL[1])
    width = PANEL[0] * COLUMNS
    height = rows * (panel + TITLE) + HEADER + 0.1
    figure = Figure(figsize=(width, height), facecolor="black")
    figure.subplots_adjust(
        0.01, 0.1 / height, 0.99, 1 - (HEADER + TITLE) / height, 0.04, TITLE / panel
    )
    panels = figure.subplots(rows, COLUMNS, squeeze=False).flatten().tolist()
    for axes in panels:
        axes.set_axis_off()
    return figure, panels


def _head(figure: Figure, layer: str, note: str) -> None:
    title = "Where the references of a layer draw their mass"
    height = figure.get_figheight()
    for text, fontsize, colour, top in (
        (title, 16, "white", 0.12),
        (layer, 11, "white", 0.45),
        (note, 10, "#bbbbbb", 0.7),
    ):
        figure.text(
            0.5, 1 - top / height, text, fontsize=fontsize, color=colour, ha="center", va="top"
        )


def _resize(picture: Tensor, size: tuple[int, ...], mode: str) -> Tensor:
    """[channels, H, W] to [*size, channels], in [0, 1]."""
    resized = F.interpolate(picture.unsqueeze(0), size, mode=mode, antialias=mode == "bicubic")
    return resized.squeeze(0).permute(1, 2, 0).clamp(0, 1)


def _show(axes: Axes, picture: Tensor, title: str, colour: str = "white") -> None:
    axes.imshow(picture.clamp(0, 1).numpy())
    axes.set_title(title, color=colour, fontsize=10)
