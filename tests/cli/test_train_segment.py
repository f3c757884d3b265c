"""Training of segmentation: what it learns and measures, and what is wrong with data, by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torchmetrics.classification import MulticlassJaccardIndex
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as transforms

from setformer_ext import cli
from setformer_ext.cli.train.ade20k import IGNORED, Labels, read_names
from setformer_ext.cli.train.sampling import SAMPLE, SeededDataset
from setformer_ext.cli.train.segment import IntersectionOverUnion, Segment
from setformer_ext.cli.train.task import DataError
from setformer_ext.vision.segmentation import from_card
from training import launch, metrics, options_of, run_command

COLOURS = np.array([[0, 0, 0], [220, 40, 40], [40, 200, 60], [50, 70, 230]], np.uint8)
TINY = (
    "--model=setformer_mini",
    "--model-options",
    "dims=(32,32,32,32)",
    "depths=(1,1,1,1)",
    "num_references=(4,4,4,4)",
    "--decoder-options",
    "decoder_channels=32",
    "--crop=48",
    "--short-side=0",
    "--scale-jitter",
    "0.9",
    "1.1",
    "--no-photometric",
    "--workers=0",
    "--batch-size=4",
)


@pytest.fixture(autouse=True)
def fresh_processes() -> None:
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)


def write_shapes(root: Path, train: int, val: int, classes: int = 3) -> Path:
    """Noisy blocks of a colour for each class; a black border is of label 0, without a class."""
    generator = np.random.default_rng(0)
    for index in range(train + val):
        split = "training" if index < train else "validation"
        labels = generator.integers(1, classes + 1, (3, 4)).repeat(16, 0).repeat(16, 1)
        labels = labels[: 44 + index % 3]
        labels[:3] = 0
        noise = generator.integers(0, 25, (*labels.shape, 3), np.uint8)
        save(root / "images" / split / f"{index}.png", COLOURS[labels] + noise)
        save(root / "annotations" / split / f"{index}.png", labels.astype(np.uint8))
    return root


def save(path: Path, array: np.ndarray, mode: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path)
    return path


def arguments(data: Path, output: Path, *more: object) -> list[str]:
    given = ["train", "segment", f"--data={data}", f"--output={output}", *TINY]
    return [*given, *map(str, more)]


def train(data: Path, output: Path, *more: object) -> dict[str, Any]:
    assert cli.main(arguments(data, output, *more)) == 0
    return metrics(output)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_shapes(tmp_path_factory.mktemp("shapes"), train=12, val=5)
    (root / "classes.txt").write_text("red\ngreen\nblue\n")
    return root


def make_task(data: Path, *more: str, on_error: str = "stop") -> Segment:
    given = (f"--data={data}", *TINY[:-1], *more)  # without the size of a batch
    return Segment(options_of(Segment, *given, on_error=on_error))


@pytest.mark.slow
def test_it_learns_and_its_weights_give_the_figures_it_prints(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The figures are recomputed here from the exported weights and the files, by counting."""
    result = train(data, tmp_path, "--steps=40", "--lr=4e-3", "--ema-decay=0.9", "--eval-every=40")
    assert result["best"]["mIoU"] > 0.8
    assert "IoU/green" in capsys.readouterr().out
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["classes"] == ["red", "green", "blue"]
    model = from_card(card).eval()
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    hits, unions, right, pixels = np.zeros(3), np.zeros(3), 0, 0
    for path in sorted((data / "images" / "validation").iterdir()):
        image = transforms.to_image(Image.open(path)).float() / 255
        image = transforms.normalize(image, card["mean"], card["std"])
        with torch.no_grad():
            answer = model(image[None])[0].argmax(0).numpy()
        truth = np.asarray(Image.open(data / "annotations" / "validation" / path.name)) - 1.0
        answer[truth < 0] = -1
        right += (answer == truth)[truth >= 0].sum()
        pixels += (truth >= 0).sum()
        for i in range(3):
            hits[i] += ((answer == i) & (truth == i)).sum()
            unions[i] += ((answer == i) | (truth == i)).sum()
    assert result["best"]["mIoU"] == pytest.approx((hits / unions).mean(), abs=1e-3)
    assert result["best"]["pixel_accuracy"] == pytest.approx(right / pixels, abs=1e-3)
    assert result["best"]["IoU/blue"] == pytest.approx(hits[2] / unions[2], abs=1e-3)


