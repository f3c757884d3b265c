"""COCO's JSON as annotation tools export it: read as if it were COCO's own, or said what is not."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from setformer_ext.cli.train.coco import Coco
from setformer_ext.cli.train.task import DataError

Change = Callable[[dict[str, Any]], None]
WIDTH, HEIGHT = 60, 40
BOXES = [(5, 6, 20, 10), (30, 20, 12, 15), (2, 3, 50, 30)]


def polygon(x: int, y: int, w: int, h: int) -> list[int]:
    return [x, y, x + w, y, x + w, y + h, x, y + h]


CONTENT: dict[str, Any] = {
    "images": [
        {"id": 0, "file_name": "a.png", "width": WIDTH, "height": HEIGHT},
        {"id": 1, "file_name": "b.png", "width": WIDTH, "height": HEIGHT},
    ],
    "annotations": [
        {
            "id": number,
            "image_id": number // 2,
            "category_id": 1 + number % 2,
            "bbox": list(box),
            "segmentation": [polygon(*box)],
            "iscrowd": 0,
        }
        for number, box in enumerate(BOXES)
    ],
    "categories": [
        {"id": 1, "name": "cat", "supercategory": "pet"},
        {"id": 2, "name": "dog", "supercategory": "pet"},
    ],
}


@pytest.fixture
def export(tmp_path: Path) -> Callable[..., Coco]:
    """Opens two images, the annotations of which are changed before."""
    random = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        pixels = random.integers(256, size=(HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)

    def write(change: Change, **more: Any) -> Coco:
        content = copy.deepcopy(CONTENT)
        change(content)
        file = tmp_path / "instances.json"
        file.write_text(json.dumps(content))
        return Coco(tmp_path, file, **({"masks": True, "crowds": False} | more))

    return write


def nothing(content: dict[str, Any]) -> None:
    pass


def each(kind: str, **changes: Any) -> Change:
    """Change values of all records of a kind; ... takes them out, functions are called."""

    def change(content: dict[str, Any]) -> None:
        for record in content[kind]:
            for key, value in changes.items():
                old = record.pop(key)
                if value is not ...:
                    record[key] = value(old) if callable(value) else value

    return change


def also(kind: str, **record: Any) -> Change:
    """Put another record of a kind before the others."""
    return lambda content: content[kind].insert(0, record)


def both(*changes: Change) -> Change:
    def change(content: dict[str, Any]) -> None:
        for one in changes:
            one(content)

    return change


def texts(values: list[Any]) -> list[str]:
    return [str(value) for value in values]


def pairs(polygons: list[list[int]]) -> list[list[int]]:
    return np.reshape(polygons[0], (-1, 2)).tolist()


def run_lengths(polygons: list[list[int]]) -> dict[str, Any]:
    """As floats, of which the size is in texts."""
    mask = np.zeros((HEIGHT, WIDTH), int)
    (x0, y0), _, (x1, y1), _ = pairs(polygons)
    mask[y0:y1, x0:x1] = 1
    steps = np.flatnonzero(np.diff(np.r_[0, mask.flatten("F"), 0]))
    counts = np.diff(np.r_[0, steps, mask.size]).astype(float).tolist()
    return {"size": [str(HEIGHT), f"{WIDTH}.0"], "counts": counts}


ROOT = also("categories", id=0, name="pet", supercategory="none")
OF_ONE_NAME = both(each("categories", supercategory="dog"), also("categories", id=0, name="dog"))
SAME: dict[str, tuple[Change, str]] = {
    "ids of images as texts (VIA)": (each("annotations", image_id=str), ""),
    "ids of categories as texts (pylabel)": (each("annotations", category_id=str), ""),
    "ids of their own as texts": (
        both(each("images", id=str), each("categories", id=str), each("annotations", id=str)),
        "",
    ),
    "ids as floats (pandas)": (each("annotations", image_id=float, category_id=float), ""),
    "names as ids": (
        both(
            each("images", id=lambda number: f"0{number}"),
            each("annotations", image_id=lambda number: f"0{number}"),
        ),
        "",
    ),
    "no ids of annotations": (each("annotations", id=...), ""),
    "empty ids of annotations": (each("annotations", id=None), ""),
    "numbers as texts": (
        both(each("annotations", bbox=texts, iscrowd="0"), each("images", width=str, height=str)),
        "",
    ),
    "sizes as floats": (each("images", width=float, height=float), ""),
    "no iscrowd": (each("annotations", iscrowd=...), ""),
    "empty iscrowd": (each("annotations", iscrowd=None), ""),
    "iscrowd as a float": (each("annotations", iscrowd=0.0), ""),
    "iscrowd as a word": (each("annotations", iscrowd="False"), ""),
    "no sizes": (each("images", width=..., height=None), "the images' own: 2"),
    "no boxes (labelme)": (each("annotations", bbox=...), "their masks': 3"),
    "empty boxes": (each("annotations", bbox=[]), "their masks': 3"),
    "boxes of run lengths": (
        each("annotations", bbox=..., segmentation=run_lengths),
        "their masks': 3",
    ),
    "one polygon, not a list (VIA, MyVision)": (
        each("annotations", segmentation=lambda polygons: polygons[0]),
        "",
    ),
    "points as pairs": (each("annotations", segmentation=pairs), ""),
    "lists of lists of lists (Kili)": (each("annotations", segmentation=lambda p: [p]), ""),
    "lists of pairs": (each("annotations", segmentation=lambda p: [pairs(p)]), ""),
    "coordinates as texts": (each("annotations", segmentation=lambda p: [texts(p[0])]), ""),
    "run lengths as floats": (each("annotations", segmentation=run_lengths), ""),
    "polygons of two points (CVAT)": (
        each("annotations", segmentation=lambda p: [[395.0, 85.5, 395.0, 85.5], *p, []]),
        "polygons of fewer than three points, left out: 6",
    ),
    "folders of Windows (Label Studio)": (
        each("images", file_name=lambda name: rf"..\..\label-studio\media\upload\4\{name}"),
        "",
    ),
    "folders of the server": (each("images", file_name=lambda name: f"/data/local/{name}"), ""),
    "addresses": (each("images", file_name=lambda name: f"https://x.example/{name}"), ""),
    "a root of all (Roboflow)": (ROOT, "categories that only group others: pet, left out"),
    "a parent of one child's name (Roboflow)": (
        OF_ONE_NAME,
        "the categories 0, 2 are all 'dog' and were merged",
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_what_tools_write_reads_as_cocos_own(case: str, export: Callable[..., Coco]) -> None:
    change, note = SAME[case]
    known, data = export(nothing), export(change)
    assert data.problems == []
    assert len(data.notes) == bool(note)
    assert note in "".join(data.notes)
    assert {*data.classes} == {"cat", "dog"}
    for (image, target), (known_image, known_target) in zip(
        (data[i] for i in range(2)), (known[i] for i in range(2)), strict=True
    ):
        assert torch.equal(image, known_image)
        names = [data.classes[label - 1] for label in target["labels"]]
        assert names == [known.classes[label - 1] for label in known_target["labels"]]
        for key in ("boxes", "masks", "crowd"):
            assert torch.equal(target[key], known_target[key]), key


def of(kind: str, place: int, **changes: Any) -> Change:
    return lambda content: content[kind][place].update(changes)


ODD = [polygon(*BOXES[0]), [1, 2, 3, 4, 5, 6, 7]]
# What stops a training, and how many images and objects are left without it.
WRONG: dict[str, tuple[Change, str, int, int]] = {
    "a polygon beside a good one": (
        of("annotations", 0, segmentation=ODD),
        "annotation 0: segmentation: expected [x, y, ...] of three points or more, got [1, 2, 3",
        *(2, 3),
    ),
    "no polygon of three points": (
        of("annotations", 0, segmentation=[[1, 2, 3, 4]]),
        "annotation 0: segmentation: expected [x, y, ...] of three points or more, got [1, 2",
        *(2, 2),
    ),
    "boxes alone (CVAT, Label Studio)": (
        of("annotations", 1, segmentation=[]),
        "annotation 1: segmentation: expected polygons or run lengths, got [] (--detector faster",
        *(2, 2),
    ),
    "empty objects (coco-annotator)": (
        of("annotations", 2, segmentation=[], bbox=[0, 0, 0, 0]),
        "annotation 2: segmentation: expected",
        *(2, 2),
    ),
    "no category (VIA, LabelFlow)": (
        of("annotations", 0, category_id=None),
        "annotation 0: category_id None is not among the category ids that can be used",
        *(2, 2),
    ),
    "a category without a name": (
        of("categories", 0, name=None),
        "category 1: name must be a text, got None",
        *(2, 1),
    ),
    "a category without an id": (
        also("categories", name="bird"),
        "category number 0: expected an object with an id",
        *(2, 3),
    ),
    "two categories of one id": (
        lambda content: content["categories"].append({"id": "1", "name": "bird"}),
        "category 1: its id is taken",
        *(2, 3),
    ),
    "ids that differ in zeros only": (
        of("annotations", 0, image_id="00"),
        "annotation 0: image_id '00' is not among the image ids that can be used",
        *(2, 2),
    ),
    "an image without a name": (
        of("images", 0, file_name=None),
        "image 0: file_name must be a name, got None",
        *(1, 1),
    ),
    "one name in two folders": (
        both(of("images", 0, file_name="x/b.png"), of("images", 1, file_name="y/b.png")),
        "image 0: there is no file",
        *(0, 0),
    ),
    "half a size": (of("images", 0, height=None), "image 0: height must be a whole number", 1, 1),
    "a size of parts": (of("images", 0, width=6.5), "image 0: width must be a whole number", 1, 1),
    "a word for iscrowd": (
        of("annotations", 0, iscrowd="maybe"),
        "annotation 0: iscrowd must be 0 or 1, got 'maybe'",
        *(2, 2),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_can_be_read_in_no_way_or_in_several_is_named(
    case: str, export: Callable[..., Coco]
) -> None:
    change, message, images, objects = WRONG[case]
    with pytest.raises(DataError) as error:
        export(change)
    assert f"instances.json: {message}" in str(error.value)
    assert "(--on-error skip: go on without)" in str(error.value)
    if not images:
        return
    data = export(change, skip=True)
    assert message in data.problems[0]
    assert len(data) == images
    assert sum(len(data[i][1]["labels"]) for i in range(images)) == objects


def test_the_good_polygons_of_an_object_are_its_mask(export: Callable[..., Coco]) -> None:
    known = export(nothing)[0][1]["masks"]
    masks = export(of("annotations", 0, segmentation=ODD), skip=True)[0][1]["masks"]
    assert torch.equal(masks, known)


def test_all_that_is_left_out_is_said(export: Callable[..., Coco]) -> None:
    """Masks that CVAT exports as crowds, of which COCO's own training takes none; boxes that reach
    out of their images; and kinds of kinds that have no objects."""
    data = export(of("annotations", 0, iscrowd="1"))
    assert data.notes == ["areas of many objects (iscrowd), which are not trained on: 1"]
    assert data[0][1]["labels"].tolist() == [2]
    with pytest.raises(DataError, match=r"no image has a box.*iscrowd\), which are not trained.*3"):
        export(each("annotations", iscrowd=1))
    assert not export(of("annotations", 0, iscrowd=True), crowds=True).notes
    data = export(of("annotations", 0, bbox=[-3, 6, 20, 10]))
    assert data.notes == ["boxes that reach out of their images, and were cut: 1"]
    assert data[0][1]["boxes"][0].tolist() == [0, 6, 17, 16]
    assert not export(of("annotations", 0, bbox=[-0.5, 6, 20.5, 10])).notes
    data = export(of("annotations", 0, attributes={"occluded": False, "rotation": 30.0}))
    assert data.notes == ["boxes with a rotation, which is not applied: 1"]
    assert not export(of("annotations", 0, attributes={"rotation": 0.0})).notes
    data = export(of("images", 1, file_name="a.png"))
    assert data.notes == ["images whose file is another's, too: 1"]
    animals = also("categories", id=8, name="animal", supercategory="none")
    kinds = both(ROOT, of("categories", 0, supercategory="animal"), animals)
    data = export(kinds)
    assert data.notes == ["categories that only group others: pet, animal, left out"]
    with_objects = export(both(ROOT, of("annotations", 0, category_id=0)))
    assert (with_objects.classes, with_objects.notes) == (["pet", "cat", "dog"], [])


def test_fractions_are_no_pixels(export: Callable[..., Coco]) -> None:
    """As Azure's labelling exports them."""
    fractions = each("annotations", bbox=lambda box: [box[0] / WIDTH, box[1] / HEIGHT, 0.2, 0.2])
    with pytest.raises(DataError, match="all boxes lie between 0 and 1; expected pixels"):
        export(fractions, skip=True)


