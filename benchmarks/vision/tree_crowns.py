"""Detection of tree crowns in aerial images, trained from nothing on about 600 boxes.

    python benchmarks/vision/tree_crowns.py [--quick] [--validate] [--attention none]

cuts the four annotated images of the package deepforest (pip install --no-deps deepforest==2.1.0)
into tiles in COCO's layout, trains a small backbone with Faster R-CNN on them by ``setformer train
detect``, and measures it on tiles of parts of the images that no training tile has a pixel of. It
prints COCO's AP at IoU 0.5 there, beside that of boxes of the usual size on a grid, a guess without
looking, and writes a picture of what was found beside what is there.

``--attention`` gives the backbone another one, or none, and the same parameters by the MLPs' width.
``--validate`` leaves the held-out parts alone, and holds out as much of what is trained on: for
choices. ``--quick`` takes a minute, and fails if it learns too little. Further options go to the
training.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

from setformer_ext import cli
from setformer_ext.cli.train.coco import Coco
from setformer_ext.vision.detection import from_card

TILE = 256
KEPT = 0.4  # share of a crown's area that has to be inside a tile; as much is annotated at borders
HELD_OUT = {  # pixels at the right of each image
    "2019_YELL_2_528000_4978000_image_crop2": 3 * TILE,
    "2019_YELL_2_541000_4977000_image_crop": 2 * TILE,
    "OSBS_029": 144,
    "SOAP_061": 144,
}
TRAINING = (
    "--detector=faster_rcnn",
    "--detector-options",
    "box_batch_size_per_image=64",
    "rpn_post_nms_top_n_train=500",
    "rpn_post_nms_top_n_test=300",
    "--model=setformer_mini",
    "--pyramid-channels=64",
    "--group-norm",
    "--min-size=256",
    "--max-size=256",
    "--anchor-sizes",
    *("16", "32", "64", "96", "128"),
    "--scale-jitter",
    *("0.8", "1.6"),
    "--vertical-flip=0.5",
    "--batch-size=2",
    "--lr=1e-3",
    "--ema-decay=0.99",
    "--workers=1",
    "--model-options",  # the last: attention and width of the MLPs follow
    "dims=(32,64,128,160)",
    "depths=(1,2,2,1)",
    "num_references=(16,16,16,16)",
)
MLP_RATIOS = {"set": 3.0, "softmax": 2.84, "mean": 4.28, "none": 4.76}  # by attention
# AP50 that --quick asks for. After so few steps chance decides, so this is far below what seed 0
# gives, 0.113, and above the 0.008 of boxes on a grid.
QUICK_FLOOR = 0.02


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a minute: does it learn?")
    parser.add_argument("--steps", type=int, default=1800, help="of 2 tiles (default: %(default)s)")
    parser.add_argument("--attention", choices=MLP_RATIOS, default="set")
    parser.add_argument("--validate", action="store_true", help="measure on other parts: to choose")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--images",
        type=Path,
        help="folder of the package's images (default: where it is installed)",
    )
    parser.add_argument("--output", type=Path, default=Path("tree_crowns"))
    options, more = parser.parse_known_args()
    images = options.images or _package_images(parser)
    if options.quick:
        options.steps = 150
    data = options.output / "coco"
    for split in ("train", "val"):
        write_coco(images, data, split, options.validate)
    run = options.output / "run"
    shutil.rmtree(run, ignore_errors=True)
    given = ["train", "detect", f"--data={data}", f"--output={run}", *TRAINING]
    given += [f"attention={options.attention}", f"mlp_ratio={MLP_RATIOS[options.attention]}"]
    given += [f"--steps={options.steps}", f"--seed={options.seed}", *more]
    # A single evaluation at the end: the best of several would be chosen by the held-out tiles.
    status = cli.main([*given, f"--eval-every={options.steps}"])
    if status:
        return status
    known = held_out(data)
    blind = blind_precision(data, known)
    best = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["best"]["AP50"]
    picture = options.output / "tree_crowns.png"
    draw(run, known, picture)
    print(f"\nAP50 on {len(known)} held-out tiles: {best:.3f} (boxes on a grid: {blind:.3f})")
    print(f"Picture: {picture}")
    if options.quick and best < QUICK_FLOOR:
        print(f"an AP50 of {best:.3f} is below {QUICK_FLOOR}", file=sys.stderr)
        return 1
    return 0


def _package_images(parser: argparse.ArgumentParser) -> Path:
    # Not imported: the package wants many others.
    found = importlib.util.find_spec("deepforest")
    if found is None or found.origin is None:
        parser.error(
            "the images are in a package that is not installed: "
            "pip install --no-deps deepforest==2.1.0"
        )
    return Path(found.origin).parent / "data"


def write_coco(images: Path, data: Path, split: str, validate: bool = False) -> None:
    """Write the tiles of one split and their boxes in COCO's layout.

    With ``validate`` as if the images ended where their held-out parts begin.
    """
    folder = data / f"{split}2017"
    folder.mkdir(parents=True, exist_ok=True)
    (data / "annotations").mkdir(exist_ok=True)
    content: dict[str, list] = {"images": [], "annotations": [], "categories": []}
    content["categories"].append({"id": 1, "name": "tree"})
    for name, held_out_width in HELD_OUT.items():
        pixels = np.asarray(Image.open(images / f"{name}.png").convert("RGB"))
        boxes = read_boxes(images / f"{name}.xml")
        height, width = pixels.shape[:2]
        if validate:
            width -= held_out_width
        border = width - held_out_width
        left, right = (0, border) if split == "train" else (border, width)
        # Tiles to train on overlap by half: a crown that one cuts is whole in another.
        step = TILE // 2 if split == "train" else TILE
        for y in _starts(0, height, step):
            for x in _starts(left, right, step):
                corner = (x, y, min(x + TILE, right), min(y + TILE, height))
                _add_tile(content, folder, name, pixels, boxes, corner)
    path = data / "annotations" / f"instances_{split}2017.json"
    path.write_text(json.dumps(content), encoding="utf-8")


def _starts(first: int, end: int, step: int) -> Iterator[int]:
    """Where tiles start; the last one ends at the end, or is all there is."""
    if end - first <= TILE:
        yield first
        return
    yield from range(first, end - TILE, step)
    yield end - TILE


def _add_tile(
    content: dict[str, list],
    folder: Path,
    name: str,
    pixels: np.ndarray,  # [H, W, 3] uint8
    boxes: np.ndarray,  # [N, 4]
    corner: tuple[int, int, int, int],
) -> None:
    x0, y0, x1, y1 = corner
    file = f"{name}_{x0}_{y0}.png"
    Image.fromarray(pixels[y0:y1, x0:x1]).save(folder / file)
    number = len(content["images"]) + 1
    content["images"].append({"id": number, "file_name": file, "width": x1 - x0, "height": y1 - y0})
    inside = np.clip(boxes, [x0, y0, x0, y0], [x1, y1, x1, y1])
    areas, whole = ((b[:, 2:] - b[:, :2]).prod(1) for b in (inside, boxes))
    for box in inside[areas >= KEPT * whole] - [x0, y0, x0, y0]:
        width, height = (box[2:] - box[:2]).tolist()
        content["annotations"].append(
            {
                "id": len(content["annotations"]) + 1,
                "image_id": number,
                "category_id": 1,
                "bbox": [*box[:2].tolist(), width, height],
                "area": width * height,
                "iscrowd": 0,
            }
        )


def read_boxes(path: Path) -> np.ndarray:  # -> [N, 4]
    """Corners of the boxes of a file in Pascal VOC's XML, in pixels from 0 on."""
    corners = [
        [float(thing.findtext(f"bndbox/{key}", "nan")) for key in ("xmin", "ymin", "xmax", "ymax")]
        for thing in ET.parse(path).getroot().iter("object")
    ]
    return np.array(corners) - [1, 1, 0, 0]  # VOC counts pixels from 1, the last included


