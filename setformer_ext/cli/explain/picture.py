"""The picture of a layer's references over the image."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor

from ..fonts import add_title
from ..themes import CHOICE, covering_references, resized, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = ("png", "pdf", "svg", "jpg", "webp", "tiff")
COLUMNS = 5
PANEL = (2.4, 3.2)  # inches, the largest width and height of an image
TITLE, HEADER = 0.4, 0.5  # inches over each panel, and over all of them
RESOLUTION = 480  # pixels of an image's longer side


def draw_references(
    image: Tensor,  # [3, height, width] in [0, 1]
    plan: Tensor,  # [N, M], of one head
    grid: tuple[int, int],
    layer: str,
    path: Path,
    *,
    covered: tuple[float, float] | None = None,
    background: str = "dark",
) -> None:
    """References that cover the image, each over the tokens that it draws from.

    The first panel shows every token in the colour of the reference to which it gives most.

    Args:
        image: what the network saw.
        plan: mass from token i to reference j.
        grid: rows and columns of the tokens.
        layer: names the layer in the title.
        path: of the picture, with one of SUFFIXES.
        covered: height and width of the tokens, from the upper left, in pixels of the image; by
            default the image's.
        background: the name of a theme.
    """
    scale = RESOLUTION / max(image.shape[1:])
    size = _scaled(image.shape[1:], scale)
    token_size = size if covered is None else _scaled(covered, scale)
    mass = plan.sum(0) / plan.sum()  # [M]
    with style(background, [layer]) as theme:
        shown = covering_references(plan, len(theme.colours))
        # Light on black; on white, ink: the same with black and white exchanged.
        flip = (lambda x: 1 - x) if background == "light" else (lambda x: x)
        colours = dict(zip(shown, (flip(_rgb(name)) for name in theme.colours), strict=False))
        image = resized(image, size, "bicubic")
        grey = flip(image.mean(-1, keepdim=True))

        def over_image(tokens: Tensor) -> Tensor:  # [N, channels] -> [*size, channels]
            over_all = resized(tokens.mT.unflatten(1, grid), token_size, "nearest")
            return over_all[: size[0], : size[1]]

        rest = flip(_rgb(theme.rest))
        most = torch.stack([colours.get(j, rest) for j in plan.argmax(1).tolist()])  # [N, 3]
        figure, panels = _panels(len(shown) + 2, size[0] / size[1])
        tint = flip(over_image(most) * (0.5 + 0.5 * grey))
        _show(panels[0], image, "what the network sees", theme.text)
        _show(panels[1], tint, "where each token gives most", theme.text)
        for axes, j, name in zip(panels[2:], shown, theme.colours, strict=False):
            light = over_image(_light(plan[:, j]).unsqueeze(1)) * colours[j]
            title = f"reference {j + 1}: {mass[j]:.0%} of the mass"
            _show(axes, flip(0.25 * grey + 0.85 * light), title, name)
        head = f"Where the references of a layer draw their mass\n{layer}"
        remark = "Strong colour: the reference draws much from there."
        if len(shown) < len(mass):
            head += f": {len(shown)} of {len(mass)} references"
            remark += f" Shown: {CHOICE}. Grey: tokens that give most to one that is not shown."
        add_title(figure, head, 13, remark)
        figure.savefig(path, dpi=150)


def _light(drawn: Tensor) -> Tensor:  # [N] -> [N]
    """Brightness in [0, 1], limited so that a few tokens with much mass leave the rest visible."""
    brightest = torch.maximum(drawn.quantile(0.99), drawn.max() / 4)
    return (drawn / brightest).clamp(max=1)


def _panels(count: int, aspect: float) -> tuple[Figure, list[Axes]]:
    """A figure with room for that many images of that height / width, and titles."""
    rows = -(-count // COLUMNS)
    panel = min(PANEL[0] * aspect, PANEL[1])
    size = (PANEL[0] * COLUMNS, rows * (panel + TITLE) + HEADER)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, COLUMNS, squeeze=False).flatten().tolist()
    for axes in panels:
        axes.set_axis_off()
    return figure, panels


def _scaled(size: tuple[float, ...], scale: float) -> tuple[int, int]:
    height, width = (max(1, round(scale * side)) for side in size)
    return height, width


def _rgb(colour: str) -> Tensor:
    return torch.tensor(to_rgb(colour))


def _show(axes: Axes, picture: Tensor, title: str, colour: str) -> None:
    axes.imshow(picture.clamp(0, 1).numpy())
    axes.set_title(title, color=colour, fontsize=10)
