"""What the package's pictures share: themes, and the choice of the head and references to draw."""

from __future__ import annotations

import warnings
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# Bright on black; people who see no red or no green can tell them apart too.
COLOURS = ["#56b4e9", "#e69f00", "#2ee6a0", "#f0e442", "#ff6ec7", "#d55e00", "#9d8cff", "#ffffff"]


@dataclass(frozen=True)
class Theme:
    """The colours of a picture."""

    background: str
    text: str
    frame: str
    rest: str  # the colour of all that has none of its own
    colours: list[str]


THEMES = {
    "dark": Theme("#000000", "#ffffff", "#444444", "#3a3a3a", COLOURS),
    "light": Theme(
        "#ffffff",
        "#000000",
        "#bbbbbb",
        "#c5c5c5",
        ["#0072b2", "#b87400", "#008f68", "#6b6100", "#cc3f96", "#a63c00", "#6a51d8", "#000000"],
    ),
}


def add_background_option(parser: ArgumentParser) -> None:
    """Declare ``--background``, the name of a theme."""
    parser.add_argument(
        "--background",
        choices=THEMES,
        default="dark",
        help="of the pictures: light for print (default: %(default)s)",
    )


@contextmanager
def style(background: str, texts: Iterable[str]) -> Iterator[Theme]:
    """matplotlib's settings while a picture is made and saved: a theme's colours, and its fonts.

    Args:
        background: the name of the theme.
        texts: what the picture will say, in any script, never as formulas.
    """
    from matplotlib import rc_context

    from .fonts import families

    theme = THEMES[background]
    settings: dict[Any, object] = {
        "figure.facecolor": theme.background,
        "axes.facecolor": theme.background,
        "axes.edgecolor": theme.frame,
        "text.color": theme.text,
        "axes.labelcolor": theme.text,
        "xtick.color": theme.text,
        "ytick.color": theme.text,
        "text.parse_math": False,
        "font.family": families(texts),
    }
    with rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # families() has said it
        yield theme


def resized(picture: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """[channels, H, W] to [*size, channels], in [0, 1]; modes are F.interpolate's."""
    from torch.nn.functional import interpolate

    pixels = interpolate(picture.unsqueeze(0), size, mode=mode, antialias=mode == "bicubic")
    return pixels.squeeze(0).permute(1, 2, 0).clamp(0, 1)


def mutual_information(plans: Tensor) -> Tensor:  # [..., N, M] -> [...]
    """How much a token tells about the reference: sum_ij P_ij log(P_ij / (a_i b_j)), in nats.

    It is 0 if all references draw in the same way: then there is nothing to see.
    """
    independent = plans.sum(-1, keepdim=True) * plans.sum(-2, keepdim=True)
    return plans.xlogy(plans / independent.clamp_min(1e-30)).sum((-1, -2))


def covering_references(plan: Tensor, count: int) -> list[int]:  # [N, M] -> count indices or M
    """References that cover the tokens together; those of largest mass may all draw from one.

    The first is the one of largest mass. Each next one is the j with the largest sum_i max(0, C_ij
    - max_k C_ik) over the k chosen before, where C are the columns of the plan, each divided by its
    sum: it draws most from where those before draw less. (The greedy algorithm for facility
    location, within 1 - 1/e of the best choice.)
    """
    mass = plan.sum(0)
    drawn = plan / mass.clamp_min(1e-30)
    chosen = [int(mass.argmax())]
    covered = drawn[:, chosen[0]]
    while len(chosen) < min(count, len(mass)):
        gain = (drawn - covered.unsqueeze(1)).clamp_min(0).sum(0)
        gain[chosen] = -1
        chosen.append(int(gain.argmax()))
        covered = covered.maximum(drawn[:, chosen[-1]])
    return chosen


# How covering_references chooses, for the pictures.
CHOICE = "the one of largest mass, then each that draws most from where those before draw less"
