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

MAX_PIXELS = 178_956_970  # where Pillow refuses, too
LARGEST_RATIO = 100  # of the sides of an image that is classified
ORIENTATION = 0x0112  # EXIF's number of it
QUARTER_TURNS = (5, 6, 7, 8)  # its values that swap width and height
# Endings of images that Pillow reads under another name, with a plugin, or not at all: such a file
# is an image that cannot be read, rather than none.
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
    """Declare ``--annotated``, for all whose labels have places in their images."""
    parser.add_argument(
        "--annotated",
        choices=("upright", "stored"),
        help="whether the labels of images that EXIF data turn are of the upright or of the stored "
        "pixels, where their size fits both (default: refuse those images)",
    )


def is_image(path: Path) -> bool:
    """Whether a file's ending is that of an image, also of one that cannot be read."""
    from PIL import Image

    suffix = path.suffix.lower()
    kind = Image.registered_extensions().get(suffix)
    return kind in Image.OPEN or suffix in OTHER_SUFFIXES


@contextmanager
def opened(path: Path, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """An image to look into, of which only the head is read yet.

    Raises:
        OSError: for all that Pillow raises at opening or meanwhile, and for images of more than
            ``max_pixels`` pixels; the message names the file.
    """
    from PIL import Image, UnidentifiedImageError

    if Image.MAX_IMAGE_PIXELS is not None:  # from which on Pillow warns; it refuses twice as many
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    try:
        # Not by its name: Pillow 13 maps uncompressed TIFFs into memory and confuses the rows of
        # those that are to be turned.
        with path.open("rb") as file:
            with warnings.catch_warnings():  # of large images, which max_pixels refuses
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
    except Exception as error:  # decoders raise what they like
        raise OSError(f"{path}: a broken image ({first_line(error)})") from error


def read_image(path: Path, max_pixels: int = MAX_PIXELS, upright: bool = True) -> Image.Image:
    """An image file as 8-bit RGB, transparency made white; of several frames the first.

    Greys of 16 bits and more are stretched to the full range, since files rarely use all of theirs.

    Args:
        path: the file.
        max_pixels: width times height that it may have.
        upright: turn it as its EXIF data says; else the pixels are as they are stored.

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
    """An image whose longer side is at most ``LARGEST_RATIO`` times the shorter: the middle of it.

    Classifiers see the middle of what they resize by the shorter side; of a line of pixels they
    would resize all of it first, to gigabytes.
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
    """Which pixels of an image that its EXIF data may turn its labels or boxes are of.

    Args:
        path: the image; only its head is read, but for PNGs, and for TIFFs that are turned.
        size: width and height of what the labels are of.
        annotated: "upright" or "stored" where the size fits both, None to refuse.
        max_pixels: see :func:`read_image`.

    Returns:
        width and height of the image, and the ``upright`` for :func:`read_image` to read it so;
        upright if ``size`` fits neither.

    Raises:
        OSError: if the image cannot be read, or the size fits both and nothing is said.
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
    """EXIF's number of how the stored pixels are to be turned, 1 for not at all."""
    turn = image.getexif().get(ORIENTATION, 1)
    return turn if turn in range(1, 9) else 1


def _stretch(levels: np.ndarray) -> Image.Image:  # [H, W]
    from PIL import Image

    levels = np.nan_to_num(levels, posinf=0, neginf=0)
    levels = levels - levels.min()
    return Image.fromarray(np.uint8(255 * (levels / max(levels.max(), 1e-12))))