def held_out(data: Path) -> Coco:
    """The held-out tiles, as ``setformer train detect`` reads them."""
    folder, file = data / "val2017", data / "annotations" / "instances_val2017.json"
    return Coco(folder, file, masks=False, crowds=True)


def blind_precision(data: Path, known: Coco) -> float:
    """AP50 of boxes of the training crowns' mean size, side by side on every tile."""
    content = json.loads(
        (data / "annotations" / "instances_train2017.json").read_text(encoding="utf-8")
    )
    size = np.mean([thing["bbox"][2:] for thing in content["annotations"]])
    metric = MeanAveragePrecision(backend="pycocotools")
    for image, target in (known[i] for i in range(len(known))):
        height, width = image.shape[-2:]
        y, x = torch.meshgrid(
            torch.arange(size / 2, height, size), torch.arange(size / 2, width, size), indexing="ij"
        )
        centres = torch.stack([x, y], -1).view(-1, 2)
        boxes = torch.cat([centres - size / 2, centres + size / 2], 1)
        ones = torch.ones(len(boxes))
        metric.update([{"boxes": boxes, "scores": ones, "labels": ones.long()}], [target])
    return metric.compute()["map_50"].item()


@torch.no_grad()
def draw(run: Path, known: Coco, path: Path, columns: int = 4) -> None:
    """Above what is annotated, below what was found, on the tiles with the most crowns."""
    model: Any = from_card(json.loads((run / "card.json").read_text(encoding="utf-8")))
    model.load_state_dict(load_file(run / "model.safetensors"))
    model.eval()
    fullest = sorted(range(len(known)), key=lambda i: -len(known[i][1]["boxes"]))[:columns]
    figure = Figure(figsize=(3.4 * columns, 7.4), layout="constrained", facecolor="black")
    axes = figure.subplots(2, columns)
    for column, index in enumerate(fullest):
        image, target = known[index]
        answer = model([image / 255])[0]
        sure = answer["scores"] > 0.5
        _show(axes[0, column], image, target["boxes"], "#f0e442")
        _show(axes[1, column], image, answer["boxes"][sure], "#56b4e9")
    figure.suptitle("held-out tiles: crowns annotated (above), found (below)", color="white")
    figure.savefig(path, dpi=100)


def _show(axes: Any, image: Tensor, boxes: Tensor, colour: str) -> None:
    axes.imshow(image.permute(1, 2, 0).numpy())
    axes.set_axis_off()
    for x0, y0, x1, y1 in boxes.tolist():
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour))


if __name__ == "__main__":
    sys.exit(main())
