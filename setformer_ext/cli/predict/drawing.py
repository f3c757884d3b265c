"""Pictures of a model's answer about an image, with themes, legends and names in any script, which
torchvision.utils does not have, because it draws into pixels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from ..fonts import add_title, shortened, width
from ..themes import COLOURS, style
from .answers import Classification, Detection, ImageAnswer, Segmentation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL import Image

PANEL = 7.0  # inches of the image's longer side
BARS = 6.0  # inches of the bars beside it
DPI = 120
TITLE = 14  # points
LARGEST = 1680  # pixels of its longer side; a picture cannot show more
Colour = tuple[float, float, float]
BRIGHT = [to_rgb(colour) for colour in COLOURS]
PALETTE = [*BRIGHT, *((red / 2, green / 2, blue / 2) for red, green, blue in BRIGHT)]
REST = to_rgb("#777777")  # for classes beyond the palette
FRAME = "#777777"  # visible on black and on white
NAME_WIDTH = 3.2  # inches


def draw(
    answer: ImageAnswer, image: Image.Image, name: str, path: Path, background: str = "dark"
) -> None:
    """Write the picture of an answer about an image (RGB) of that name, in a theme."""
    with style(background, [name, *answer.classes]):
        if isinstance(answer, Classification):
            figure = _draw_classification(answer, image, name)
        elif isinstance(answer, Detection):
            figure = _draw_detection(answer, image, name)
        elif isinstance(answer, Segmentation):
            figure = _draw_segmentation(answer, image, name)
        figure.savefig(path, dpi=DPI)


def _draw_classification(answer: Classification, image: Image.Image, name: str) -> Figure:
    wide, high = _inches(image, 5.0)
    figure = Figure(figsize=(wide + BARS, max(high, 3.0) + 0.6), layout="constrained")
    picture, bars = figure.subplots(1, 2, width_ratios=(wide, BARS))
    _show(picture, np.asarray(image), image)
    places = np.arange(len(answer.classes))
    probabilities = answer.probabilities.numpy()
    bars.barh(places, probabilities, color=COLOURS[0])
    for place, probability in zip(places, probabilities, strict=True):
        bars.text(probability + 0.02, place, f"{probability:.1%}", va="center", fontsize=12)
    bars.set_yticks(places, [_short(name) for name in answer.classes], fontsize=12)
    bars.set(xlim=(0, 1.2), xticks=[])
    bars.invert_yaxis()
    bars.tick_params(length=0)
    bars.spines[:].set_visible(False)
    bars.set_title("probability of the class", fontsize=12)
    add_title(figure, f"{name}: {_short(answer.classes[0])}?", TITLE)
    return figure


def _draw_detection(answer: Detection, image: Image.Image, name: str) -> Figure:
    figure, (axes,) = _panels(image, 1)
    colours = _colours(len(answer.classes), answer.labels.tolist())
    picture, step = _reduced(image)
    if answer.masks is not None:
        masks = answer.masks[:, ::step, ::step].numpy()
        for mask, label in zip(masks, answer.labels.tolist(), strict=True):
            picture[mask] = 0.5 * picture[mask] + 0.5 * np.array(colours[label])
    _show(axes, picture, image)
    scale = PANEL / max(image.size)  # inches per pixel
    objects = zip(answer.boxes.tolist(), answer.labels.tolist(), answer.scores, strict=True)
    for (x0, y0, x1, y1), label, score in reversed([*objects]):  # the surest on top
        colour = colours[label]
        axes.add_patch(
            Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=1.8)
        )
        text = f"{_short(answer.classes[label])} {score:.0%}"
        needed = 1.1 * width(text, 8) / scale  # pixels
        if needed > min(2 * (x1 - x0), image.width):  # the name would hide the neighbours
            continue
        at_the_top = scale * y0 < 0.2
        axes.text(
            min(x0, image.width - needed),
            y0,
            text,
            color=_readable_on(colour),
            fontsize=8,
            va="top" if at_the_top else "bottom",
            clip_on=True,
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.5},
        )
    counts = answer.counts()
    names = [f"{count} x {_short(answer.classes[label])}" for label, count in counts]
    _legend(figure, names, [colours[label] for label, _ in counts])
    found = "what was found, with scores" if names else answer.nothing()
    add_title(figure, f"{name}: {found}", TITLE)
    return figure


def _draw_segmentation(answer: Segmentation, image: Image.Image, name: str) -> Figure:
    figure, (left, right) = _panels(image, 2)
    present = answer.present()
    colours = _colours(len(answer.classes), [label for label, _ in present])
    of_label = np.array([colours.get(label, REST) for label in range(len(answer.classes))])
    picture, step = _reduced(image)
    grey = picture.mean(-1, keepdims=True)
    _show(left, picture, image)
    of_pixel = of_label[answer.labels[::step, ::step].numpy()]
    _show(right, 0.35 * grey + 0.65 * of_pixel, image)
    names = [f"{_short(answer.classes[label])} {share:.1%}" for label, share in present]
    _legend(figure, names, [colours[label] for label, _ in present])
    add_title(figure, f"{name}: the class of every pixel", TITLE)
    return figure


def _panels(image: Image.Image, count: int) -> tuple[Figure, np.ndarray]:
    """A figure with room for so many images beside each other."""
    wide, high = _inches(image, PANEL)
    figure = Figure(figsize=(max(count * wide, 5.0), high + 1.2), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _inches(image: Image.Image, longer: float) -> tuple[float, float]:
    """Width and height such that the longer side has that length, and the other is at least 1."""
    width, height = (max(longer * side / max(image.size), 1.0) for side in image.size)
    return width, height


def _colours(classes: int, found: list[int]) -> dict[int, Colour]:
    """A colour for each class found. With few enough classes a class always has the same colour.

    With more, the classes found first have colours of their own, and the others share one.
    """
    ranked = range(classes) if classes <= len(PALETTE) else dict.fromkeys(found)
    colours = dict(zip(ranked, PALETTE, strict=False))
    return {label: colours.get(label, REST) for label in found}


def _legend(figure: Figure, names: list[str], colours: list[Colour]) -> None:
    """The legend below the images; it only counts classes without a colour of their own."""
    if not names:
        return
    own = [pair for pair in zip(names, colours, strict=True) if pair[1] != REST]
    if len(own) < len(names):
        own.append((f"{len(names) - len(own)} more classes", REST))
    columns = int(figure.get_figwidth() / (0.8 + max(width(name, 11) for name, _ in own)))
    columns = min(max(columns, 1), len(own))
    figure.legend(
        [Patch(facecolor=colour, edgecolor=FRAME) for _, colour in own],
        [name for name, _ in own],
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=11,
    )
    rows = -(-len(own) // columns)
    figure.set_figheight(figure.get_figheight() + 0.25 * (rows - 1))


def _reduced(image: Image.Image) -> tuple[np.ndarray, int]:  # [H, W, 3] in [0, 1]
    """An image with no more pixels than can be seen, and how many original pixels make one."""
    step = -(-max(image.size) // LARGEST)
    return np.asarray(image.reduce(step)) / 255.0, step


def _show(axes: Axes, picture: np.ndarray, image: Image.Image) -> None:
    """Show a picture of an image in the image's own coordinates."""
    width, height = image.size
    axes.imshow(
        picture,
        extent=(0, width, height, 0),
        interpolation="nearest" if max(image.size) < 200 else "antialiased",
    )
    axes.set_axis_off()


def _short(name: str) -> str:
    return shortened(name, 12, NAME_WIDTH)


def _readable_on(colour: Colour) -> str:
    red, green, blue = colour
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