@pytest.mark.slow
def test_two_processes_measure_what_one_does(data: Path, tmp_path: Path) -> None:
    """Five images in two processes: none counts twice, and absent classes agree."""
    options = {"dims": (32,) * 4, "depths": (1,) * 4, "num_references": (4,) * 4}
    classifier = timm.create_model("setformer_mini", **options)
    for _ in range(20):
        classifier(torch.randn(4, 3, 48, 48))  # gives norms their statistics
    save_file(classifier.state_dict(), tmp_path / "weights.safetensors")
    given = ("--steps=2", "--eval-every=1", f"--pretrained={tmp_path / 'weights.safetensors'}")
    given += ("--freeze-batch-norm",)  # else each process has norms of its own
    one = train(data, tmp_path / "one", *given)
    two = arguments(data, tmp_path / "two", *given, "--batch-size=2")
    assert launch(2, run_command, two) == [0, 0]
    for entry, other in zip(metrics(tmp_path / "two")["history"], one["history"], strict=True):
        assert entry == pytest.approx(other, rel=0.02, abs=0.005)


class Constant(torch.nn.Module):
    """Gives the image itself as the logits."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def logits_of(classes: list[list[int]], count: int) -> torch.Tensor:  # -> [count, H, W]
    return torch.nn.functional.one_hot(torch.tensor(classes), count).permute(2, 0, 1).float()


def test_metrics_by_hand() -> None:
    """Class 3 is in neither truth nor answers: it does not count; 2 is answered only: it does."""
    measured = IntersectionOverUnion(["a", "b", "c", "d"], short_side=0, window=0)
    answers = [[[0, 0, 1], [2, 1, 1]], [[0, 1, 0]]]
    truths = [[[0, 1, 1], [1, 1, IGNORED]], [[0, IGNORED, 1]]]
    images = [logits_of(answer, 4) for answer in answers]
    measured.update(Constant(), (images, [torch.tensor(truth) for truth in truths]))
    # a: 2 right of 4 in the union; b: 2 of 5; c: 0 of 1. 4 of 7 pixels are right.
    figures = measured.compute()
    assert figures == pytest.approx(
        {
            "mIoU": (2 / 4 + 2 / 5 + 0) / 3,
            "pixel_accuracy": 4 / 7,
            "IoU/a": 2 / 4,
            "IoU/b": 2 / 5,
        }
    )
    measured = IntersectionOverUnion(["a", "b", "c", "d"], short_side=0, window=0)
    measured.update(Constant(), (images[1:], [torch.tensor([[0, 1, 0]])]))
    assert measured.compute() == {
        "mIoU": 1.0,
        "pixel_accuracy": 1.0,
        "IoU/a": 1.0,
        "IoU/b": 1.0,
    }


def test_metrics_are_those_of_torchmetrics() -> None:
    torch.manual_seed(0)
    measured = IntersectionOverUnion([str(i) for i in range(5)], short_side=0, window=0)
    known = MulticlassJaccardIndex(5, ignore_index=IGNORED)
    each = MulticlassJaccardIndex(5, ignore_index=IGNORED, average="none")
    for size in ((20, 31), (7, 5)):
        image, truth = torch.randn(5, *size), torch.randint(-1, 5, size)
        measured.update(Constant(), ([image], [truth]))
        for metric in (known, each):
            metric.update(image[None], truth[None])
    figures = measured.compute()
    assert figures["mIoU"] == pytest.approx(known.compute().item())
    assert [figures[f"IoU/{i}"] for i in range(5)] == pytest.approx(each.compute().tolist())


def test_random_views_keep_pixels_and_labels_together(data: Path) -> None:
    """Every pixel's colour is that of its class, wherever scaling, cropping, flipping put it."""
    task = make_task(data, "--crop", "80", "40", "--scale-jitter", "1", "1")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (task.mean, task.std))
    padded = 0
    for index in range(len(task.train)):
        image, classes = task.train[index]
        assert image.shape == (3, 80, 40)
        assert image.dtype == torch.float32
        assert classes.shape == (80, 40)
        assert type(image) is type(classes) is torch.Tensor
        colours = (255 * (image * std + mean)).round().permute(1, 2, 0).numpy()
        labels = classes.numpy() + 1
        difference = colours - COLOURS[labels]
        assert (difference[labels > 0] >= -0.5).all()
        assert (difference[labels > 0] <= 24.5).all()
        padded += (image.abs() < 0.02).all(0).sum()
    assert padded > 1000  # by the mean colour, where nothing is left to see
    assert (make_task(data, "--scale-jitter", "2", "2").train[0][1] >= IGNORED).all()


