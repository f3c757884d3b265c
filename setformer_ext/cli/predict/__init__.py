"""``setformer predict``: what a trained model says about your images, texts or GLUE's tests."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ...errors import UserError
from ..images import add_max_pixels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from ..themes import add_background_option

    parser.add_argument(
        "training", type=Path, metavar="RUN", help="the --output folder of a `setformer train`"
    )
    images = parser.add_argument(
        "images",
        type=Path,
        nargs="+",
        metavar="IMAGE",
        help="files, or folders, of which all images are answered",
    )
    images.required = False  # with nargs="*", argparse would not find those after an option
    parser.add_argument(
        "--text",
        nargs="+",
        action="append",
        metavar="TEXT",
        help="in place of images, for a training of glue: one, or the two of a task about pairs; "
        "or of mlm: one with [MASK] in it; may be given again",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="in place of images, for a training of glue: GLUE's download, whose test files are "
        "answered as its server wants them, in --output",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        default=Path("setformer_predictions"),
        help="where the pictures go, one PNG for each image, and its masks or labels as a PNG of "
        "that name in masks/ (default: %(default)s)",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.5,
        metavar="SCORE",
        help="leave out objects of a smaller score, from 0 to 1 (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the answers there as well")
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="and there as a table, without the masks"
    )
    add_background_option(parser)
    add_max_pixels(parser)


def run(options: argparse.Namespace) -> None:
    """Answer about everything that is given and can be read."""
    if not 0 <= options.threshold <= 1:
        raise UserError(f"--threshold must be from 0 to 1, got {options.threshold}")
    if sum(bool(given) for given in (options.images, options.text, options.data)) != 1:
        raise UserError("expected either IMAGE ..., --text or --data after RUN")
    if options.data:
        from .submission import answer_glue

        answer_glue(options.training, options.data, options.output)
        return
    failed = ""
    if options.text:
        from .texts import answer_texts

        answers = answer_texts(options.training, options.text)
    else:
        from .on_images import answer_images

        answers, failed = answer_images(options)
    if options.json is not None:
        _write(options.json, json.dumps(answers, indent=1, ensure_ascii=False) + "\n")
    if options.csv is not None:
        from .answers import as_csv

        _write(options.csv, as_csv(answers))
    if failed:
        raise UserError(failed)


def _write(path: Path, text: str) -> None:
    # File names that are not UTF-8 are written as they are.
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
