"""Answers about image files: pictures, masks, and what reports take."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ...errors import UserError, first_line
from ..files import files_under, is_hidden
from ..images import is_image, read_image
from ..train.task import NO_IMAGES, named
from .drawing import draw
from .loading import load_run

MASKS = "masks"  # the folder of the masks beside the pictures


def answer_images(options: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """Answer about every image that can be read.

    Returns:
        The answers in JSON's types, and the files that could not be answered.

    Raises:
        UserError: if the training cannot be used, or a folder has no images.
        OSError: for a folder that cannot be read or written.
    """
    predictor = load_run(options.training)
    paths = [path for given in options.images for path in _files(given)]
    options.output.mkdir(parents=True, exist_ok=True)
    answers, failed = [], 0
    taken = {path.resolve() for path in paths}
    for path in paths:
        try:
            image = read_image(path, options.max_pixels)
        except OSError as error:
            print(f"setformer predict: {first_line(error)}", file=sys.stderr)
            failed += 1
            continue
        answer = predictor(image, options.threshold)
        picture, mask = _free_names(options.output, path.stem, taken)
        draw(answer, image, path.name, picture, options.background)
        files = {"picture": str(picture)}
        pixels = answer.mask()
        if pixels is not None:
            mask.parent.mkdir(exist_ok=True)
            pixels.save(mask)
            files["mask"] = str(mask)
        print(f"{path}: {answer.text()}", *files.values(), sep="\n  ")
        answers.append({"image": str(path), **files, **answer.json()})
    return answers, f"{failed} of {len(paths)} images could not be read" if failed else ""


def _files(given: Path) -> list[Path]:
    """The file itself, or all images in a folder and in its folders."""
    if is_hidden(given):  # a pattern of the shell finds hidden files too
        print(f"setformer predict: {given}: hidden or a system's, left out", file=sys.stderr)
        return []
    if not given.is_dir():
        return [given]
    files = list(files_under(given))
    found = [path for path in files if is_image(path)]
    others = named([path for path in files if not is_image(path)], NO_IMAGES)
    if not found:
        raise UserError("; ".join([f"{given}: a folder without images", *others]))
    for note in others:
        print(f"setformer predict: {note}", file=sys.stderr)
    return found


def _free_names(folder: Path, stem: str, taken: set[Path]) -> tuple[Path, Path]:
    """``stem.png`` and ``masks/stem.png``, with a number if inputs or other answers have the
    name."""
    number, name = 2, f"{stem}.png"
    while taken & {(folder / name).resolve(), (folder / MASKS / name).resolve()}:
        number, name = number + 1, f"{stem}_{number}.png"
    paths = folder / name, folder / MASKS / name
    taken.update(path.resolve() for path in paths)
    return paths
