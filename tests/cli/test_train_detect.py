"""Detection: COCO's files read as pycocotools reads them, or named; training measures rightly."""

import argparse
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState, PartialState
from PIL import Image
from pycocotools import mask as run_lengths
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.ops import masks_to_boxes

from setformer_ext import cli
from setformer_ext.cli.images import read_image
from setformer_ext.cli.train.coco import Coco
from setformer_ext.cli.train.detect import AveragePrecision, Detect
from setformer_ext.cli.train.task import DataError
from setformer_ext.vision.detection import from_card
from training import launch, options_of

TINY = (
    "--model=setformer_mini",
    "--model-options",
    "dims=(32,32,32,32)",
    "depths=(1,1,1,1)",
    "num_references=(4,4,4,4)",
    "--pyramid-channels=32",
    "--min-size=64",
    "--max-size=96",
    "--anchor-sizes",
    *("12", "24", "36", "48", "64"),
    "--workers=0",
    "--detector-options",
    "box_batch_size_per_image=32",
    "rpn_post_nms_top_n_train=100",
    "rpn_post_nms_top_n_test=100",
)  # what follows may add to these options
CATEGORIES = [{"id": 90, "name": "square"}, {"id": 7, "name": "bar"}]
COLOURS = {90: (230, 60, 40), 7: (60, 120, 240)}


@pytest.fixture(autouse=True)
def fresh_processes() -> None:
    """Accelerate keeps the precision of the first training of a process."""
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)


