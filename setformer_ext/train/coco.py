"""Images with boxes and masks in COCO's format, looked over before anything is trained on them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as run_lengths
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from ..errors import first_line
from ..images import read_image
from .task import DataError, listed

Record = dict[str, Any]
LARGEST = 2**31  # above any coordinate; an integer of JSON may be too large for a float


class Coco(Dataset[Any]):
    """The images of one annotation file, also those without boxes.

    A sample is an image, uint8 [3, H, W], and a dictionary: boxes [N, 4] (x0, y0, x1, y1 in pixels,
    inside the image), labels [N] int64 from 1 on, crowd [N] bool, and with ``masks`` masks
    [N, H, W] uint8; the first two and the masks are torchvision's tv_tensors. What
    ``transform(image, target)`` makes of it is returned.

    Args:
        images: folder of the files that the annotations name.
        annotations: COCO's JSON.
        masks: read segmentations too.
        crowds: keep annotations with iscrowd, which are areas of many objects.
        classes: names whose labels are 1, 2, ...; the file's own categories by default.
        skip: leave out what is wrong and list it in ``problems``, rather than raise.

    Raises:
        DataError: for a file that cannot be used, and without ``skip`` for anything wrong in it;
            for samples whose image is broken or of another size.
    """

    def __init__(
        self,
        images: Path,
        annotations: Path,
        *,
        masks: bool,
        crowds: bool,
        classes: list[str] | None = None,
        skip: bool = False,
    ) -> None:
        self.folder, self.file, self.masks = images, annotations, masks
        self.transform: Callable[[Any, Record], Any] | None = None
        content = _read(images, annotations)
        names = _category_names(annotations, content["categories"])
        self.classes = list(names.values()) if classes is None else classes
        label_of = {name: label for label, name in enumerate(self.classes, start=1)}
        self.problems: list[str] = []
        known = {image["id"]: image for image in self._sound(content["images"], "image")}
        self.images = list(known.values())
        self.objects: dict[Any, list[Record]] = defaultdict(list)  # by the image's id
        for thing in self._sound(content["annotations"], "annotation", known, names, label_of):
            if crowds or not thing.get("iscrowd"):
                box = _clamped(thing["bbox"], known[thing["image_id"]])
                label = label_of[names[thing["category_id"]]]
                self.objects[thing["image_id"]].append({**thing, "box": box, "label": label})
        if self.problems and not skip:
            raise DataError(f"{listed(self.problems)} (--on-error skip: go on without)")
        if not any(self.objects.values()):
            raise DataError(f"{annotations}: no image has a box that could be used")

    def _sound(self, records: list[Record], kind: str, *context: Any) -> Iterator[Record]:
        """The records that can be used; notes what is wrong with the others."""
        check = self._image_problem if kind == "image" else self._annotation_problem
        seen: set[Any] = set()
        for place, record in enumerate(records):
            name = record.get("id") if isinstance(record, dict) else None
            if not isinstance(name, (int, str)):
                problem, name = "expected an object with an id", f"number {place}"
            else:
                problem = "its id is taken" if name in seen else check(record, *context)
            if problem:
                self.problems.append(f"{self.file}: {kind} {name}: {problem}")
            else:
                seen.add(name)
                yield record

    def _image_problem(self, image: Record) -> str:
        for key in ("width", "height"):
            if not (type(image.get(key)) is int and 0 < image[key] < LARGEST):
                return f"{key} must be a whole number above 0, got {_short(image.get(key))}"
        name = image.get("file_name")
        if not (isinstance(name, str) and name):
            return f"file_name must be a name, got {name!r}"
        return "" if (self.folder / name).is_file() else f"there is no file {self.folder / name}"

    def _annotation_problem(
        self, thing: Record, images: dict, names: dict[Any, str], label_of: dict[str, int]
    ) -> str:
        for key, where in (("image_id", images), ("category_id", names)):
            if not isinstance(thing.get(key), (int, str)) or thing[key] not in where:
                return f"{key} {thing.get(key)!r} is not among the {key[:-3]} ids that can be used"
        if names[thing["category_id"]] not in label_of:
            return f"the training's categories lack {names[thing['category_id']]!r}"
        image: Record = images[thing["image_id"]]
        box: Any = thing.get("bbox")
        if not (_numbers(box) and len(box) == 4 and min(box[2:]) > 0):
            return f"bbox must be [x, y, width > 0, height > 0], got {_short(box)}"
        x0, y0, x1, y1 = _clamped(box, image)
        if x1 <= x0 or y1 <= y0:
            return f"bbox {box} is outside its image of {image['width']} x {image['height']}"
        return _segmentation_problem(thing.get("segmentation"), image) if self.masks else ""

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        record = self.images[index]
        path = self.folder / record["file_name"]
        pixels = np.asarray(read_image(path))
        height, width = record["height"], record["width"]
        if pixels.shape[:2] != (height, width):
            raise DataError(
                f"{path}: is {pixels.shape[1]} x {pixels.shape[0]}, but {self.file} says "
                f"{width} x {height}"
            )
        things = self.objects.get(record["id"], [])
        boxes = torch.tensor([thing["box"] for thing in things], dtype=torch.float32)
        target: Record = {
            "boxes": tv_tensors.BoundingBoxes(
                boxes.view(-1, 4), format="XYXY", canvas_size=(height, width)
            ),
            "labels": torch.tensor([thing["label"] for thing in things], dtype=torch.int64),
            "crowd": torch.tensor([bool(t.get("iscrowd")) for t in things], dtype=torch.bool),
        }
        if self.masks:
            masks = [self._mask(thing, height, width) for thing in things]
            target["masks"] = tv_tensors.Mask(
                torch.stack(masks) if masks else torch.zeros(0, height, width, dtype=torch.uint8)
            )
        image = tv_tensors.Image(torch.from_numpy(pixels.transpose(2, 0, 1).copy()))
        return (image, target) if self.transform is None else self.transform(image, target)

    def _mask(self, thing: Record, height: int, width: int) -> Tensor:  # -> [H, W] uint8
        shape = thing["segmentation"]
        try:
            if isinstance(shape, list):
                shape = run_lengths.merge(run_lengths.frPyObjects(shape, height, width))
            elif isinstance(shape["counts"], list):
                shape = run_lengths.frPyObjects(shape, height, width)
            elif _pixels(shape["counts"]) != height * width:  # the decoder would read on
                raise ValueError("run lengths that do not add up to the image's pixels")
            return torch.from_numpy(np.ascontiguousarray(run_lengths.decode(shape)))
        except (ValueError, TypeError, IndexError) as error:
            raise DataError(
                f"{self.file}: annotation {thing['id']}: segmentation cannot be decoded: "
                f"{first_line(error)}"
            ) from error


def _read(images: Path, annotations: Path) -> Record:
    """The file's content, with the three lists in it."""
    if not annotations.is_file() or not images.is_dir():
        missing = images if annotations.is_file() else annotations
        raise DataError(
            f"--data: there is no {missing}; expected COCO's layout: train2017/*.jpg, "
            "val2017/*.jpg, annotations/instances_train2017.json and instances_val2017.json"
        )
    try:
        content = json.loads(annotations.read_bytes(), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{annotations}: not JSON: {first_line(error)}") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{annotations}: expected COCO's format, with a list of {key}")
    if not content["images"]:
        raise DataError(f"{annotations}: has no images")
    return content


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _category_names(file: Path, categories: list[Record]) -> dict[Any, str]:
    """Names by id, in the order of the ids, which need not be contiguous."""
    names: dict[Any, str] = {}
    for category in categories:
        known = isinstance(category, dict)
        key, name = (category.get("id"), category.get("name")) if known else (None, None)
        if type(key) is not int or not isinstance(name, str):
            raise DataError(f"{file}: a category needs id and name, got {_short(category)}")
        if key in names or name in names.values():
            raise DataError(f"{file}: category {key} ({name}): its id or its name is there twice")
        names[key] = name
    return dict(sorted(names.items()))


