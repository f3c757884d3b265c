"""``setformer explain``: where a layer's references draw their mass in your image or text."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import first_line
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


def run(options: argparse.Namespace) -> int:
    """Draw the references of the chosen layer; returns the exit status."""
    from ..predict.loading import RunError
    from .plans import ExplainError

    try:
        if options.text is None:
            _explain(options)
        else:
            _explain_text(options)
    except (ExplainError, RunError, OSError) as error:
        print(f"setformer explain: {first_line(error)}", file=sys.stderr)
        return 1
    return 0


def _explain(options: argparse.Namespace) -> None:
    from ..images import read_image
    from .picture import draw_references
    from .plans import ExplainError, choose_head

    if options.image is None:  # the only positional argument given was taken for RUN
        options.training, options.image = None, options.training
        if options.image is None or options.image.is_dir():
            raise ExplainError("expected an IMAGE after RUN, or --text for a language encoder")
    _take_folder(options)
    _prepare_output(options)
    if options.output.resolve() == options.image.resolve():
        raise ExplainError(f"--output: {options.output} is the image itself")
    look = _look_with_encoder if _is_encoder(options.training) else _look_with_backbone
    layer, name = look(options, read_image(options.image, options.max_pixels))
    head = choose_head(layer.plans, options.head)
    name = f"{name}, head {head} of {len(layer.plans)}"
    draw_references(
        layer.seen,
        layer.plans[head - 1],
        layer.grid,
        name,
        options.output,
        covered=layer.covered,
        background=options.background,
    )
    print(f"{options.image}: {name}\n  {options.output}")


def _look_with_backbone(options: argparse.Namespace, image: Image.Image) -> tuple[Layer, str]:
    """What a layer of the network that a training of images left does, and what to call it."""
    from .plans import ExplainError, find_attention, observe

    if options.layer is not None:
        raise ExplainError(
            "--layer: of a model of transformers; expected --stage and --block for a backbone"
        )
    predictor = _predictor(options)
    attention, name = find_attention(
        predictor.model,
        3 if options.stage is None else options.stage,
        -1 if options.block is None else options.block,
    )
    layer = observe(predictor.model, attention, lambda: predictor.look(image))
    layer.seen = predictor.as_seen(layer.seen)
    size = predictor.size_seen(image)
    return (layer if size is None else layer.without_padding(*size)), name


def _look_with_encoder(options: argparse.Namespace, image: Image.Image) -> tuple[Layer, str]:
    """The same of a vision model of transformers."""
    from .encoders import observe_image
    from .plans import ExplainError

    if options.stage is not None or options.block is not None:
        raise ExplainError("--stage and --block: of a backbone; expected --layer for this model")
    return observe_image(options.training, _layer(options), image)


def _explain_text(options: argparse.Namespace) -> None:
    from .plans import ExplainError
    from .sentence import explain_sentence

    _take_folder(options)
    if options.training is None and options.checkpoint is None and options.model is not None:
        raise ExplainError(f"--model: there is no folder {options.model}")
    of_images = ("image", "model", "checkpoint", "stage", "block")
    if options.training is None or any(getattr(options, name) is not None for name in of_images):
        raise ExplainError(
            "--text: expected the RUN of a train mlm or glue, and no IMAGE, --model, --checkpoint, "
            "--stage or --block; --layer chooses the layer"
        )
    _prepare_output(options)
    name = explain_sentence(
        options.training,
        options.text,
        _layer(options),
        options.head,
        options.output,
        options.background,
    )
    print(f"{name}\n  {options.output}")


def _layer(options: argparse.Namespace) -> int:
    return -1 if options.layer is None else options.layer


def _take_folder(options: argparse.Namespace) -> None:
    """--model may name a folder, which then is the RUN."""
    if options.training is None and options.checkpoint is None and options.model is not None:
        folder = Path(options.model)
        if folder.is_dir():
            options.training, options.model = folder, None


def _is_encoder(folder: Path | None) -> bool:
    """Whether transformers saved it, and not a training of images."""
    return (
        folder is not None
        and (folder / "config.json").is_file()
        and not (folder / "card.json").is_file()
    )


def _prepare_output(options: argparse.Namespace) -> None:
    from .picture import SUFFIXES
    from .plans import ExplainError

    if options.output.suffix[1:] not in SUFFIXES:
        raise ExplainError(f"{options.output}: pictures can be written as {', '.join(SUFFIXES)}")
    options.output.parent.mkdir(parents=True, exist_ok=True)


def _predictor(options: argparse.Namespace) -> Predictor:
    from ..predict.loading import load_checkpoint, load_run
    from .plans import ExplainError

    if options.training is not None:
        if options.model is not None or options.checkpoint is not None:
            raise ExplainError("give either RUN or --model and --checkpoint, not both")
        return load_run(options.training)
    if options.model is None or options.checkpoint is None:
        raise ExplainError("give the RUN of a training before IMAGE, or --model and --checkpoint")
    return load_checkpoint(options.model, options.checkpoint)
