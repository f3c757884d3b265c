"""``setformer explain``: where a layer's references draw their mass in your image or text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import UserError
from ..images import add_max_pixels

if TYPE_CHECKING:
    from PIL import Image

    from ..predict.predictors import Predictor
    from .plans import Layer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from ..themes import add_background_option

    parser.add_argument(
        "training",
        type=Path,
        nargs="?",
        metavar="RUN",
        help="the --output folder of a `setformer train`, or where transformers' save_pretrained "
        "wrote a model with set_attention; or give --model and --checkpoint",
    )
    parser.add_argument("image", type=Path, nargs="?", metavar="IMAGE")
    parser.add_argument("--text", metavar="TEXT", help="in place of IMAGE, for a language encoder")
    parser.add_argument("--model", metavar="NAME", help="timm's, as setformer_tiny; or such a RUN")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="weights of --model, as timm writes them"
    )
    parser.add_argument("--stage", type=int, help="1 is the finest, 4 the coarsest (default: 3)")
    parser.add_argument(
        "--block", type=int, help="of the stage, from 1; -1 is the last (default: -1)"
    )
    parser.add_argument(
        "--layer", type=int, help="of a model of transformers, from 1; -1 is the last (default: -1)"
    )
    parser.add_argument(
        "--head",
        type=int,
        help="from 1 (default: the one whose references differ most in what they draw from)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        default=Path("setformer_references.png"),
        help="the picture (default: %(default)s)",
    )
    add_background_option(parser)
    add_max_pixels(parser)


def run(options: argparse.Namespace) -> None:
    """Draw the references of the chosen layer."""
    from .picture import SUFFIXES

    if options.text is None and options.image is None:  # the one file given was read as RUN
        options.training, options.image = None, options.training
        if options.image is None or options.image.is_dir():
            raise UserError("expected an IMAGE after RUN, or --text for a language encoder")
    if options.training is None and options.checkpoint is None and options.model is not None:
        folder = Path(options.model)  # --model may name a folder, then used as RUN
        if folder.is_dir():
            options.training, options.model = folder, None
    if options.output.suffix[1:] not in SUFFIXES:
        raise UserError(f"{options.output}: pictures can be written as {', '.join(SUFFIXES)}")
    done = _explain_image(options) if options.text is None else _explain_text(options)
    print(f"{done}\n  {options.output}")


def _explain_image(options: argparse.Namespace) -> str:
    """Draw the references over an image; returns what was drawn, in words."""
    from ..images import read_image
    from .picture import draw_references
    from .plans import choose_head

    if options.output.resolve() == options.image.resolve():
        raise UserError(f"--output: {options.output} is the image itself")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    layer, name = _look(options, read_image(options.image, options.max_pixels))
    plan, name = choose_head(layer.plans, options.head, name)
    draw_references(
        layer.seen,
        plan,
        layer.grid,
        name,
        options.output,
        covered=layer.covered,
        background=options.background,
    )
    return f"{options.image}: {name}"


def _look(options: argparse.Namespace, image: Image.Image) -> tuple[Layer, str]:
    """What a layer of a network does with an image, and the layer's name."""
    from .plans import find_attention, observe

    run = options.training
    saved = run is not None and (run / "config.json").is_file()
    if saved and not (run / "card.json").is_file():  # saved by transformers, not by a training
        from .encoders import observe_image

        if options.stage is not None or options.block is not None:
            raise UserError("--stage and --block: of a backbone; expected --layer for this model")
        return observe_image(run, _given(options.layer, -1), image)
    if options.layer is not None:
        raise UserError(
            "--layer: of a model of transformers; expected --stage and --block for a backbone"
        )
    predictor = _predictor(options)
    stage, block = _given(options.stage, 3), _given(options.block, -1)
    attention, name = find_attention(predictor.model, stage, block)
    layer = observe(predictor.model, attention, lambda: predictor.look(image))
    layer.seen = predictor.as_seen(layer.seen)
    size = predictor.size_seen(image)
    return (layer if size is None else layer.without_padding(*size)), name


def _predictor(options: argparse.Namespace) -> Predictor:
    from ..predict.loading import load_checkpoint, load_run

    if options.training is not None:
        if options.model is not None or options.checkpoint is not None:
            raise UserError("give either RUN or --model and --checkpoint, not both")
        return load_run(options.training)
    if options.model is None or options.checkpoint is None:
        raise UserError("give the RUN of a training before IMAGE, or --model and --checkpoint")
    return load_checkpoint(options.model, options.checkpoint)


def _explain_text(options: argparse.Namespace) -> str:
    """Draw the references over the words of a text; returns what was drawn, in words."""
    from .sentence import explain_sentence

    if options.training is None and options.checkpoint is None and options.model is not None:
        raise UserError(f"--model: there is no folder {options.model}")
    of_images = ("image", "model", "checkpoint", "stage", "block")
    if options.training is None or any(getattr(options, name) is not None for name in of_images):
        raise UserError(
            "--text: expected the RUN of a train mlm or glue, and no IMAGE, --model, --checkpoint, "
            "--stage or --block; --layer chooses the layer"
        )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    return explain_sentence(
        options.training,
        options.text,
        _given(options.layer, -1),
        options.head,
        options.output,
        options.background,
    )


def _given(number: int | None, default: int) -> int:
    return default if number is None else number
