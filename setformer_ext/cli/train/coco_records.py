"""Reads the records of COCO's JSON, in the many forms that annotation tools write.

Ids and numbers may be texts or floats; polygons may be nested more or less deeply than COCO nests
them. Values that can only mean one thing are read; for others a ValueError says what was expected.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
from pycocotools import mask as run_lengths

Record = dict[str, Any]
Key = int | str  # an id
LARGEST = 2**31  # above any coordinate; an integer of JSON may be too large for a float
FLAGS = {0: False, 1: True, "0": False, "1": True, "false": False, "true": True}


def identifier(value: Any) -> Key | None:
    """An id: the same for 7, 7.0 and "7", but another one for "07"; None if the value is no id."""
    if isinstance(value, str):
        return int(value) if re.fullmatch("0|[1-9][0-9]{0,17}", value) else value or None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return value if type(value) is int else None


def read_category(record: Record) -> Record:
    """The name of a category, and its parent's if it has one."""
    name = record.get("name")
    if type(name) not in (int, str) or name == "":
        raise ValueError(f"name must be a text, got {short(name)}")
    return {"name": str(name), "parent": str(record.get("supercategory"))}


def read_size(record: Record) -> tuple[int, int] | None:
    """Width and height of an image, or None if the record has neither."""
    given = {key: record.get(key) for key in ("width", "height")}
    if given == {"width": None, "height": None}:
        return None
    sizes = []
    for key, value in given.items():
        size = numbers(value)
        if size is None or size.ndim or size < 1 or size % 1:
            raise ValueError(f"{key} must be a whole number above 0, got {short(value)}")
        sizes.append(int(size))
    return sizes[0], sizes[1]


def last_names(images: list[Any]) -> Counter[str]:
    """How often each file name occurs, without its folders."""
    names = (image.get("file_name") for image in images if isinstance(image, dict))
    return Counter(PureWindowsPath(name).name for name in names if isinstance(name, str))


def find_file(folder: Path, name: Any, last: Mapping[str, int]) -> Path:
    """The image file that a record names.

    Tools put folders of their own or of another system, or an address, before the file's name.
    These are dropped if no other image of the annotations has the same name.
    """
    if not (isinstance(name, str) and name):
        raise ValueError(f"file_name must be a name, got {name!r}")
    parts = PureWindowsPath(name).parts  # split at slashes of both kinds
    drops = len(parts) if last[PureWindowsPath(name).name] == 1 else min(len(parts), 1)
    for end in (name, *(os.path.join(*parts[drop:]) for drop in range(drops))):
        if os.path.isfile(folder / end):
            return folder / end
    raise ValueError(f"there is no file {folder / name}")


def read_crowd(value: Any) -> bool:
    """The value of ``iscrowd``; None means False."""
    key = value.lower() if isinstance(value, str) else value
    if key is None:
        return False
    if isinstance(key, (list, dict)) or key not in FLAGS:
        raise ValueError(f"iscrowd must be 0 or 1, got {short(value)}")
    return FLAGS[key]


def read_box(value: Any, width: int, height: int) -> tuple[tuple[float, ...], bool]:
    """Corners x0, y0, x1, y1, cut at the image's borders, from x, y, width and height.

    Returns:
        the corners, and whether the box was cut by more than rounding explains.
    """
    box = numbers(value)
    if box is None or box.shape != (4,) or box[2:].min() <= 0:
        raise ValueError(f"bbox must be [x, y, width > 0, height > 0], got {short(value)}")
    x, y, w, h = box.tolist()
    x0, y0, x1, y1 = max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)
    if x1 <= x0 or y1 <= y0:
        raise ValueError(f"bbox {short(value)} is outside its image of {width} x {height}")
    return (x0, y0, x1, y1), min(x, y) < -1 or x + w > width + 1 or y + h > height + 1


def is_rotated(record: Record) -> bool:
    """Whether CVAT gives an angle by which to rotate a box."""
    attributes = record.get("attributes")
    return isinstance(attributes, dict) and bool(attributes.get("rotation"))


