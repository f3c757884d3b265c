"""Images with boxes and masks in COCO's format, looked over before anything is trained on them.

pycocotools and torchvision read such files without checks. Here every record is checked first:
errors are reported with file and record, or left out and counted, before hours of work.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from ...errors import first_line
from ..images import MAX_PIXELS, annotated_size, read_image
from .coco_records import (
    Key,
    Record,
    Segmentation,
    find_file,
    identifier,
    is_rotated,
    last_names,
    read_box,
    read_category,
    read_crowd,
    read_size,
)
from .sampling import transformed
from .task import DataError, blaming, listed

LABEL_STUDIO = "Label Studio"


class Coco(Dataset[Any]):
    """The images of one annotation file, also those without boxes.

    A sample is an image, uint8 [3, H, W], and a dictionary: boxes [N, 4] (x0, y0, x1, y1 in pixels,
    inside the image), labels [N] int64 from 1 on, crowd [N] bool, and with ``masks`` masks
    [N, H, W] uint8; the first two and the masks are torchvision's tv_tensors. The sample that is
    returned is that of ``transform(image, target)``.

    Args:
        images: folder of the files that the annotations name.
        annotations: COCO's JSON.
        masks: read segmentations too.
        crowds: keep annotations with iscrowd, which are areas of many objects.
        classes: names whose labels are 1, 2, ...; by default the file's own categories, except
            parents of others that have no objects themselves.
        skip: leave out what is wrong and list it in ``problems``, rather than raise.
        annotated, max_pixels: see :func:`setformer_ext.cli.images.annotated_size`.

    Attributes:
        notes: what was merged, added or left out although nothing is wrong with it.

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
        annotated: str | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.folder, self.file, self.masks = images, annotations, masks
        self.annotated, self.max_pixels = annotated, max_pixels
        self.transform: Callable[[Any, Record], Any] | None = None
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.counts: Counter[str] = Counter()  # later turned into notes
        content = _read(images, annotations)
        about = content.get("info")
        self.tool = about.get("contributor") if isinstance(about, dict) else None
        categories = list(self._sound(content["categories"], "category", read_category))
        names = {category["id"]: category["name"] for category in categories}
        last = last_names(content["images"])
        pictures = self._sound(content["images"], "image", lambda r: self._read_image(r, last))
        known = {picture["id"]: picture for picture in pictures}
        self.images = list(known.values())
        files = {picture["path"] for picture in self.images}
        self.counts["images whose file is another's, too"] += len(known) - len(files)
        self.objects: dict[Key, list[Record]] = defaultdict(list)  # by the image's id
        things = self._sound(
            content["annotations"],
            "annotation",
            lambda record: self._read_annotation(record, known, names, classes),
        )
        for thing in things:
            if crowds or not thing["crowd"]:
                self.objects[thing["image_id"]].append(thing)
            else:
                self.counts["areas of many objects (iscrowd), which are not trained on"] += 1
        self.classes = self._find_classes(categories) if classes is None else classes
        label_of = {name: label for label, name in enumerate(self.classes, start=1)}
        for thing in (thing for things in self.objects.values() for thing in things):
            thing["label"] = label_of[thing.pop("name")]
        self._check(skip)

    def _sound(
        self, records: list[Any], kind: str, read: Callable[[Record], Record]
    ) -> Iterator[Record]:
        """The records that can be read, each with its id; notes what is wrong with the others."""
        seen: set[Key] = set()
        for place, record in enumerate(records):
            key = identifier(record.get("id")) if isinstance(record, dict) else None
            name = f"number {place}" if key is None else key
            where = f"{self.file}: {kind} {name}"
            try:
                # Nothing refers to annotations, so they may do without.
                if not isinstance(record, dict) or (key is None and kind != "annotation"):
                    raise ValueError("expected an object with an id")
                if name in seen:
                    raise ValueError("its id is taken")
                result = {"id": name, **read(record)}
            except (ValueError, OSError, RecursionError) as error:
                self.problems.append(f"{where}: {first_line(error)}")
            else:
                seen.add(name)
                self.problems += [f"{where}: {text}" for text in result.pop("problems", ())]
                yield result

    def _read_image(self, record: Record, last: Counter[str]) -> Record:
        path = find_file(self.folder, record.get("file_name"), last)
        size = read_size(record)
        if size is None:
            # No image is 0 x 0: this gives the own size of the upright image.
            size, _ = annotated_size(path, (0, 0), max_pixels=self.max_pixels)
            self.counts["sizes that it lacks, and so the images' own"] += 1
        return {"path": path, "width": size[0], "height": size[1]}

    def _read_annotation(
        self,
        record: Record,
        images: dict[Key, Record],
        names: dict[Key, str],
        classes: list[str] | None,
    ) -> Record:
        keys: dict[str, Any] = {}
        for key, where in (("image_id", images), ("category_id", names)):
            keys[key] = identifier(record.get(key))
            if keys[key] not in where:
                raise ValueError(
                    f"{key} {record.get(key)!r} is not among the {key[:-3]} ids that can be used"
                )
        image, name = images[keys["image_id"]], names[keys["category_id"]]
        if classes is not None and name not in classes:
            raise ValueError(f"the training's categories lack {name!r}")
        width, height = image["width"], image["height"]
        box, shape, mask = record.get("bbox"), record.get("segmentation"), None
        if self.masks or (shape and not box):
            mask = Segmentation(shape, width, height)
        if mask and not box:
            box = mask.box()
            self.counts["boxes that it lacks, and so their masks'"] += 1
        corners, cut = read_box(box, width, height)
        self.counts["boxes that reach out of their images, and were cut"] += cut
        self.counts["boxes with a rotation, which is not applied"] += is_rotated(record)
        thing = {"image_id": image["id"], "name": name, "box": corners}
        thing["crowd"] = read_crowd(record.get("iscrowd"))
        if self.masks and mask:
            self.counts["polygons of fewer than three points, left out"] += mask.points
            thing |= {"mask": mask, "problems": mask.problems}
        return thing

    def _find_classes(self, categories: list[Record]) -> list[str]:
        """The names of the categories, in the order of their ids."""
        ids = defaultdict(list)
        for category in sorted(categories, key=lambda c: (isinstance(c["id"], str), c["id"])):
            ids[category["name"]].append(category["id"])
        for name, same in ids.items():
            if len(same) > 1:
                among = ", ".join(map(str, same))
                self.notes.append(f"the categories {among} are all {name!r} and were merged")
        used = {thing["name"] for things in self.objects.values() for thing in things}
        empty = {c["parent"] for c in categories if c["parent"] != c["name"]} - used
        left_out = [name for name in ids if name in empty]
        if left_out:
            self.notes.append(f"categories that only group others: {', '.join(left_out)}, left out")
        return [name for name in ids if name not in empty]

    def _check(self, skip: bool) -> None:
        """Turn counts into notes, and raise an error if no training is possible."""
        self.notes += [f"{what}: {count}" for what, count in self.counts.items() if count]
        if self.problems and not skip:
            raise DataError(f"{listed(self.problems)} (--on-error skip: go on without)")
        boxes = [thing["box"] for things in self.objects.values() for thing in things]
        if not boxes:
            noted = "".join(f"; {note}" for note in self.notes)
            raise DataError(f"{self.file}: no image has a box that could be used{noted}")
        if max(max(box) for box in boxes) <= 1:
            raise DataError(
                f"{self.file}: all boxes lie between 0 and 1; expected pixels, not fractions of "
                "the images' sides"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        record = self.images[index]
        pixels = self._read_pixels(record)
        height, width = record["height"], record["width"]
        things = self.objects.get(record["id"], [])
        boxes = torch.tensor([thing["box"] for thing in things], dtype=torch.float32)
        target: Record = {
            "boxes": tv_tensors.BoundingBoxes(
                boxes.view(-1, 4), format="XYXY", canvas_size=(height, width)
            ),
            "labels": torch.tensor([thing["label"] for thing in things], dtype=torch.int64),
            "crowd": torch.tensor([thing["crowd"] for thing in things], dtype=torch.bool),
        }
        if self.masks:
            masks = [self._mask(thing) for thing in things]
            target["masks"] = tv_tensors.Mask(
                torch.stack(masks) if masks else torch.zeros(0, height, width, dtype=torch.uint8)
            )
        image = tv_tensors.Image(torch.from_numpy(pixels.transpose(2, 0, 1).copy()))
        if self.transform is None:
            return image, target
        return transformed(record["path"], self.transform, image, target)

    def _read_pixels(self, record: Record) -> np.ndarray:  # [H, W, 3] uint8
        """The pixels that the boxes refer to: unturned if the boxes are of the stored image."""
        path, size = record["path"], (record["width"], record["height"])
        own, upright = annotated_size(path, size, self.annotated, self.max_pixels)
        if own != size:
            raise DataError(
                f"{path}: is {own[0]} x {own[1]}, but {self.file} says {size[0]} x {size[1]}"
            )
        if not upright and self.tool == LABEL_STUDIO and size[0] != size[1]:
            raise DataError(
                f"{path}: its EXIF data turn it, for which {LABEL_STUDIO} exports boxes of the "
                "upright image with the size of the stored one; store it upright and export again"
            )
        return np.array(read_image(path, self.max_pixels, upright))

    def _mask(self, thing: Record) -> Tensor:  # -> [H, W] uint8
        where = f"{self.file}: annotation {thing['id']}: segmentation cannot be decoded"
        with blaming(where, ValueError, TypeError, IndexError, kind=DataError):
            return torch.from_numpy(thing["mask"].decoded())


def _read(images: Path, annotations: Path) -> Record:
    """The file's content, with the three lists in it."""
    if not annotations.is_file() or not images.is_dir():
        missing = images if annotations.is_file() else annotations
        raise DataError(
            f"--data: there is no {missing}; expected COCO's layout: train2017/*.jpg, "
            "val2017/*.jpg, annotations/instances_train2017.json and instances_val2017.json"
        )
    with blaming(f"{annotations}: not JSON", ValueError, RecursionError, kind=DataError):
        content = json.loads(annotations.read_bytes(), parse_constant=_refuse)
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{annotations}: expected COCO's format, with a list of {key}")
    if not content["images"]:
        raise DataError(f"{annotations}: has no images")
    return content


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")
