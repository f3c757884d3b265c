"""The pixels of an answer as a grey image whose values other programs read."""

from __future__ import annotations

import numpy as np
from PIL import Image

from .answers import Answer, Detection, Segmentation


def mask_image(answer: Answer) -> Image.Image | None:
    """What an answer says of each pixel, of the image's size; None if it says nothing of pixels.

    Of a segmentation the labels, as the training's own label files have them. Of objects with masks
    the number of the object, 1 for the first and surest, which covers the others; 0 for none.
    Values are of 8 bits, of 16 where there are more than 255.
    """
    if isinstance(answer, Segmentation):
        return _grey(answer.labels.numpy() + answer.first_label)
    if isinstance(answer, Detection) and answer.masks is not None:
        numbers = np.zeros(answer.masks.shape[1:], dtype=np.int64)
        for number in range(len(answer.masks), 0, -1):
            numbers[answer.masks[number - 1].numpy()] = number
        return _grey(numbers)
    return None


def _grey(values: np.ndarray) -> Image.Image:  # [H, W] integers from 0 to 65535
    return Image.fromarray(values.astype(np.uint8 if values.max(initial=0) < 256 else np.uint16))
