"""Reading image files of any size and mode."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .errors import first_line

if TYPE_CHECKING:
    from PIL import Image


def read_image(path: Path) -> Image.Image:
    """An image file as 8-bit RGB, upright as its EXIF data says, transparency made white.

    Greys of 16 bits and more are stretched to the full range, since files rarely use all of theirs.

    Raises:
        OSError: if there is no such file, or it cannot be decoded; the message names it.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith(("I", "F")):  # convert() would clip them
                image = _stretch(np.asarray(image, dtype=np.float64))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise OSError(f"{path}: not an image of a kind that Pillow reads") from error
    except Exception as error:  # decoders raise what they like
        raise OSError(f"{path}: a broken image ({first_line(error)})") from error


def _stretch(levels: np.ndarray) -> Image.Image:  # [H, W]
    from PIL import Image

    levels = np.nan_to_num(levels, posinf=0, neginf=0)
    levels = levels - levels.min()
    return Image.fromarray(np.uint8(255 * (levels / max(levels.max(), 1e-12))))
