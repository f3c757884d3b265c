"""Reading image files of any size and mode."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import first_line

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 178_956_970  # Pillow's own limit
LARGEST_RATIO = 100  # of the sides of an image that is classified
ORIENTATION = 0x0112  # EXIF's tag of the orientation
QUARTER_TURNS = (5, 6, 7, 8)  # orientations that swap width and height
# Endings of images that Pillow reads under another name, with a plugin, or not at all: such a file
# counts as an image that cannot be read.
OTHER_SUFFIXES = {
    *(".mpo", ".heic", ".heif", ".hif", ".jxl", ".svg", ".exr", ".hdr"),
    *(".dng", ".arw", ".cr2", ".cr3", ".nef", ".orf", ".raf", ".rw2"),
}


def add_max_pixels(parser: argparse._ActionsContainer) -> None:
    """Declare ``--max-pixels``, for all that reads images."""
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=MAX_PIXELS,
        metavar="N",
        help="refuse images of more, which may be files made to fill the memory "
        "(default: %(default)s)",
    )


def add_annotated(parser: argparse._ActionsContainer) -> None:
    """Declare ``--annotated``, for tasks whose labels refer to places in images."""
    parser.add_argument(
        "--annotated",
        choices=("upright", "stored"),
        help="whether the labels of images that EXIF data turn are of the upright or of the stored "
        "pixels, where their size fits both (default: refuse those images)",
    )


def is_image(path: Path) -> bool:
    """Whether a file's ending is that of an image, even of one that cannot be read."""
    from PIL import Image

    suffix = path.suffix.lower()
    kind = Image.registered_extensions().get(suffix)
    return kind in Image.OPEN or suffix in OTHER_SUFFIXES


@contextmanager
def opened(path: Path, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """An opened image; only its head has been read.

    Raises:
        OSError: for all errors of Pillow, at opening or later, and for images of more than
            ``max_pixels`` pixels; the message names the file.
    """
    from PIL import Image, UnidentifiedImageError

    if Image.MAX_IMAGE_PIXELS is not None:  # Pillow warns above this, and refuses above twice this
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    try:
        # Opened as a file, not by name: Pillow 13 maps uncompressed TIFFs into memory, and mixes up
        # the rows of those that must be turned.
        with path.open("rb") as file:
            with warnings.catch_warnings():  # about large images; max_pixels refuses those
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                image = Image.open(file)
            with image:
                if image.width * image.height > max_pixels:
                    raise Image.DecompressionBombError(f"{image.width} x {image.height}")
                yield image
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise IsADirectoryError(f"{path}: a folder, expected an image") from error
    except UnidentifiedImageError as error:
        raise OSError(f"{path}: not an image of a kind that Pillow reads") from error
    except Image.DecompressionBombError as error:
        raise OSError(
            f"{path}: more than {max_pixels} pixels ({first_line(error)}); if the file can be "
            "trusted, allow more by --max-pixels"
        ) from error
    except Exception as error:  # decoders raise errors of any class
        raise OSError(f"{path}: a broken image ({first_line(error)})") from error


def read_image(path: Path, max_pixels: int = MAX_PIXELS, upright: bool = True) -> Image.Image:
    """An image file as 8-bit RGB, transparency made white; of several frames the first.

    Greys of 16 bits and more are stretched to the full range, since files rarely use all of theirs.

    Args:
        path: the file.
        max_pixels: width times height that it may have.
        upright: turn it as its EXIF data says; otherwise return the pixels as stored.

    Raises:
        OSError: if there is no such file, or it cannot be decoded; the message names it.
    """
    from PIL import Image, ImageOps

    with opened(path, max_pixels) as image:
        if upright:
            image = ImageOps.exif_transpose(image)
        elif image.format == "TIFF" and _orientation(image) != 1:
            raise ValueError("Pillow itself turns TIFFs as they say; store it upright")
        if image.mode.startswith(("I", "F")):  # convert() would clip them
            image = _stretch(np.asarray(image, dtype=np.float64))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def middle(image: Image.Image) -> Image.Image:
    """The middle of an image: its longer side is at most ``LARGEST_RATIO`` times the shorter.

    Classifiers resize an image by its shorter side, then take the middle. An image of one line of
    pixels would be resized to gigabytes first.
    """
    width, height = (min(side, LARGEST_RATIO * min(image.size)) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def annotated_size(
    path: Path,
    size: tuple[int, int],
    annotated: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> tuple[tuple[int, int], bool]:
    """Decide whether labels or boxes belong to an image as stored, or as turned by its EXIF data.

    Args:
        path: the image; only its head is read, except for PNGs, and for TIFFs that are turned.
        size: width and height of the image that the labels belong to.
        annotated: "upright" or "stored", for sizes that fit both; None to refuse those.
        max_pixels: see :func:`read_image`.

    Returns:
        width and height of that image, and ``upright`` for :func:`read_image`. If ``size`` fits
        neither, those of the upright image.

    Raises:
        OSError: if the image cannot be read, or the size fits both and ``annotated`` is None.
    """
    from PIL import ImageOps

    with opened(path, max_pixels) as image:
        turn, stored = _orientation(image), image.size
        if turn != 1 and image.format == "TIFF":  # some Pillows have turned its size already
            upright = ImageOps.exif_transpose(image).size
            stored = upright[::-1] if turn in QUARTER_TURNS else upright
        else:
            upright = stored[::-1] if turn in QUARTER_TURNS else stored
    if turn == 1 or size not in (upright, stored) or size == upright != stored:
        return upright, True
    if size == stored != upright:
        return stored, False
    if annotated is None:
        raise OSError(
            f"{path}: its EXIF data turn it, and labels of {size[0]} x {size[1]} fit it turned or "
            "not; say by --annotated upright or --annotated stored what they are of"
        )
    return upright, annotated == "upright"


def _orientation(image: Image.Image) -> int:
    """EXIF's number that says how to turn the stored pixels; 1 for not at all."""
    turn = image.getexif().get(ORIENTATION, 1)
    return turn if turn in range(1, 9) else 1


def _stretch(levels: np.ndarray) -> Image.Image:  # [H, W]
    from PIL import Image

    levels = np.nan_to_num(levels, posinf=0, neginf=0)
    levels = levels - levels.min()
    return Image.fromarray(np.uint8(255 * (levels / max(levels.max(), 1e-12))))
