"""setformer predict: that it answers as the training measured, on any image, and draws it."""

import csv
import json
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco

from setformer_ext import cli
from setformer_ext.cli.predict.answers import Classification, Detection, Segmentation, as_csv
from setformer_ext.cli.predict.drawing import (
    PALETTE,
    REST,
    _colours,
    _draw_classification,
    _draw_detection,
    draw,
)
from setformer_ext.cli.predict.loading import load_run
from setformer_ext.cli.predict.predictors import PREDICTORS
from setformer_ext.errors import UserError
from training import classify, metrics, write_digits


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"), train=200, val=40)


@pytest.fixture(scope="module")
def training(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("training")
    classify(digits, output, "--steps=30", "--batch-size=16", "--lr=3e-3", "--ema-decay=0")
    return output


@pytest.fixture
def copy(training: Path, tmp_path: Path) -> Path:
    """A training to spoil."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("card.json", "model.safetensors"):
        shutil.copy(training / name, folder)
    return folder


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A photograph-like picture: 60 x 90, a gradient and a bright square."""
    levels = np.add.outer(np.arange(60), np.arange(90))[..., None] * np.array([1.0, 0.5, 0.2])
    levels[10:30, 40:60] = 250
    path = tmp_path / "photo.png"
    Image.fromarray(np.uint8(levels.clip(0, 255))).save(path)
    return path


def predict(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    status = cli.main(["predict", *map(str, arguments)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, captured.out, captured.err


@pytest.mark.slow
def test_answers_are_those_that_were_measured(
    digits: Path, training: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The share of right answers is the accuracy that the training reported."""
    files = sorted((digits / "val").rglob("*.png"))
    report = tmp_path / "new" / "answers.json"
    status, out, _ = predict(
        capsys, training, *files, "--output", tmp_path / "new", "--json", report
    )
    assert status == 0
    answers = json.loads(report.read_text())
    assert [answer["image"] for answer in answers] == [str(file) for file in files]
    guesses = [answer["classes"][0]["name"] for answer in answers]
    right = [guess == file.parent.name for guess, file in zip(guesses, files, strict=True)]
    assert np.mean(right) == pytest.approx(metrics(training)["best"]["top1"])
    assert 0.15 < np.mean(right) < 1  # so that agreeing says something
    assert len({answer["picture"] for answer in answers}) == len(files)
    for answer in answers:
        probabilities = [entry["probability"] for entry in answer["classes"]]
        assert probabilities == sorted(probabilities, reverse=True)
        assert f"{answer['classes'][0]['name']} {probabilities[0]:.1%}" in out
        assert is_png(Path(answer["picture"]))


def is_png(path: Path) -> bool:
    with Image.open(path) as image:
        image.load()
        return image.format == "PNG" and min(image.size) > 100


def test_same_image_same_answer_whatever_its_file(training: Path, tmp_path: Path) -> None:
    """Turned by EXIF, in 16 bits, with a palette, or transparent: it is the same picture."""
    from setformer_ext.cli.images import read_image

    grey = np.uint8(np.add.outer(4 * np.arange(30), 3 * np.arange(45)) % 251)
    grey[0, :2] = 0, 255  # so that stretching changes nothing
    plain = Image.fromarray(grey)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    with_hole = plain.convert("LA")
    with_hole.putalpha(Image.fromarray(np.uint8(255 * (grey != 7))))
    files = {
        "plain": plain,
        "deep": Image.fromarray(np.uint16(grey) * 257),
        "palette": plain.convert("RGB").quantize(256),
        "opaque": plain.convert("RGBA"),
    }
    for name, image in files.items():
        image.save(tmp_path / f"{name}.png")
    plain.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    with_hole.save(tmp_path / "hole.png")
    predictor = load_run(training)
    expected = predictor(read_image(tmp_path / "plain.png")).json()
    for name in ("deep", "palette", "opaque", "turned"):
        image = read_image(tmp_path / f"{name}.png")
        assert (image.mode, image.size) == ("RGB", (45, 30)), name
        assert predictor(image).json() == expected, name
    white = np.asarray(read_image(tmp_path / "hole.png"))[grey == 7]
    assert (white == 255).all()


def test_goes_on_after_broken_files(
    training: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(photo.read_bytes()[:-40])
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    files = (tmp_path / "missing.png", broken, text, photo)
    status, out, err = predict(capsys, training, *files, "--output", tmp_path / "out")
    assert status == 1
    assert f"{tmp_path / 'missing.png'}: no such file" in err
    assert f"{broken}: a broken image" in err
    assert f"{text}: not an image" in err
    assert "3 of 4 images could not be read" in err
    assert str(photo) in out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["photo.png"]


def test_folders_are_answered_and_written_as_tables(
    training: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """All images in them that can be read, and none of what systems put beside them."""
    folder = tmp_path / "photos"
    (folder / "inner").mkdir(parents=True)
    for name in ("b.png", "a.png", "inner/a.png", ".hidden.png"):
        shutil.copy(photo, folder / name)
    (folder / "notes.txt").write_text("no image")
    (folder / "broken.jpg").write_text("no image")
    report, table = tmp_path / "a.json", tmp_path / "a.csv"
    given = (training, "--json", report, "--csv", table, "--output", tmp_path / "out", folder)
    status, _, err = predict(capsys, *given)
    assert (status, "1 of 4 images could not be read" in err) == (1, True)
    note = f"1 files are no images by their endings: {folder / 'notes.txt'}\n"
    assert (note in err, ".hidden" in err) == (True, False)
    answers = json.loads(report.read_text())
    files = [str(folder / name) for name in ("a.png", "b.png", "inner/a.png")]
    assert [answer["image"] for answer in answers] == files
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.png", "b.png", "a_2.png"}
    with table.open() as file:
        rows = list(csv.DictReader(file))
    expected = [
        (answer["image"], entry["name"], entry["probability"])
        for answer in answers
        for entry in answer["classes"]
    ]
    assert [(row["image"], row["name"], float(row["probability"])) for row in rows] == expected
    empty = tmp_path / "empty"
    empty.mkdir()
    status, _, err = predict(capsys, training, empty)
    assert (status, f"{empty}: a folder without images" in err) == (1, True)


def test_tables_have_a_row_for_each_object_or_image() -> None:
    box = {"name": "b,\n", "score": 0.5, "box": [1.0, 2.0, 3.0, 4.5], "segmentation": {"size": []}}
    best = {"name": "b", "score": 0.1}
    answers = [{"image": "x", "objects": [box, box]}, {"image": "y", "objects": [], "best": best}]
    rows = list(csv.DictReader(as_csv(answers).splitlines(keepends=True)))
    row = {"image": "x", "name": "b,\n", "score": "0.5"}
    row |= {"x0": "1.0", "y0": "2.0", "x1": "3.0", "y1": "4.5"}
    assert rows == [row, row, dict.fromkeys(row, "") | {"image": "y"}]


def test_same_names_do_not_overwrite(
    training: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "photo.bmp"
    Image.open(photo).save(other)
    assert predict(capsys, training, photo, other, photo, "--output", tmp_path / "out")[0] == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"photo.png", "photo_2.png", "photo_3.png"}
    before = photo.read_bytes()
    assert predict(capsys, training, photo, "--output", tmp_path)[0] == 0
    assert photo.read_bytes() == before
    assert is_png(tmp_path / "photo_2.png")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "card.json").unlink(), "has no card.json; expected the --output"),
        (lambda run: (run / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda run: (run / "card.json").write_text("{"), "card.json: not JSON"),
        (lambda run: (run / "card.json").write_text("[]"), "expected an object"),
        (lambda run: edit(run, task="dream"), "task must be one of classify"),
        (lambda run: edit(run, task="glue"), "a training of glue, expected one on images"),
        (lambda run: edit(run, classes="ab"), "a list under 'classes'"),
        (lambda run: edit(run, mean=None), "no model can be made of it"),
        (lambda run: edit(run, model="nothing"), "no model can be made of it"),
        (lambda run: edit(run, model="hf-hub:nobody/nothing"), "timm knows no 'hf-hub:nobody/"),
        (lambda run: edit(run, model_options={"depth": 1}), "no model can be made of it"),
        (lambda run: edit(run, crop_pct=...), "lacks or does not know 'crop_pct'"),
        (
            lambda run: edit(run, model_options={"num_classes": 10}),
            "these weights are of another model",
        ),
        (lambda run: edit(run, classes=["a", "b"]), "2 classes, but the model has 10"),
        (
            lambda run: (run / "model.safetensors").write_bytes(b"junk"),
            "model.safetensors: not a file of weights",
        ),
    ],
)
def test_spoiled_trainings_are_explained(
    copy: Path, photo: Path, spoil, message: str, capsys: pytest.CaptureFixture
) -> None:
    spoil(copy)
    status, _, err = predict(capsys, copy, photo, "--output", copy / "out")
    assert status == 1
    assert message in err
    assert str(copy) in err
    assert err.count("\n") == 1
    assert not (copy / "out").exists()


def edit(run: Path, **changes: object) -> None:
    """Change entries of the card; ... takes one out."""
    card = json.loads((run / "card.json").read_text()) | changes
    card = {key: value for key, value in card.items() if value is not ...}
    (run / "card.json").write_text(json.dumps(card))


def test_weights_that_lack_or_exceed_are_named(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    head = weights.pop("head.fc.bias")
    save_file(weights | {"other": head}, copy / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks head\.fc\.bias; has other, which the model does"):
        load_run(copy)


def test_bad_options_are_explained(
    training: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for threshold in ("1.5", "nan"):
        status, _, err = predict(capsys, training, photo, f"--threshold={threshold}")
        assert status == 1
        assert f"--threshold must be from 0 to 1, got {threshold}" in err
    status, _, err = predict(capsys, training, photo, "--output", photo)
    assert status == 1
    assert str(photo) in err


def test_missing_package_says_what_to_install(
    training: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "setformer_ext.cli.predict.drawing")
    with pytest.raises(SystemExit, match=r'needs the package matplotlib.*pip install "\.\[train'):
        cli.main(["predict", str(training), str(photo), f"--output={tmp_path}"])


def test_masks_in_json_are_those_of_coco() -> None:
    torch.manual_seed(0)
    labels = torch.randint(4, (13, 7))
    labels[labels == 1] = 0
    answer = Segmentation(["a", "b", "c", "d"], labels).json()
    counts = [int((labels == "abcd".index(entry["name"])).sum()) for entry in answer["classes"]]
    assert len(counts) == 3
    assert counts == sorted(counts, reverse=True)
    restored = torch.full((13, 7), -1)
    for entry in answer["classes"]:
        decoded = torch.tensor(coco.decode(entry["segmentation"]).astype(bool))
        assert entry["share"] == pytest.approx(float(decoded.float().mean()))
        restored[decoded] = "abcd".index(entry["name"])
    assert torch.equal(restored, labels)

    masks = torch.rand(2, 9, 11) > 0.5
    boxes = torch.tensor([[1.0, 2.0, 3.5, 4.0], [0.0, 0.0, 11.0, 9.0]])
    detection = Detection(["x", "y"], boxes, torch.tensor([1, 0]), torch.tensor([0.9, 0.6]), masks)
    objects = json.loads(json.dumps(detection.json()))["objects"]
    assert [thing["name"] for thing in objects] == ["y", "x"]
    assert objects[0]["box"] == [1.0, 2.0, 3.5, 4.0]
    for thing, mask in zip(objects, masks, strict=True):
        assert np.array_equal(coco.decode(thing["segmentation"]), mask.numpy())
    assert detection.text() == "1 x y, 1 x x"


@pytest.mark.parametrize(("first", "last"), [(0, 3), (1, 255), (1, 300)])
def test_label_images_are_what_trainings_read(first: int, last: int, tmp_path: Path) -> None:
    """In 8 or 16 bits, with the labels of the training's own files."""
    from setformer_ext.cli.train.ade20k import Labels, read_labels

    names = tuple(f"{label}" for label in range(first, last + 1))
    classes = torch.arange(len(names)).repeat(2, 1)
    answer = Segmentation([*names], classes, Labels(names, 0 if first else None).first)
    image = answer.mask()
    image.save(tmp_path / "m.png")
    labels = read_labels(tmp_path / "m.png")
    assert labels.max() == last
    read = Labels(names, 0 if first else None).to_classes(labels, tmp_path / "m.png")
    assert np.array_equal(read, classes.numpy())


@pytest.mark.parametrize("size", [(1, 1), (9, 700), (700, 9), (3000, 40)])
def test_any_answer_about_any_size_is_drawn(size: tuple[int, int], tmp_path: Path) -> None:
    """Names are not taken for formulas or for what the legend should leave out; nothing warns."""
    image = Image.new("RGB", size, "green")
    width, height = size
    names = ["$x", "_y", "", "a name of more words than there is room for beside the bars", "z"]
    box = torch.tensor([[0.0, 0.0, width, height]])
    none = torch.zeros(0)
    answers = [
        Classification(names, torch.tensor([0.7, 0.2, 0.1, 0.0, 0.0])),
        Detection(
            names,
            box,
            torch.tensor([1]),
            torch.tensor([0.8]),
            torch.ones(1, height, width, dtype=torch.bool),
        ),
        Detection(names, none.view(0, 4), none.long(), none, None),
        Segmentation(names, torch.arange(height * width).view(height, width) % 5),
        Segmentation(
            [f"{i}" for i in range(99)], torch.arange(height * width).view(height, -1) % 99
        ),
    ]
    for index, answer in enumerate(answers):
        path = tmp_path / f"{index}.png"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            draw(answer, image, "$name$.png", path)
        assert is_png(path)


def test_segmentation_is_laid_over_the_image(tmp_path: Path) -> None:
    """The drawn halves have the classes' hues, on the right; the image is on the left."""
    labels = torch.zeros(100, 100, dtype=torch.int64)
    labels[:, 50:] = 1
    draw(Segmentation(["a", "b"], labels), Image.new("RGB", (100, 100)), "x", tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as picture:
        pixels = np.asarray(picture.convert("RGB")) / 255
    row = pixels[pixels.shape[0] // 2]
    for label, place in ((0, 0.6), (1, 0.9)):
        seen = row[int(place * len(row))]
        assert seen == pytest.approx(0.65 * np.array(PALETTE[label]), abs=0.01)
    assert row[: len(row) // 2 - 20].max() == 0


def test_colours_are_the_classes_own_while_they_last() -> None:
    few = _colours(len(PALETTE), [3, 0])
    assert few == {3: PALETTE[3], 0: PALETTE[0]}
    many = _colours(150, list(range(20, 60)))
    assert [many[label] for label in range(20, 36)] == PALETTE
    assert {many[label] for label in range(36, 60)} == {REST}
    assert len(set(PALETTE)) == len(PALETTE)


def test_the_legend_shows_the_classes_own_colours() -> None:
    """The most frequent first, which need not be the surest."""
    boxes = torch.tensor([[0.0, 0.0, 40.0, 30.0]] * 3)
    answer = Detection(["a", "b"], boxes, torch.tensor([1, 0, 0]), torch.rand(3), None)
    (legend,) = _draw_detection(answer, Image.new("RGB", (90, 60)), "x.png").legends
    shown = zip(legend.get_texts(), legend.get_patches(), strict=True)
    colours = {text.get_text(): patch.get_facecolor()[:3] for text, patch in shown}
    assert colours == {"2 x a": PALETTE[0], "1 x b": PALETTE[1]}


def test_objects_are_drawn_where_they_are() -> None:
    """Their boxes, their names at the upper left corners, and their masks mixed with the image."""
    boxes = [[10.0, 15.0, 50.0, 25.0], [30.0, 20.0, 85.0, 55.0]]
    masks = torch.zeros(2, 60, 90, dtype=torch.bool)
    masks[0, 15:25, 10:30] = True
    labels, scores = torch.tensor([1, 0]), torch.tensor([0.9, 0.6])
    answer = Detection(["a", "b"], torch.tensor(boxes), labels, scores, masks)
    (axes,) = _draw_detection(answer, Image.new("RGB", (90, 60), "red"), "x.png").axes
    drawn = {
        patch.get_edgecolor()[:3]: (*patch.get_xy(), patch.get_width(), patch.get_height())
        for patch in axes.patches
    }
    assert drawn == {PALETTE[1]: (10, 15, 40, 10), PALETTE[0]: (30, 20, 55, 35)}
    names = {text.get_text(): text.get_position() for text in axes.texts}
    assert names == {"b 90%": (10, 15), "a 60%": (30, 20)}
    expected = np.full((60, 90, 3), [1.0, 0.0, 0.0])
    expected[15:25, 10:30] = 0.5 * expected[0, 0] + 0.5 * np.array(PALETTE[1])
    np.testing.assert_allclose(axes.images[0].get_array(), expected)


def test_each_class_is_beside_its_bar() -> None:
    shares = {"a": 0.625, "b": 0.25, "c": 0.125}
    answer = Classification([*shares], torch.tensor([*shares.values()]))
    _, axes = _draw_classification(answer, Image.new("RGB", (9, 9)), "x.png").axes
    names = dict(zip(axes.get_yticks(), axes.get_yticklabels(), strict=True))
    numbers = {text.get_position()[1]: text.get_text() for text in axes.texts}
    places = [bar.get_y() + bar.get_height() / 2 for bar in axes.patches]
    found = {names[place].get_text(): numbers[place] for place in places}
    assert found == {"a": "62.5%", "b": "25.0%", "c": "12.5%"}
    assert [bar.get_width() for bar in axes.patches] == [*shares.values()]


@pytest.mark.parametrize(("given", "level"), [([], 0), (["--background=light"], 255)])
def test_the_background_is_the_chosen_one(
    given: list[str], level: int, training: Path, photo: Path, tmp_path: Path
) -> None:
    command = ["predict", str(training), str(photo), f"--output={tmp_path / 'out'}"]
    assert cli.main([*command, *given]) == 0
    assert Image.open(tmp_path / "out" / "photo.png").convert("L").getpixel((0, 0)) == level


BODY = {"dims": [32, 32, 32, 32], "depths": [1, 1, 1, 1], "num_references": [4, 4, 4, 4]}
COMMON = {
    "model": "setformer_mini",
    "model_options": BODY,
    "classes": ["cat", "dog"],
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.3, 0.25],
}
DETECT = COMMON | {
    "task": "detect",
    "detector": "mask_rcnn",
    "detector_options": {
        "anchor_sizes": [16, 32, 64, 128, 256],
        "min_size": [64],
        "max_size": 96,
        "image_mean": COMMON["mean"],
        "image_std": COMMON["std"],
    },
}
SEGMENT = COMMON | {
    "task": "segment",
    "decoder": "fpn",
    "decoder_options": {},
    "short_side": 0,
    "window": 48,
}


def write_run(folder: Path, card: dict, model: torch.nn.Module) -> Path:
    from safetensors.torch import save_model

    folder.mkdir()
    save_model(model, str(folder / "model.safetensors"))
    (folder / "card.json").write_text(json.dumps(card))
    return folder


def pixels_of(path: Path) -> torch.Tensor:  # [3, H, W] in [0, 1]
    return torch.tensor(np.asarray(Image.open(path)) / np.float32(255)).permute(2, 0, 1)


@pytest.mark.slow
def test_detections_are_the_models(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Those of torchvision's model called by hand, in pixels of the image, from a score on."""
    from setformer_ext.vision.detection import from_card

    torch.manual_seed(0)
    model = from_card(DETECT).eval()
    run = write_run(tmp_path / "run", DETECT, model)
    with torch.no_grad():
        found = model([pixels_of(photo)])[0]
    threshold = float(found["scores"].sort(descending=True).values[5]) - 1e-6
    report = tmp_path / "d.json"
    given = (run, photo, "--output", tmp_path / "out", "--json", report)
    status, out, _ = predict(capsys, *given, f"--threshold={threshold}")
    assert status == 0
    objects = json.loads(report.read_text())[0]["objects"]
    assert len(objects) == 6
    assert [thing["name"] for thing in objects] == [
        DETECT["classes"][label - 1] for label in found["labels"][:6].tolist()
    ]
    for i, thing in enumerate(objects):
        assert thing["score"] == pytest.approx(float(found["scores"][i]), abs=1e-5)
        assert thing["box"] == pytest.approx(found["boxes"][i].tolist(), abs=1e-2)
        mask = coco.decode(thing["segmentation"])
        assert mask.shape == (60, 90)
        assert (mask != (found["masks"][i, 0] > 0.5).numpy()).mean() < 0.01
    assert is_png(tmp_path / "out" / "photo.png")
    numbers = np.asarray(Image.open(tmp_path / "out" / "masks" / "photo.png"))
    expected = np.zeros((60, 90), dtype=np.uint8)
    for number in range(6, 0, -1):  # the surest covers the others
        expected[coco.decode(objects[number - 1]["segmentation"]) > 0] = number
    assert np.array_equal(numbers, expected)
    status, out, _ = predict(capsys, *given, "--threshold=1")
    best = DETECT["classes"][int(found["labels"][0]) - 1], float(found["scores"][0])
    assert status == 0
    assert f"photo.png: nothing found (best score {best[1]:.2g}, {best[0]})" in out
    answer = json.loads(report.read_text())[0]
    assert answer["objects"] == []
    assert answer["best"] == {"name": best[0], "score": pytest.approx(best[1], abs=1e-5)}


def test_no_object_is_of_the_empty_class(photo: Path, tmp_path: Path) -> None:
    """RetinaNet has a class 0 that nothing is of; untrained, it is as likely as the others."""
    card = DETECT | {"detector": "retinanet"}
    predictor = PREDICTORS["detect"](card)
    predictor.model.eval()
    with Image.open(photo) as image:
        answers = [predictor(image, threshold) for threshold in (0.0, 1.0)]
    assert len(answers[0].labels) > 10
    assert answers[0].labels.min() >= 0
    best = answers[0].classes[int(answers[0].labels[0])], float(answers[0].scores[0])
    assert answers[0].best is None
    assert answers[1].best == (best[0], pytest.approx(best[1]))
    for number, answer in enumerate(answers):
        draw(answer, Image.new("RGB", (90, 60)), "x", tmp_path / f"{number}.png")


def test_the_title_says_how_sure_the_next_best_was(tmp_path: Path) -> None:
    none = torch.zeros(0)
    answer = Detection(["a", "b"], none.view(0, 4), none.long(), none, None, ("b", 0.123))
    image = Image.new("RGB", (90, 60))
    assert answer.text() == "nothing found (best score 0.12, b)"
    figure = _draw_detection(answer, image, "x.png")
    assert figure.get_suptitle() == "x.png: nothing found (best score 0.12, b)"


def test_segmentations_are_the_models(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from setformer_ext.vision.segmentation import from_card

    torch.manual_seed(0)
    model = from_card(SEGMENT).eval()
    report = tmp_path / "s.json"
    run = write_run(tmp_path / "whole", SEGMENT | {"window": 0}, model)
    given = (photo, "--output", tmp_path / "out", "--json", report)
    assert predict(capsys, run, *given)[0] == 0
    mean, std = (torch.tensor(SEGMENT[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = model(((pixels_of(photo) - mean) / std)[None])[0].argmax(0).numpy()
    assert 0 < expected.mean() < 1
    for entry in json.loads(report.read_text())[0]["classes"]:
        label = SEGMENT["classes"].index(entry["name"])
        mask = coco.decode(entry["segmentation"])
        assert (mask != (expected == label)).mean() < 0.001
        labels = np.asarray(Image.open(tmp_path / "out" / "masks" / "photo.png"))
        assert np.array_equal(labels == label + 1, mask)  # 0 is of pixels without a class
    assert is_png(tmp_path / "out" / "photo.png")
    run = write_run(tmp_path / "windows", SEGMENT, model)
    assert predict(capsys, run, *given)[0] == 0


@pytest.mark.parametrize("card", [DETECT, SEGMENT], ids=["detect", "segment"])
def test_layers_of_other_tasks_are_explained(
    card: dict, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The whole image comes to the backbone once, also where predictions take windows."""
    from setformer_ext.cli.explain.plans import find_attention, observe
    from setformer_ext.cli.images import read_image

    torch.manual_seed(0)
    predictor = PREDICTORS[card["task"]](card)
    run = write_run(tmp_path / "run", card, predictor.model)
    output = tmp_path / "e.png"
    assert cli.main(["explain", str(run), str(photo), "--stage=1", f"--output={output}"]) == 0
    assert is_png(output)
    predictor = load_run(run)
    attention, _ = find_attention(predictor.model, 1, 1)
    layer = observe(predictor.model, attention, lambda: predictor.look(read_image(photo)))
    assert layer.seen.shape[1:] == (64, 96)
    assert layer.grid == (16, 24)
    if card is SEGMENT:  # what comes is the image itself, padded
        seen = predictor.as_seen(layer.seen)[:, :60, :90]
        torch.testing.assert_close(seen, pixels_of(photo), rtol=0, atol=1e-5)