def test_losses(data: Path) -> None:
    """Cross entropy over pixels with a class, by hand; Dice beside it; no NaN without any."""
    torch.manual_seed(0)
    task = make_task(data, "--dice=0.5")
    logits = torch.randn(2, 3, 4, 5)
    classes = torch.randint(-1, 3, (2, 4, 5))
    images = [torch.zeros(3, 4, 5)] * 2

    def model(x: torch.Tensor) -> torch.Tensor:
        assert x.shape == (2, 3, 4, 5)
        return logits

    losses = task.losses(model, (images, list(classes)))
    shares = np.exp(logits.double().numpy())
    shares /= shares.sum(1, keepdims=True)
    truth = classes.numpy()
    valid = truth >= 0
    of_truth = np.take_along_axis(shares, np.maximum(truth, 0)[:, None], 1)[:, 0]
    assert losses["cross_entropy"].item() == pytest.approx(-np.log(of_truth[valid]).mean())
    dice = []
    for i in range(3):
        ours, known = shares[:, i][valid], (truth == i)[valid]
        dice.append(1 - 2 * (ours * known).sum() / (ours.sum() + known.sum()))
    assert losses["dice"].item() == pytest.approx(0.5 * np.mean(dice), rel=1e-5)
    nothing = task.losses(model, (images, [torch.full((4, 5), IGNORED)] * 2))
    assert sum(nothing.values()).item() == 0


def test_labels_from_0_with_another_one_ignored(data: Path, tmp_path: Path) -> None:
    labels = Labels(("a", "b"), 255)
    given = np.array([[0, 1, 255]], np.uint8)
    assert labels.to_classes(given, Path("x")).tolist() == [[0, 1, IGNORED]]
    with pytest.raises(DataError, match=r"x: has the labels 2, 7; expected 0 to 1, and 255 for no"):
        labels.to_classes(np.array([[7, 2, 0]]), Path("x"))
    with pytest.raises(DataError, match=r"x: has the labels 255; expected 0 to 1$"):
        Labels(("a", "b"), None).to_classes(np.array([[255]]), Path("x"))
    root = write_shapes(tmp_path / "data", train=4, val=2)
    task = make_task(root, "--ignore-label=none")
    assert list(task.labels.names) == ["0", "1", "2", "3"]
    assert task.eval[0][1].min() == 0
    assert list(make_task(root).labels.names) == ["1", "2", "3"]
    assert make_task(root).eval[0][1].min() == IGNORED


def test_names_of_ade20k(tmp_path: Path) -> None:
    path = tmp_path / "objectInfo150.txt"
    path.write_text("Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.1\t3\t1\t1\twall\n")
    assert read_names(tmp_path, 1) == ["wall"]
    with path.open("a") as file:
        file.write("2\t0.05\t3\t1\t1\tbuilding, edifice\n")
    assert read_names(tmp_path, 1) == ["wall", "building"]
    with pytest.raises(DataError, match="expected Idx 0, 1"):
        read_names(tmp_path, 0)
    path.write_text("wall\n")
    with pytest.raises(DataError, match="expected columns Idx and Name"):
        read_names(tmp_path, 1)


def spoil(root: Path, kind: str) -> str:
    """Break one thing; returns what the message has to say."""
    image = root / "images" / "training" / "3.png"
    label = root / "annotations" / "training" / "3.png"
    labels = np.asarray(Image.open(label)).copy()
    if kind == "image without labels":
        label.unlink()
        return f"{image}: is without labels; expected {label}"
    if kind == "labels without image":
        image.unlink()
        return f"{label}: is without an image; expected {image.with_suffix('')}.jpg"
    if kind == "sizes":
        save(label, labels[:-1])
        height = len(labels)
        return f"{label}: is 64 x {height - 1}, but its image {image} is 64 x {height}"
    if kind == "labels beyond":
        labels[4, 5] = 9
        save(label, labels)
        return f"{label}: has the labels 9; expected 1 to 3, and 0 for no class"
    if kind == "colours":
        save(label, COLOURS[labels])
        return f"{label}: is of Pillow's mode RGB; expected grey whose values are the labels"
    if kind == "palette":
        save(label, COLOURS[labels], "P")
        return f"{label}: is of Pillow's mode P; expected grey whose values are the labels; if its"
    if kind == "no image":
        label.write_text("text")
        return f"{label}: not an image"
    label.write_bytes(label.read_bytes()[:70])
    return f"{label}: a broken image"


