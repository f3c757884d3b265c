"""Data sets of a few copies of one image, in the layout of each training on images."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from setformer_ext.cli.train.classify import Classify
from training import options_of

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, of which timm's models are
COLOUR = (200, 100, 30)


def write_classes(root: Path, image: Image.Image) -> Path:
    for split in ("train", "val"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for number in range(2):
                image.save(root / split / name / f"{number}.png")
    return root


def write_segments(root: Path, image: Image.Image, labels: np.ndarray) -> Path:
    for split in ("training", "validation"):
        for folder, picture in (("images", image), ("annotations", Image.fromarray(labels))):
            (root / folder / split).mkdir(parents=True)
            picture.save(root / folder / split / "0.png")
    return root


def write_boxes(root: Path, image: Image.Image, boxes: list[list[int]]) -> Path:
    """Boxes as x, y, width, height; each has the mask that fills it."""
    content = {
        "images": [{"id": 1, "file_name": "0.png", "width": image.width, "height": image.height}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [
            {
                "id": number,
                "image_id": 1,
                "category_id": 1,
                "bbox": [x, y, w, h],
                "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
            }
            for number, (x, y, w, h) in enumerate(boxes)
        ],
    }
    (root / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (root / split).mkdir()
        image.save(root / split / "0.png")
        text = json.dumps(content)
        (root / "annotations" / f"instances_{split}.json").write_text(text, encoding="utf-8")
    return root


def make_classify(root: Path, *more: str) -> Classify:
    """At 32 x 32, without augmentation that ``more`` does not ask for, but for crops and flips."""
    given = (
        f"--data={root}",
        "--input-size=32",
        "--auto-augment=none",
        *("--color-jitter=0", "--random-erasing=0", "--mixup=0", "--cutmix=0"),
    )
    return Classify(options_of(Classify, *given, *more))