class Segmentation:
    """An object's mask.

    Args:
        value: polygons, or run lengths as a list or as COCO's text.
        width: of the image.
        height: of the image.

    Attributes:
        points: polygons left out because they have fewer than three points, and so no area.
        problems: what is wrong with polygons that were left out, if others are good.

    Raises:
        ValueError: if nothing of it can be used.
    """

    def __init__(self, value: Any, width: int, height: int) -> None:
        self.size = [height, width]
        self.polygons: list[np.ndarray] = []  # each x, y, x, y, ...
        self.counts: list[int] | str | None = None
        self.points = 0
        self.problems: list[str] = []
        if isinstance(value, list) and value:
            self._read_polygons(value)
        elif isinstance(value, dict) and isinstance(value.get("counts"), (list, str)):
            self._read_counts(value)
        else:
            raise ValueError(
                f"segmentation: expected polygons or run lengths, got {short(value)} "
                "(--detector faster_rcnn needs none)"
            )

    def _read_polygons(self, value: list[Any]) -> None:
        thin: list[Any] = []
        height, width = self.size
        reach = max(self.size)  # further outside, rasterising would run out of memory
        for polygon in _polygons(value):
            points = numbers(polygon)
            if points is None or points.ndim != 1 or len(points) % 2:
                self.problems.append(_no_polygon(polygon))
            elif len(points) < 6:
                thin.append(polygon)
            elif points.min() < -reach or points.max() > 2 * reach:
                where = f"its image of {width} x {height}"
                self.problems.append(f"segmentation: a polygon is far outside {where}")
            else:
                self.polygons.append(points)
        if not self.polygons:
            raise ValueError(self.problems[0] if self.problems else _no_polygon(thin[0]))
        self.points = len(thin)

    def _read_counts(self, value: Record) -> None:
        size, counts = numbers(value.get("size")), value["counts"]
        if size is None or size.tolist() != self.size:
            got = short(value.get("size"))
            raise ValueError(f"segmentation: size must be {self.size}, got {got}")
        if isinstance(counts, str):
            self.counts = counts
            return
        lengths, (height, width) = numbers(counts), self.size
        if (
            lengths is None
            or lengths.ndim != 1
            or (lengths < 0).any()
            or (lengths % 1).any()
            or lengths.sum() != height * width
        ):
            raise ValueError(f"segmentation: counts must add up to {height} x {width} pixels")
        self.counts = lengths.astype(np.int64).tolist()

    def decoded(self) -> np.ndarray:  # [H, W] uint8
        """The mask.

        Raises:
            ValueError, TypeError, IndexError: for a text that is not in COCO's form.
        """
        return np.ascontiguousarray(run_lengths.decode(self._encoded()))

    def _encoded(self) -> Any:
        height, width = self.size
        if self.counts is None:
            return run_lengths.merge(run_lengths.frPyObjects(self.polygons, height, width))
        shape = {"size": self.size, "counts": self.counts}
        if isinstance(self.counts, list):
            return run_lengths.frPyObjects(shape, height, width)
        if _pixels(self.counts) != height * width:  # the decoder would read past the end
            raise ValueError("run lengths that do not add up to the image's pixels")
        return shape

    def box(self) -> list[float]:
        """Left, top, width and height of the area that the mask covers."""
        if self.counts is not None:
            return run_lengths.toBbox(self._encoded()).tolist()
        points = np.concatenate(self.polygons).reshape(-1, 2)
        return [*points.min(0).tolist(), *np.ptp(points, 0).tolist()]


def _polygons(value: Any) -> list[Any]:
    """Polygons from [x, y, ...], [[x, y], ...], or lists of these, nested to any depth."""
    if not (isinstance(value, list) and value and isinstance(value[0], list)):
        return [value]
    if len(value) > 2 and all(isinstance(point, list) and len(point) == 2 for point in value):
        return [[coordinate for point in value for coordinate in point]]
    return [polygon for part in value for polygon in _polygons(part)]


def _no_polygon(value: Any) -> str:
    return f"segmentation: expected [x, y, ...] of three points or more, got {short(value)}"


def _pixels(counts: str) -> int:
    """How many pixels COCO's compressed run lengths cover. A character has 5 bits, the lowest
    first; from the fourth length on, only the difference to the length two before is stored."""
    lengths: list[int] = []
    value = shift = 0
    for character in counts.encode():
        bits = character - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            value = shift = 0
    return sum(lengths) if not shift and min(lengths, default=0) >= 0 else -1


def numbers(value: Any) -> np.ndarray | None:
    """A number or lists of numbers, perhaps written as texts, in float64; None for all else."""
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        return None
    return array if (np.abs(array) < LARGEST).all() else None


def short(value: Any) -> str:
    """The value as Python writes it, shortened."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