@pytest.mark.parametrize(
    "kind",
    [
        "image without labels",
        "labels without image",
        "sizes",
        "labels beyond",
        "colours",
        "palette",
        "no image",
        "truncated",
    ],
)
def test_broken_samples_stop_or_are_left_out(
    kind: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root = tmp_path / "data"
    shutil.copytree(data, root)
    expected = spoil(root, kind)
    assert cli.main(arguments(root, tmp_path / "out", "--epochs=1")) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"setformer train segment: {expected}")
    assert error.endswith("(--on-error skip: go on without)\n")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    task = make_task(root, on_error="skip")
    assert expected in task.describe()
    assert task.describe().startswith("12 training and 5 evaluation images of 3 classes; ")
    for index, (path, _) in enumerate(task.train.samples):
        if path.stem == "3":
            with pytest.raises((DataError, OSError)) as failure:
                task.train[index]
            assert str(failure.value).startswith(expected)
        else:
            assert len(task.train[index]) == 2


def test_files_that_are_no_images_are_described(data: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(data, tmp_path / "data"))
    train = [root / "images/training/0.jpg_", root / "annotations/training/0.txt"]
    other = root / "annotations/validation/a.json"
    for path in (*train, other):
        path.write_text("no image")
    assert (
        make_task(root)
        .describe()
        .endswith(
            f"; 2 files are no images by their endings: {train[0]}; {train[1]}"
            f"; 1 files are no images by their endings: {other}"
        )
    )


def test_turned_photographs_fit_upright_labels(tmp_path: Path) -> None:
    """EXIF's orientation 6 has the picture turned by a quarter when it is shown."""
    root = write_shapes(tmp_path, train=3, val=2)
    path = root / "images" / "training" / "0.png"
    upright = Image.open(path)
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    path.unlink()
    turned.save(path.with_suffix(".jpg"), quality=100, subsampling=0, exif=exif)
    task = make_task(root)
    assert task.failures == []
    image, _ = task.train[0]
    assert image.shape == (3, 48, 48)


@pytest.mark.parametrize("turn", range(2, 9))
@pytest.mark.parametrize("annotated", ["upright", "stored"])
def test_labels_go_with_the_pixels_that_they_were_made_of(
    turn: int, annotated: str, tmp_path: Path
) -> None:
    """Colours tell the classes, whatever EXIF's data say and whichever pixels had been labelled."""
    root = write_shapes(tmp_path, train=3, val=2)
    for kind in ("images", "annotations"):
        path = root / kind / "training" / "0.png"
        save(
            path, np.asarray(Image.open(path))[:, :48]
        )  # 44 x 48, so that quarter turns can be told
    path = root / "images" / "training" / "0.png"
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.open(path).save(path, exif=exif)
    if annotated == "upright":
        label = root / "annotations" / "training" / "0.png"
        exif_image = Image.open(label)
        exif_image.getexif()[0x0112] = turn
        save(label, np.asarray(ImageOps.exif_transpose(exif_image)))
    ambiguous = turn <= 4  # the sizes of the others tell
    if ambiguous:
        with pytest.raises(DataError, match=r"0.png: its EXIF data turn it, .*by --annotated upri"):
            make_task(root)
    given = ["--scale-jitter", "1", "1", "--flip=0"]
    task = make_task(root, *given, *([f"--annotated={annotated}"] if ambiguous else []))
    image, classes = task.train[0]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (task.mean, task.std))
    colours = (255 * (image * std + mean)).round().permute(1, 2, 0).numpy()
    labels = classes.numpy() + 1
    assert (labels > 0).sum() > 1500
    difference = (colours - COLOURS[labels])[labels > 0]
    assert difference.min() >= -0.5
    assert difference.max() <= 24.5


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "jp2"])
def test_labels_in_files_that_change_them_are_refused(suffix: str, tmp_path: Path) -> None:
    """Whatever the file's name says; JPEG would give pixels of classes that nobody has drawn."""
    root = write_shapes(tmp_path, train=3, val=2)
    path = root / "annotations" / "training" / "0.png"
    labels = Image.open(path)
    labels.load()
    path.unlink()
    path = path.with_suffix(f".{suffix}")
    if suffix == "tiff":
        labels.save(path, compression="jpeg")
    else:
        labels.save(path, "JPEG2000" if suffix == "jp2" else "JPEG", quality=100)
    with pytest.raises(DataError, match=rf"{path}: is a JPEG.*, which may change labels; expected"):
        make_task(root)
    assert str(path) in make_task(root, on_error="skip").describe()
    labels.save(path, "TIFF", compression="tiff_lzw")
    assert make_task(root).failures == []


def test_transforms_that_fail_are_named(data: Path) -> None:
    task = make_task(data)
    task.train.transform = v2.Compose([v2.RandomCrop(99)])
    loaded = SeededDataset(task.train, 0, SAMPLE, replace=True)[0, 3]
    assert loaded.sample is None
    assert len(loaded.failures) == len(task.train)
    path = task.train.samples[3][0]
    assert loaded.failures[0].startswith(f"{path}: the transform RandomCrop(size=(99, 99), ")


