"""Texts of pictures: fonts for every script, and lines that fit."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import cache
from textwrap import fill

from matplotlib import rcParams
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import (
    FontProperties,
    findfont,
    findSystemFonts,
    fontManager,
    get_font,
)

POINTS = 72  # in an inch
REMARK = 10  # points
LINE = 1.3  # distance of lines / size of the font


def families(texts: Iterable[str]) -> list[str]:
    """matplotlib's own font families, and installed families for characters that those lack.

    If no font has a character, that is said once, on stderr; matplotlib draws a box.
    """
    chosen = list(rcParams["font.family"])
    missing = {c for text in texts for c in text if c.isprintable() and not c.isspace()}
    for family in chosen:
        missing -= _characters(findfont(FontProperties(family=[family])))
    files = _installed() if missing else {}
    while missing and files:
        family = max(files, key=lambda family: len(missing & _characters(files[family])))
        found = missing & _characters(files.pop(family))
        if not found:
            break
        chosen.append(family)
        missing -= found
    if missing:
        _tell_of_boxes()
    return chosen


def _installed() -> dict[str, str]:
    """A file of each family, those without serifs first."""
    known = {entry.fname for entry in fontManager.ttflist}
    for path in set(findSystemFonts()) - known:  # installed after matplotlib made its list
        try:
            fontManager.addfont(path)
        except Exception:  # a broken font; FreeType raises errors of any class
            continue
    # The upright file of usual weight stands for its family; of several the last, as in matplotlib.
    entries = sorted(
        fontManager.ttflist,
        key=lambda entry: (
            "Sans" not in entry.name,
            entry.name,
            entry.style == "normal" and entry.weight in (400, "normal"),
        ),
    )
    return {
        entry.name: entry.fname for entry in entries if not entry.name.startswith("Last Resort")
    }


@cache
def _characters(path: str) -> set[str]:
    try:
        return {chr(code) for code in get_font(path).get_charmap()}
    except Exception:  # as above
        return set()


@cache
def _tell_of_boxes() -> None:
    print(
        "setformer: boxes stand for characters that no installed font has; on Debian, packages "
        "such as fonts-noto-cjk (Chinese, Japanese, Korean) or fonts-noto-core bring them",
        file=sys.stderr,
    )


def width(text: str, size: float) -> float:
    """The width in inches of the longest line, in a font of `size` points."""
    renderer, font = RendererAgg(1, 1, POINTS), FontProperties(size=size)
    lines = text.split("\n")
    return max(renderer.get_text_width_height_descent(x, font, False)[0] for x in lines) / POINTS


def _drawable(text: str) -> str:
    """The text without invalid bytes, which file names may hold and matplotlib refuses."""
    return text.encode(errors="replace").decode()


def wrapped(text: str, size: float, inches: float) -> str:
    """The text in lines of at most that width; only longer words are broken."""
    lines = text = _drawable(text)
    columns = max(map(len, text.split("\n")))
    while columns > 1 and width(lines, size) > inches:
        columns -= 1 + columns // 20
        lines = "\n".join(fill(line, columns) for line in text.split("\n"))
    return lines


def shortened(text: str, size: float, inches: float) -> str:
    """The beginning of a text, of at most that width, with "…" if the text goes on."""
    short = text = _drawable(text)
    while short and width(short, size) > inches:
        short = short.removesuffix("…")[:-1].rstrip() + "…" * (len(short) > 1)
    return short


def add_title(figure: Figure, title: str, size: float, remark: str = "") -> None:
    """Add a title over the whole figure and a remark below; the figure grows by their lines."""
    room = figure.get_figwidth() - 0.3
    title, remark = wrapped(title, size, room), wrapped(remark, REMARK, room)
    figure.suptitle(title, fontsize=size)
    lines = size * title.count("\n")
    if remark:
        figure.supxlabel(remark, fontsize=REMARK, alpha=0.75)
        lines += REMARK * (1 + remark.count("\n"))
    figure.set_figheight(figure.get_figheight() + LINE * lines / POINTS)