def _clamped(box: list[float], image: Record) -> tuple[float, float, float, float]:
    """Corners, from x, y, width and height, no further out than the image."""
    x, y, w, h = box
    right, bottom = float(image["width"]), float(image["height"])
    return max(x, 0.0), max(y, 0.0), min(x + w, right), min(y + h, bottom)


def _segmentation_problem(shape: Any, image: Record) -> str:
    """What is wrong with polygons, or with run lengths as a list or as COCO's string."""
    height, width = image["height"], image["width"]
    if isinstance(shape, list) and shape:
        for polygon in shape:
            if not (_numbers(polygon) and len(polygon) >= 6 and len(polygon) % 2 == 0):
                got = _short(polygon)
                return f"segmentation: expected [x, y, ...] of three points or more, got {got}"
            reach = max(height, width)  # beyond which rasterising runs out of memory
            if min(polygon) < -reach or max(polygon) > 2 * reach:
                return f"segmentation: a polygon is far outside its image of {width} x {height}"
        return ""
    if isinstance(shape, dict) and isinstance(shape.get("counts"), (list, str)):
        counts = shape["counts"]
        if shape.get("size") != [height, width]:
            return f"segmentation: size must be {[height, width]}, got {_short(shape.get('size'))}"
        if isinstance(counts, list) and not (
            all(type(c) is int and c >= 0 for c in counts) and sum(counts) == height * width
        ):
            return f"segmentation: counts must add up to {height} x {width} pixels"
        return ""
    return f"segmentation: expected polygons or run lengths, got {_short(shape)}"


def _pixels(counts: str) -> int:
    """How many pixels COCO's compressed run lengths cover: 5 bits a character, from the lowest on,
    each length but the first three less the one two before."""
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


def _numbers(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(value) in (int, float) and abs(value) < LARGEST for value in values
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