def test_training_goes_on_without_broken_samples(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root = tmp_path / "data"
    shutil.copytree(data, root)
    first = spoil(root, "sizes")
    broken = root / "images" / "validation" / "13.png"
    broken.write_bytes(broken.read_bytes()[:100])  # only decoding can tell
    given = arguments(root, tmp_path / "out", "--epochs=1", "--on-error=skip")
    assert cli.main(given) == 0
    skipped = metrics(tmp_path / "out")["skipped"]
    assert sorted(skipped)[0] == first
    assert sorted(skipped)[1].startswith(f"{broken}: a broken image")
    assert "2 broken samples were left out" in capsys.readouterr().out


def test_data_that_cannot_be_trained_on(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root = tmp_path / "data"

    def error(*more: str) -> str:
        assert cli.main(arguments(root, tmp_path / "out", "--steps=1", *more)) == 1
        text = capsys.readouterr().err
        assert text.count("\n") == 1
        return text

    assert f"there is no folder {root}/images/training; expected images/training" in error()
    for folder in ("images", "annotations"):
        (root / folder / "training").mkdir(parents=True)
    assert f"no images in {root}/images/training" in error()
    shutil.rmtree(root)
    shutil.copytree(data, root)
    (root / "classes.txt").write_text("red\ngreen\nblue\nviolet\n")
    assert "training: no pixel is of the classes violet (--on-error skip" in error()
    train(root, tmp_path / "four", "--steps=1", "--on-error=skip")
    assert "no pixel is of the classes violet" in capsys.readouterr().out
    (root / "classes.txt").write_text("red\nred\nblue\n")
    assert "has the classes red, red, blue; expected two or more, each of its own" in error()
    (root / "classes.txt").write_bytes(b"\xff\xfe\xff")
    assert f"{root}/classes.txt: not text in UTF-8" in error()
    (root / "classes.txt").unlink()
    shutil.copy(root / "images/training/0.png", root / "images/training/0.jpg")
    assert "has the same name as" in error()


def test_options_that_do_not_work(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def error(*more: str) -> str:
        assert cli.main(arguments(data, tmp_path / "out", "--steps=1", *more)) == 1
        return capsys.readouterr().err

    assert "--scale-jitter: expected LOW <= HIGH, got 2.0 1.0" in error("--scale-jitter", "2", "1")
    assert "--crop: expected one or two numbers, got 3" in error("--crop", "2", "2", "2")
    assert "--model: timm knows no 'setformer_huge'" in error("--model=setformer_huge")
    assert "setformer_mini: " in error("--model-options", "width=3")
    assert "setformer_mini: " in error("--decoder-options", "width=3")
    with pytest.raises(SystemExit):
        cli.main(arguments(data, tmp_path / "out", "--ignore-label=x"))
    assert "--ignore-label: expected a whole number from 0 to 65535" in capsys.readouterr().err


def test_pretrained_backbone(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:

    options = {"dims": (32,) * 4, "depths": (1,) * 4, "num_references": (4,) * 4}
    classifier = timm.create_model("setformer_mini", num_classes=7, **options)
    state = classifier.state_dict()
    save_file(state, tmp_path / "classifier.safetensors")
    path = f"--pretrained={tmp_path / 'classifier.safetensors'}"
    backbone = make_task(data, path).make_model().backbone.state_dict()
    assert len(backbone) > 40
    for name, tensor in backbone.items():
        assert torch.equal(tensor, state[name]), name
    assert not torch.equal(
        make_task(data).make_model().backbone.state_dict()["stem.first.conv.weight"],
        state["stem.first.conv.weight"],
    )
    save_file({"other": torch.zeros(1)}, tmp_path / "classifier.safetensors")
    assert cli.main(arguments(data, tmp_path / "out", "--steps=1", path)) == 1
    assert "holds weights of another model" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sharded_segmenter_gathers_its_backbone() -> None:
    """timm's feature getters call the backbone's forward_intermediates, which FSDP does not see."""
    assert launch(2, run_sharded) == [0, 0]


def run_sharded() -> None:
    from torch import distributed

    from setformer_ext.cli.train import parallel
    from setformer_ext.vision.segmentation import Segmenter

    distributed.init_process_group("gloo")
    sizes = {"dims": (32,) * 4, "depths": (1,) * 4, "num_references": (4,) * 4}
    model = Segmenter("setformer_mini", 3, backbone_options=sizes)
    parallel.SHARD_PARAMETERS = sum(p.numel() for p in model.encoder.model.model.parameters())
    parallel.shard(model)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    distributed.destroy_process_group()
