"""How many kinds of things are on a photograph? Networks beside one another, on pasted stamps.

    python benchmarks/vision/kinds.py [--quick] [--validate] [NAME ...]

pastes four drawings or photographs of things (Debian's package tuxpaint-stamps-default) on a piece
of a photograph (tuxpaint-data): of one to four kinds, at random places, each mirrored, turned and
of a size by chance. The answer is the number of kinds. No kind and no photograph is in two of
training, validation and test, so things have to be compared with one another, wherever they are,
and knowing them does not help. Trains the networks of fashion_mnist.py, with the same recipe and
the same output.

``--validate`` measures on the validation's pictures: for choices. ``--quick`` takes one seed, the
first and a minute, and fails if it learns too little.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from classification import SIZE, command, compare, parse
from PIL import Image
from torch import Tensor

from setformer_ext.cli.demo.data import Images

SHOWN = 4  # things on a picture, each in a cell of its own
CELLS = 2  # along each side
SIZES = (20, 26)  # of the things, pixels; a cell has 28
TURN = 20  # degrees
COUNTS = {"training": 12_000, "validation": 2000, "test": 4000}  # pictures
SHARES = {"training": 0.6, "validation": 0.2, "test": 0.2}  # of the stamps and photographs
STEPS, QUICK_STEPS = 600, 150
QUICK_ACCURACY = 0.35  # that --quick asks for; a guess has 0.25
STAMP = 48  # pixels of a side, as kept
PHOTOGRAPH = 240  # pixels of the shorter side, as kept
FOLDER = Path("/usr/share/tuxpaint")

Thing = TypeVar("Thing")


def main() -> int:
    parser = command(__doc__, STEPS, "kinds.png")
    parser.add_argument("--data", type=Path, default=FOLDER, help="with stamps and templates in it")
    options = parse(parser, QUICK_STEPS)
    for folder in ("stamps", "templates"):
        if not (options.data / folder).is_dir():
            parser.error(
                f"--data: {options.data} has no folder {folder}; install Debian's packages "
                "tuxpaint-stamps-default and tuxpaint-data, or name the folder of their files"
            )
    return compare(load(options.data, options.validate), options, QUICK_ACCURACY)


def load(folder: Path, validate: bool) -> Images:
    """Pictures [N, 3, 56, 56] to train on, and those of validation or test."""
    stamps, photographs = read_stamps(folder / "stamps"), read_photographs(folder / "templates")
    measured = "validation" if validate else "test"
    made = {}
    for seed, split in enumerate(COUNTS):
        if split in ("training", measured):
            made[split] = pictures(
                parts(stamps)[split],
                parts(photographs)[split],
                COUNTS[split],
                np.random.default_rng(seed),
            )
    classes = [str(kinds + 1) for kinds in range(SHOWN)]
    return Images(*made["training"], *made[measured], classes, measured)


def read_stamps(folder: Path) -> list[Image.Image]:
    """Each thing in the middle of a transparent square; what is there twice counts once.

    Left out are mirrored copies, and the folder "symbols", whose alphabets look alike.
    """
    stamps = {}
    for path in sorted(folder.rglob("*.png")):
        if "symbols" in path.parts or path.stem.endswith("_mirror"):
            continue
        with Image.open(path) as file:
            thing = file.convert("RGBA")
        thing = thing.crop(thing.getchannel("A").getbbox())
        thing.thumbnail((STAMP, STAMP), Image.Resampling.BOX)
        square = Image.new("RGBA", (STAMP, STAMP))
        square.paste(thing, ((STAMP - thing.width) // 2, (STAMP - thing.height) // 2))
        stamps[square.tobytes()] = square
    return [*stamps.values()]


def read_photographs(folder: Path) -> list[Image.Image]:
    photographs = []
    for path in sorted(folder.glob("*.jpg")):
        with Image.open(path) as file:
            scale = PHOTOGRAPH / min(file.size)
            size = (round(file.width * scale), round(file.height * scale))
            photographs.append(file.convert("RGB").resize(size, Image.Resampling.BOX))
    return photographs


def parts(things: Sequence[Thing]) -> dict[str, list[Thing]]:
    """Training, validation and test, drawn once and for all; nothing is in two of them."""
    order = np.random.default_rng(0).permutation(len(things))
    ends = np.round(np.cumsum([*SHARES.values()]) * len(things)).astype(int)[:-1]
    return {
        split: [things[i] for i in chosen]
        for split, chosen in zip(SHARES, np.split(order, ends), strict=True)
    }


def pictures(
    stamps: Sequence[Image.Image],
    photographs: Sequence[Image.Image],
    count: int,
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """Pictures [count, 3, 56, 56] in [0, 1], and the numbers of kinds on them, less 1, [count]."""
    images, labels = np.empty((count, SIZE, SIZE, 3), np.float32), np.empty(count, np.int64)
    for i in range(count):
        kinds = 1 + rng.integers(SHOWN)
        different = rng.choice(len(stamps), kinds, replace=False)
        shown = np.concatenate([different, rng.choice(different, SHOWN - kinds)])
        canvas = _piece(photographs[rng.integers(len(photographs))], rng)
        cells = rng.choice(CELLS**2, SHOWN, replace=False)
        for kind, cell in zip(shown, cells, strict=True):
            _paste(canvas, stamps[kind], divmod(int(cell), CELLS), rng)
        images[i], labels[i] = np.asarray(canvas, np.float32) / 255, kinds - 1
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)


def _piece(photograph: Image.Image, rng: np.random.Generator) -> Image.Image:
    x, y = (int(rng.integers(length - SIZE + 1)) for length in photograph.size)
    return photograph.crop((x, y, x + SIZE, y + SIZE))


def _paste(
    canvas: Image.Image, stamp: Image.Image, cell: tuple[int, int], rng: np.random.Generator
) -> None:
    """Put the thing somewhere about its cell, by chance mirrored, turned and of another size."""
    side = int(rng.integers(SIZES[0], SIZES[1] + 1))
    if rng.integers(2):
        stamp = stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    stamp = stamp.rotate(rng.uniform(-TURN, TURN), Image.Resampling.BILINEAR)
    stamp = stamp.resize((side, side), Image.Resampling.BILINEAR)
    middle = (np.array(cell) + 0.5) * SIZE / CELLS + rng.uniform(-2, 2, 2)
    x, y = np.clip(middle - side / 2, 0, SIZE - side).astype(int).tolist()
    canvas.paste(stamp, (x, y), stamp)


if __name__ == "__main__":
    sys.exit(main())