def write_shapes(root: Path, train: int, val: int) -> Path:
    """Squares and bars on noise, one or two an image, now and then none; masks in all three forms,
    and a crowd."""
    random = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train2017", train), ("val2017", val)):
        (root / split).mkdir()
        content: dict[str, list] = {"images": [], "annotations": [], "categories": CATEGORIES}
        for number in range(count):
            width, height = (int(s) for s in random.integers(60, 80, 2))
            pixels = random.integers(90, 160, (height, width, 3), dtype=np.uint8)
            image = {"id": 1000 + number, "width": width, "height": height}
            content["images"].append({**image, "file_name": f"{number}.png"})
            for half in range(0 if number % 5 == 4 else 1 + number % 2):
                kind = int(random.choice([90, 7]))
                w, h = (20, 20) if kind == 90 else (26, 10)
                x = int(random.integers(0, width - w))
                y = int(random.integers(0, height // 2 - h)) + half * (height // 2)
                pixels[y : y + h, x : x + w] = COLOURS[kind]
                mask = np.zeros((height, width), np.uint8)
                mask[y : y + h, x : x + w] = 1
                content["annotations"].append(
                    {
                        "id": 500 + len(content["annotations"]),
                        "image_id": image["id"],
                        "category_id": kind,
                        "bbox": [x, y, w, h],
                        "area": w * h,
                        "iscrowd": int(number == 8),
                        "segmentation": segmentation(mask, (x, y, w, h), form=number % 3),
                    }
                )
            Image.fromarray(pixels).save(root / split / f"{number}.png")
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def segmentation(mask: np.ndarray, box: tuple[int, int, int, int], form: int) -> Any:
    """A polygon, run lengths, or compressed run lengths."""
    x, y, w, h = box
    if form == 0:
        return [[x, y, x + w, y, x + w, y + h, x, y + h]]
    if form == 1:
        steps = np.flatnonzero(np.diff(np.r_[0, mask.flatten("F"), 0]))
        counts = np.diff(np.r_[0, steps, mask.size]).tolist()
        return {"size": list(mask.shape), "counts": counts}
    encoded = run_lengths.encode(np.asfortranarray(mask))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode()}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes"), train=40, val=20)


def open_coco(root: Path, split: str = "train2017", **more: Any) -> Coco:
    file = root / "annotations" / f"instances_{split}.json"
    return Coco(root / split, file, **({"masks": True, "crowds": True} | more))


def pycocotools_coco(root: Path, split: str) -> COCO:
    with redirect_stdout(StringIO()):
        return COCO(str(root / "annotations" / f"instances_{split}.json"))


def parsed(data: Path, *more: str) -> argparse.Namespace:
    return options_of(Detect, f"--data={data}", *TINY, *more)


def test_samples_are_what_pycocotools_reads(shapes: Path) -> None:
    known, data = pycocotools_coco(shapes, "train2017"), open_coco(shapes)
    assert data.classes == ["bar", "square"]
    assert len(data) == len(known.imgs)
    empty = 0
    for record, (image, target) in zip(data.images, (data[i] for i in range(40)), strict=True):
        things = known.imgToAnns[record["id"]]
        empty += not things
        assert image.shape == (3, record["height"], record["width"])
        with Image.open(record["path"]) as file:
            np.testing.assert_array_equal(image.permute(1, 2, 0), np.asarray(file))
        assert target["labels"].tolist() == [1 + (t["category_id"] == 90) for t in things]
        assert target["crowd"].tolist() == [bool(t["iscrowd"]) for t in things]
        assert target["boxes"].shape == (len(things), 4)
        for mask, box, thing in zip(target["masks"], target["boxes"], things, strict=True):
            np.testing.assert_array_equal(mask, known.annToMask(thing))
            x, y, w, h = thing["bbox"]
            assert box.tolist() == [x, y, x + w, y + h]
    assert empty == 8
    crowds = sum(t["iscrowd"] for t in known.anns.values())
    assert crowds == 1
    without = open_coco(shapes, crowds=False)
    assert sum(map(len, without.objects.values())) == len(known.anns) - crowds


Change = Callable[[dict[str, Any]], None]


def first(key: str, value: Any) -> Change:
    """Put a value into the first annotation."""

    def change(content: dict[str, Any]) -> None:
        content["annotations"][0][key] = value

    return change


def in_image(key: str, value: Any) -> Change:
    def change(content: dict[str, Any]) -> None:
        content["images"][1][key] = value

    return change


FAR = [[0, 0, 1e9, 0, 1e9, 1e9]]
BROKEN: list[tuple[Change, str]] = [
    (first("bbox", [3, 4, 0, 5]), "annotation 500: bbox must be [x, y, width > 0, height > 0]"),
    (first("bbox", [3, 4, 5]), "annotation 500: bbox must be"),
    (first("bbox", ["3px", 4, 5, 6]), "got ['3px', 4, 5, 6]"),
    (first("bbox", [-(10**400), 4, 5.5, 6]), "annotation 500: bbox must be"),
    (first("bbox", [900, 4, 5, 6]), "annotation 500: bbox [900, 4, 5, 6] is outside its image of"),
    (first("bbox", [1, -9, 5, 9]), "is outside its image of"),
    (first("category_id", 8), "annotation 500: category_id 8 is not among the category ids"),
    (first("image_id", 3), "annotation 500: image_id 3 is not among the image ids"),
    (first("image_id", [3]), "image_id [3] is not among"),
    (first("id", 501), "annotation 501: its id is taken"),
    (first("iscrowd", "some"), "annotation 500: iscrowd must be 0 or 1, got 'some'"),
    (
        lambda content: content["annotations"].insert(0, 3),
        "number 0: expected an object with an id",
    ),
    (first("segmentation", None), "expected polygons or run lengths, got None"),
    (first("segmentation", []), "expected polygons or run lengths, got []"),
    (first("segmentation", [[1, 2, 3, 4]]), "three points or more, got [1, 2, 3, 4]"),
    (first("segmentation", [[1, 2, 3, 4, 5, 6, 7]]), "three points or more"),
    (first("segmentation", FAR), "a polygon is far outside its image"),
    (first("segmentation", {"size": [1, 2], "counts": [2]}), "size must be"),
    (in_image("width", 0), "image 1001: width must be a whole number above 0, got 0"),
    (in_image("width", 10**400), "image 1001: width must be a whole number above 0, got 1000"),
    (in_image("file_name", None), "image 1001: file_name must be a name, got None"),
    (in_image("file_name", "gone.png"), "image 1001: there is no file"),
]


@pytest.fixture
def broken(shapes: Path, tmp_path: Path) -> Callable[[Change], Path]:
    """A copy of the shapes whose training annotations are changed."""
    shutil.copytree(shapes, tmp_path / "data")
    file = tmp_path / "data" / "annotations" / "instances_train2017.json"

    def write(change: Change) -> Path:
        content = json.loads((shapes / "annotations" / file.name).read_text())
        change(content)
        file.write_text(json.dumps(content))
        return tmp_path / "data"

    return write


def test_what_is_wrong_is_named_or_left_out(broken: Callable[[Change], Path]) -> None:
    for change, message in BROKEN:
        data = broken(change)
        with pytest.raises(DataError) as error:
            open_coco(data)
        text = str(error.value)
        assert message in text
        assert text.startswith(str(data / "annotations" / "instances_train2017.json"))
        assert text.endswith("(--on-error skip: go on without)")
        rest = open_coco(data, skip=True)
        assert message in rest.problems[0]
        assert len(rest) == 40 - ("image 1001" in rest.problems[0])
        for index in range(3):
            rest[index]
    without_masks = open_coco(broken(first("segmentation", None)), masks=False)
    assert not without_masks.problems


def test_files_that_are_not_cocos(shapes: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    file = root / "annotations" / "instances_train2017.json"

    def error() -> str:
        with pytest.raises(DataError) as raised:
            open_coco(root)
        return str(raised.value)

    assert f"--data: there is no {file}; expected COCO's layout" in error()
    file.parent.mkdir(parents=True)
    file.write_text("{")
    assert f"there is no {root / 'train2017'}" in error()
    (root / "train2017").mkdir()
    assert f"{file}: not JSON" in error()
    content = json.loads((shapes / "annotations" / file.name).read_text())
    file.write_text(json.dumps(content | {"x": float("nan")}))
    assert f"{file}: not JSON: NaN is no number" in error()
    for text in ("[]", "{}", '{"images": 3}'):
        file.write_text(text)
        assert f"{file}: expected COCO's format, with a list of images" in error()
    file.write_text(json.dumps(content | {"images": []}))
    assert f"{file}: has no images" in error()
    file.write_text(json.dumps(content | {"categories": [{"id": 1}]}))
    assert f"{file}: category 1: name must be a text, got None" in error()
    file.write_text(json.dumps(content | {"categories": [*CATEGORIES, {"id": 7, "name": "a"}]}))
    assert "category 7: its id is taken" in error()
    file.write_text(json.dumps(content | {"annotations": []}))
    shutil.copytree(shapes / "train2017", root / "train2017", dirs_exist_ok=True)
    assert f"{file}: no image has a box that could be used" in error()


def test_masks_and_images_that_do_not_fit(broken: Callable[[Change], Path]) -> None:
    """Found when a sample is read; too short run lengths would show memory's old content."""
    for counts in ("0", "", "zzz", "oo9", "\u00e9", "P1"):

        def change(content: dict[str, Any], counts: str = counts) -> None:
            size = [content["images"][0]["height"], content["images"][0]["width"]]
            content["annotations"][0]["segmentation"] = {"size": size, "counts": counts}

        data = open_coco(broken(change))
        with pytest.raises(DataError, match="annotation 500: segmentation cannot be decoded"):
            data[0]
    folder = broken(in_image("width", 59))
    with pytest.raises(DataError, match=r"1\.png: is \d+ x \d+, but .*2017.json says 59 x \d+"):
        open_coco(folder, masks=False, skip=True)[1]


def test_categories_that_training_lacks(shapes: Path, tmp_path: Path) -> None:
    shutil.copytree(shapes, tmp_path / "data")
    file = tmp_path / "data" / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    content["categories"] = [{"id": 90, "name": "square"}, {"id": 7, "name": "ring"}]
    file.write_text(json.dumps(content))
    options = parsed(tmp_path / "data")
    with pytest.raises(DataError, match=r"val2017.json: annotation \d+: .* categories lack 'ring'"):
        Detect(options)
    options.on_error = "skip"
    task = Detect(options)
    rings = sum(thing["category_id"] == 7 for thing in content["annotations"])
    assert len(task.eval.problems) == rings
    assert f"{rings} records were left out: {file}: annotation" in task.describe()


def test_a_class_without_objects_to_train_on(broken: Callable[[Change], Path]) -> None:
    def add(content: dict[str, Any]) -> None:
        content["categories"].append({"id": 95, "name": "star"})

    data = broken(add)
    with pytest.raises(DataError, match=r"has no object of star \(--on-error skip: go on without"):
        Detect(parsed(data))
    options = parsed(data)
    options.on_error = "skip"
    assert "no object to train on of star" in Detect(options).describe()


def test_what_was_merged_or_left_out_is_described(broken: Callable[[Change], Path]) -> None:
    """Categories as Roboflow exports them: a root of all, and a parent of its child's name."""

    def change(content: dict[str, Any]) -> None:
        for category in content["categories"]:
            category["supercategory"] = "shape"
        content["categories"] += [{"id": 0, "name": "shape"}, {"id": 1, "name": "bar"}]

    task = Detect(parsed(broken(change)))
    assert task.train.classes == ["bar", "square"]
    text = task.describe()
    notes = (
        "the categories 1, 7 are all 'bar' and were merged",
        "categories that only group others: shape, left out",
        "areas of many objects (iscrowd), which are not trained on: 1",
    )
    assert text.endswith("".join(f"; instances_train2017.json: {note}" for note in notes))


def test_images_of_more_pixels_than_allowed_are_refused(shapes: Path) -> None:
    with pytest.raises(OSError, match=r"0\.png: more than 99 pixels .*--max-pixels"):
        Detect(parsed(shapes, "--max-pixels=99")).train[0]


@pytest.mark.parametrize("more", [(), ("--scale-jitter", "0.1", "2")])
def test_images_a_pixel_thin_are_trained_on(
    more: tuple[str, ...], broken: Callable[[Change], Path]
) -> None:
    """Whose shorter side nothing would be left of at the training's size."""
    sizes = [(1, 700), (700, 1), (1, 1)]

    def change(content: dict[str, Any]) -> None:
        content["annotations"] = content["annotations"][:3]
        for number, (width, height) in enumerate(sizes):
            content["images"][number] |= {"width": width, "height": height}
            content["annotations"][number] |= {
                "image_id": 1000 + number,
                "category_id": (7, 90, 7)[number],
                "bbox": [0, 0, width, height],
                "segmentation": [[0, 0, width, 0, width, height, 0, height]],
            }

    data = broken(change)
    for number, size in enumerate(sizes):
        Image.new("RGB", size).save(data / "train2017" / f"{number}.png")
    task = Detect(parsed(data, *more))
    torch.manual_seed(0)
    model = task.make_model().train()
    for _ in range(5):
        losses = task.losses(model, task.collate([task.train[number] for number in range(3)]))
        assert all(loss.isfinite() for loss in losses.values())


def test_augmented_boxes_are_those_of_the_augmented_masks(shapes: Path) -> None:
    more = ("--scale-jitter", "0.5", "2", "--flip=0.5", "--vertical-flip=0.5", "--photometric")
    data = Detect(parsed(shapes, *more)).train
    torch.manual_seed(0)
    boxes = 0
    for index in range(40):
        image, target = data[index]
        assert image.shape == (3, 64, 64)
        assert image.dtype == torch.float32
        assert 0 <= image.min() < image.max() <= 1
        assert len(target["labels"]) == len(target["masks"]) == len(target["boxes"])
        assert type(image) is type(target["boxes"]) is torch.Tensor
        seen = target["masks"].flatten(1).any(1)
        inside = masks_to_boxes(target["masks"][seen])
        inside[:, 2:] += 1
        assert ((inside - target["boxes"][seen]).abs() < 2).all()
        boxes += len(inside)
    assert boxes > 20


def train(data: Path, output: Path, *more: str) -> dict[str, Any]:
    given = ["train", "detect", f"--data={data}", f"--output={output}", *TINY, *more]
    assert cli.main(given) == 0
    return json.loads((output / "metrics.json").read_text())


@torch.no_grad()
def cocoeval(data: Path, output: Path, kind: str) -> list[float]:
    """AP, AP50 and AP75 of the exported weights, from results as COCO's own server takes them."""
    card = json.loads((output / "card.json").read_text())
    model = from_card(card)
    model.load_state_dict(load_file(output / "model.safetensors"))
    model.eval()
    known = pycocotools_coco(data, "val2017")
    ids = {c["name"]: c["id"] for c in known.dataset["categories"]}
    results = []
    for record in known.dataset["images"]:
        pixels = np.asarray(read_image(data / "val2017" / record["file_name"]))
        answer = model([torch.tensor(pixels).permute(2, 0, 1) / 255])[0]
        for place, (x0, y0, x1, y1) in enumerate(answer["boxes"].tolist()):
            result = {
                "image_id": record["id"],
                "category_id": ids[card["classes"][int(answer["labels"][place]) - 1]],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "score": answer["scores"][place].item(),
            }
            if kind == "segm":
                mask = (answer["masks"][place, 0] > 0.5).numpy()
                del result["bbox"]
                result["segmentation"] = run_lengths.encode(np.asfortranarray(mask, np.uint8))
            results.append(result)
    with redirect_stdout(StringIO()):
        evaluation = COCOeval(known, known.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[:3].tolist()


@pytest.mark.slow
def test_it_learns_and_measures_as_cocoeval(shapes: Path, tmp_path: Path) -> None:
    """A training of boxes, on images with and without objects, of two classes."""
    given = (
        "--detector=faster_rcnn",
        "--steps=90",
        "--batch-size=4",
        "--lr=2e-3",
        "--eval-every=45",
    )
    result = train(shapes, tmp_path / "out", *given, "--ema-decay=0.9")
    best = result["best"]
    assert best["AP50"] > 0.4
    figures = [best["mAP"], best["AP50"], best["AP75"]]
    assert figures == pytest.approx(cocoeval(shapes, tmp_path / "out", "bbox"), abs=0.005)


@pytest.mark.slow
@pytest.mark.parametrize("detector", ["mask_rcnn", "retinanet"])
def test_other_detectors_train_and_measure(detector: str, shapes: Path, tmp_path: Path) -> None:
    given = (f"--detector={detector}", "--steps=30", "--batch-size=4", "--lr=3e-3")
    if detector == "retinanet":
        given = ("--detector-options", "score_thresh=0.0", *given)
    else:  # fewer masks to paste
        given = ("box_detections_per_img=10", *given)
    result = train(shapes, tmp_path / "out", *given, "--eval-every=30", "--ema-decay=0")
    last = result["last"]
    kinds = {"bbox": ""} | ({"segm": "mask_"} if detector == "mask_rcnn" else {})
    for kind, prefix in kinds.items():
        figures = [last[f"{prefix}{name}"] for name in ("mAP", "AP50", "AP75")]
        assert figures == pytest.approx(cocoeval(shapes, tmp_path / "out", kind), abs=0.005)
        assert figures[1] > 0


class Answers(nn.Module):
    """In place of a detector: the answer to an image is found by its first pixel."""

    def __init__(self, answers: list[dict[str, Tensor]]) -> None:
        super().__init__()
        self.answers = answers

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return [dict(self.answers[int(image[0, 0, 0])]) for image in images]


def measure(part: slice, path: Path | None = None) -> dict[str, float]:
    """The figures of five images, of which this process has a part."""
    generator = torch.Generator().manual_seed(0)
    answers, targets = [], []
    for count in (2, 1, 3, 0, 2):
        corners = torch.rand(count, 2, generator=generator) * 15
        boxes = torch.cat([corners, corners + 12], 1)
        masks = torch.zeros(count, 32, 32, dtype=torch.uint8)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.long().tolist(), strict=True):
            mask[y0:y1, x0:x1] = 1
        labels = torch.randint(1, 3, (count,), generator=generator)
        crowd = torch.arange(count) == 2
        targets.append({"boxes": boxes, "labels": labels, "masks": masks, "crowd": crowd})
        answers.append(
            {
                "boxes": boxes + 2 * torch.randn(count, 4, generator=generator),
                "labels": labels,
                "scores": torch.rand(count, generator=generator),
                "masks": masks.roll(1, 2)[:, None].float(),
            }
        )
    metrics = AveragePrecision(masks=True)
    for number in range(5)[part]:
        image = torch.full((3, 32, 32), float(number))
        metrics.update(Answers(answers), ([image], [targets[number]]))
    result = metrics.compute()
    if path is not None:
        path.write_text(json.dumps(result))
    return result


def measure_in_process(folder: Path) -> None:
    rank = PartialState(cpu=True).process_index
    measure(slice(rank, None, 2), folder / f"{rank}.json")


@pytest.mark.slow
def test_processes_with_unequal_numbers_of_images_measure_as_one(tmp_path: Path) -> None:
    """One has three images, the other two; torchmetrics' own gathering aborts here."""
    assert launch(2, measure_in_process, tmp_path) == [0, 0]
    known = measure(slice(None))
    assert 0 < known["mAP"] < known["AP50"]
    assert 0 < known["mask_mAP"] < 1
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == pytest.approx(known)


def test_answers_do_not_depend_on_the_other_images_of_a_batch(shapes: Path) -> None:
    """Images of a batch are padded to one size, over all of which attention would be."""
    task = Detect(parsed(shapes, "--detector=retinanet", "--detector-options", "score_thresh=0.0"))
    torch.manual_seed(0)
    model = task.make_model().eval()
    samples = [task.eval[index] for index in range(5)]
    seen: list[list[Tensor]] = []
    for size in (1, 5):
        metrics = task.metrics()
        with torch.no_grad():
            for start in range(0, 5, size):
                metrics.update(model, task.collate(samples[start : start + size]))
        seen.append(metrics.metric.detection_box)
    assert len({image.shape for image, _ in samples}) > 1
    for alone, together in zip(*seen, strict=True):
        assert len(alone) > 0
        torch.testing.assert_close(alone, together)


def test_pretrained_weights_of_a_classifier(shapes: Path, tmp_path: Path) -> None:
    options = {"dims": (32,) * 4, "depths": (1,) * 4, "num_references": (4,) * 4}
    classifier = timm.create_model("setformer_mini", num_classes=5, **options)
    save_file(classifier.state_dict(), tmp_path / "weights.safetensors")
    task = Detect(parsed(shapes, f"--pretrained={tmp_path / 'weights.safetensors'}"))
    body = task.make_model().backbone.body.model.state_dict()
    assert len(body) > 50
    for name, tensor in body.items():
        assert torch.equal(tensor, classifier.state_dict()[name]), name


def test_options_that_do_not_work(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def error(*more: str) -> str:
        given = ["train", "detect", f"--data={shapes}", f"--output={tmp_path}/out", *TINY]
        assert cli.main([*given, "--steps=1", *more]) == 1
        text = capsys.readouterr().err
        assert text.count("\n") == 1
        return text

    assert "--model: timm knows no 'setformer_huge'" in error("--model=setformer_huge")
    assert "vit_tiny_patch16_224: backbone: expected feature maps at strides" in error(
        "--model=vit_tiny_patch16_224", "--model-options", "img_size=224"
    )
    assert "--min-size: expected at most --max-size, 96, got 128" in error("--min-size=128")
    assert "--scale-jitter: expected LOW <= HIGH" in error("--scale-jitter", "2", "1")
    assert "unexpected keyword argument 'boxes'" in error("--detector-options", "boxes=3")
    assert "unexpected keyword argument 'width'" in error("--model-options", "width=3")
