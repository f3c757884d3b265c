"""``setformer demo``: SeT attention next to softmax attention, trained on real images."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from ...errors import UserError
from ..images import add_max_pixels

PACKAGES = ("torch", "numpy", "sklearn", "matplotlib", "PIL", "tqdm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the demo."""
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="your own images, one subfolder per class (default: scikit-learn's digits)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        default=Path("setformer_demo"),
        help="where the pictures go (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=800,
        help="training steps of each network, 64 images each (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="S",
        help="resize images to S x S, a multiple of 8 (default: 8 for the digits, else 32)",
    )
    add_max_pixels(parser)


def run(args: argparse.Namespace) -> None:
    """Train both networks, print the table and draw the pictures."""
    for name in PACKAGES:
        importlib.import_module(name)  # before any work; the command says how to install one
    from .compare import compare

    if args.image_size is None:
        args.image_size = 8 if args.data is None else 32
    if args.image_size < 8 or args.image_size % 8:
        raise UserError(f"--image-size must be a positive multiple of 8, got {args.image_size}")
    if args.steps < 1:
        raise UserError(f"--steps must be at least 1, got {args.steps}")
    if not -(2**63) <= args.seed < 2**64:
        raise UserError(f"--seed must be at least -2^63 and less than 2^64, got {args.seed}")
    compare(args)