RED = (250, 10, 20)


def turned(path: Path, orientation: int, width: int, height: int) -> tuple[list[int], list[int]]:
    """Write an image with a red box that EXIF data turn; returns the box stored and upright."""
    stored = Image.new("RGB", (width, height))
    stored.paste(RED, (5, 6, 25, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(path, exif=exif)
    left, top = 5, 6
    right, bottom = width - 25, height - 16
    corners = {1: (left, top), 2: (right, top), 3: (right, bottom), 4: (left, bottom)}
    corners |= {5: (top, left), 6: (bottom, left), 7: (bottom, right), 8: (top, right)}
    x, y = corners[orientation]
    return [5, 6, 20, 10], [x, y, *((10, 20) if orientation > 4 else (20, 10))]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("annotated", ["upright", "stored"])
def test_boxes_and_masks_are_where_the_object_is_however_an_image_is_turned(
    orientation: int, annotated: str, tmp_path: Path, export: Callable[..., Coco]
) -> None:
    stored, upright = turned(tmp_path / "a.png", orientation, WIDTH, HEIGHT)
    box, size = (stored, (WIDTH, HEIGHT)) if annotated == "stored" else (upright, (WIDTH, HEIGHT))
    if annotated == "upright" and orientation > 4:
        size = HEIGHT, WIDTH
    change = both(
        of("images", 0, width=size[0], height=size[1]),
        of("annotations", 0, bbox=box, segmentation=[polygon(*box)]),
        lambda content: content["annotations"].pop(1),
    )
    said = None if orientation > 4 else annotated  # where the size says it
    image, target = export(change, annotated=said)[0]
    red = (image == torch.tensor(RED)[:, None, None]).all(0)
    assert int(red.sum()) == 200
    assert torch.equal(target["masks"][0].bool(), red)
    x, y, w, h = box
    assert target["boxes"].tolist() == [[x, y, x + w, y + h]]
    if orientation in (2, 3, 4):
        with pytest.raises(OSError, match="say by --annotated upright or --annotated stored"):
            export(change)[0]


def test_square_images_that_are_turned_are_refused_unless_told(
    tmp_path: Path, export: Callable[..., Coco]
) -> None:
    turned(tmp_path / "a.png", 6, 50, 50)
    square = of("images", 0, width=50, height=50)
    with pytest.raises(OSError, match=r"a\.png: its EXIF data turn it.*--annotated"):
        export(square)[0]
    for annotated, place in (("upright", (5, 34)), ("stored", (6, 5))):
        image, _ = export(square, annotated=annotated)[0]
        red = (image == torch.tensor(RED)[:, None, None]).all(0)
        assert red.nonzero().min(0).values.tolist() == list(place)


def test_label_studios_boxes_of_turned_images_are_refused(
    tmp_path: Path, export: Callable[..., Coco]
) -> None:
    """It writes the stored size beside boxes of the upright image."""
    turned(tmp_path / "a.png", 6, WIDTH, HEIGHT)

    def from_label_studio(content: dict[str, Any]) -> None:
        content["info"] = {"contributor": "Label Studio"}

    data = export(from_label_studio)
    with pytest.raises(DataError, match=r"a\.png: its EXIF data turn it, for which Label Studio"):
        data[0]
    assert len(data[1][1]["labels"]) == 1
