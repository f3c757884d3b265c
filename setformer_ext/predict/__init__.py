"""``setformer predict``: what a trained model says about your images, as pictures."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import first_line
from ..images import add_max_pixels

if TYPE_CHECKING:
    from .predictors import Predictor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from ..pictures import add_background_option

    parser.add_argument(
        "training", type=Path, metavar="RUN", help="the --output folder of a `setformer train`"
    )
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        default=Path("setformer_predictions"),
        help="where the pictures go, one PNG for each image (default: %(default)s)",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.5,
        metavar="SCORE",
        help="leave out objects of a smaller score, from 0 to 1 (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the answers there as well")
    add_background_option(parser)
    add_max_pixels(parser)


def run(options: argparse.Namespace) -> int:
    """Answer about every image that can be read; returns the exit status."""
    from .loading import RunError, load_run

    if not 0 <= options.threshold <= 1:
        return _fail(f"--threshold must be from 0 to 1, got {options.threshold}")
    try:
        predictor = load_run(options.training)
        options.output.mkdir(parents=True, exist_ok=True)
        answers, failed = _answer_all(predictor, options)
        if options.json is not None:
            text = json.dumps(answers, indent=1, ensure_ascii=False) + "\n"
            # File names that are not UTF-8 stay what they are.
            options.json.write_text(text, encoding="utf-8", errors="surrogateescape")
    except (RunError, OSError) as error:
        return _fail(first_line(error))
    if failed:
        return _fail(f"{failed} of {len(options.images)} images could not be read")
    return 0


def _answer_all(
    predictor: Predictor, options: argparse.Namespace
) -> tuple[list[dict[str, Any]], int]:
    """The answers in JSON's types, and how many images could not be read."""
    from ..files import is_hidden
    from ..images import read_image
    from .pictures import draw

    answers, failed = [], 0
    taken = {path.resolve() for path in options.images}
    for path in options.images:
        if is_hidden(path):  # a pattern of the shell finds them, too
            print(f"setformer predict: {path}: hidden or a system's, left out", file=sys.stderr)
            continue
        try:
            image = read_image(path, options.max_pixels)
        except OSError as error:
            print(f"setformer predict: {first_line(error)}", file=sys.stderr)
            failed += 1
            continue
        answer = predictor(image, options.threshold)
        picture = _free_name(options.output, path.stem, taken)
        draw(answer, image, path.name, picture, options.background)
        print(f"{path}: {answer.text()}\n  {picture}")
        answers.append({"image": str(path), "picture": str(picture), **answer.json()})
    return answers, failed


def _free_name(folder: Path, stem: str, taken: set[Path]) -> Path:
    """``stem.png``, or with a number if that is an input or another input's picture already."""
    path, number = folder / f"{stem}.png", 2
    while path.resolve() in taken:
        path, number = folder / f"{stem}_{number}.png", number + 1
    taken.add(path.resolve())
    return path


def _fail(message: str) -> int:
    print(f"setformer predict: {message}", file=sys.stderr)
    return 1
