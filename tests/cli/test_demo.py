"""The demo: that it learns, reads any image folder, and says what is wrong with a bad one."""

import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from setformer_ext import SetAttention, cli
from setformer_ext.cli.demo import lengths
from setformer_ext.cli.demo.data import load_digits, load_folder
from setformer_ext.cli.demo.figure import draw_plans
from setformer_ext.cli.demo.model import Classifier, make_set_attention
from setformer_ext.cli.demo.train import accuracy, train
from setformer_ext.controls import SoftmaxAttention


def run_demo(*arguments: object) -> int:
    return cli.main(["demo", *map(str, arguments)])


def write_image(path: Path, mode: str, level: int, size: tuple[int, int] = (23, 17)) -> None:
    """A picture of one brightness and a little noise, in most of Pillow's modes."""
    noise = np.random.default_rng(level).integers(0, 40, (size[1], size[0]))
    grey = Image.fromarray(np.uint8(level + noise))
    path.parent.mkdir(parents=True, exist_ok=True)
    if mode == "I;16":
        Image.fromarray(np.uint16(257 * (level + noise))).save(path)
    else:
        grey.convert("RGB" if mode == "YCbCr" else "L").convert(mode).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, dark and bright, of odd sizes, and things that are no images."""
    root = tmp_path / "pictures"
    for index in range(9):
        write_image(root / "dark" / f"{index}.png", "L", 10 + index, (20 + index, 31))
        write_image(root / "bright" / "more" / f"{index}.jpg", "RGB", 200 + index, (9, 8 + index))
    (root / "dark" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    (root / "bright" / "notes.txt").write_text("no image")
    (root / ".hidden").mkdir()
    (root / "empty").mkdir()
    return root


def is_png(path: Path) -> bool:
    with Image.open(path) as image:
        image.load()
        return image.format == "PNG" and min(image.size) > 300


@pytest.mark.slow
def test_end_to_end_on_the_digits(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "made" / "here"
    assert run_demo("--steps", 3, "--output", output) == 0
    assert is_png(output / "curves.png")
    assert is_png(output / "references.png")
    text, log = capsys.readouterr()
    assert "\r" not in log, "a log has lines, not bars"
    assert log.count("step 3/3, loss=") == 2
    rows = [line.split() for line in text.splitlines() if line.startswith(("SeT", "softmax"))]
    assert [row[0] for row in rows] == 2 * ["SeT", "softmax"]
    for row, make in zip(rows[:2], (make_set_attention, SoftmaxAttention), strict=True):
        parameters = sum(p.numel() for p in Classifier(1, 8, 10, make).parameters())
        assert int(row[2].replace(",", "")) == parameters
        assert float(row[3]) > 0


def test_times_of_attention_alone_end_soon() -> None:
    start = time.perf_counter()
    seconds = lengths.measure((16, 256))
    assert time.perf_counter() - start < 10
    assert {*seconds} == {"SeT", "softmax"}
    assert all(0 < each < 1 for of_name in seconds.values() for each in of_name)
    rows = lengths.table({"SeT": [0.0012, 0.5], "softmax": [0.5]}, (16, 25600)).splitlines()
    assert rows[0].split() == ["tokens", "16", "25,600"]
    assert rows[1].split() == ["SeT", "1.2", "ms", "500.0", "ms"]
    assert rows[2].split() == ["softmax", "500.0", "ms", "not", "timed"]


def test_lengths_that_would_take_long_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {16: 0.1, 32: 0.3, 256: 30.0}
    monkeypatch.setattr(lengths, "_seconds", lambda attention, length: times[length])
    assert lengths.measure((16, 32, 256)) == {"SeT": [0.1, 0.3], "softmax": [0.1, 0.3]}


@pytest.mark.slow
def test_end_to_end_on_a_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = ("--data", folder, "--output", tmp_path, "--steps", 3, "--image-size", 16)
    assert run_demo(*options) == 0
    assert is_png(tmp_path / "references.png")
    captured = capsys.readouterr()
    assert "2 classes, 16 x 16" in captured.out
    assert "skipped 1 unreadable file(s)" in captured.err
    assert "broken.png" in captured.err
    assert "notes.txt" not in captured.err
    assert "reading images" not in captured.err, "a log has lines, not bars"


@pytest.mark.slow
def test_learns_the_digits() -> None:
    """Far above chance, 10%, after a tenth of the demo's steps."""
    images, make = load_digits(8, seed=0), partial(Classifier, 1, 8, 10, make_set_attention)
    _, history = train(make, images, steps=100, seed=0, description="test")
    assert history.accuracy > 0.5
    assert np.mean(history.losses[-10:]) < 0.75 * np.mean(history.losses[:10])
    assert len(history.losses) == len(history.seconds) == 100
    assert history.tested_at[-1] == 100


@pytest.mark.slow
def test_same_seed_same_training() -> None:
    images = load_digits(8, seed=0)

    def losses(seed: int) -> list[float]:
        make = partial(Classifier, 1, 8, 10, make_set_attention)
        return train(make, images, steps=3, seed=seed, description="test")[1].losses

    assert losses(0) == losses(0) != losses(1)


def test_digits_are_split_by_class_and_seed() -> None:
    images = load_digits(8, seed=0)
    assert len(images.train) + len(images.test) == 1797
    counts = images.test_labels.bincount()
    shares = counts / (counts + images.train_labels.bincount())
    assert (shares - 0.25).abs().max() < 0.01
    assert images.train.min() == 0
    assert images.train.max() == 1
    assert torch.equal(load_digits(8, seed=0).test, images.test)
    assert not torch.equal(load_digits(8, seed=1).test_labels, images.test_labels)
    assert load_digits(16, seed=0).train.shape[1:] == (1, 16, 16)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"]
)
def test_every_mode_is_read(mode: str, tmp_path: Path) -> None:
    suffix = {"CMYK": "jpg", "YCbCr": "jpg", "I": "tiff", "F": "tiff"}.get(mode, "png")
    for label in ("a", "b"):
        for index in range(2):
            write_image(tmp_path / label / f"{index}.{suffix}", mode, 100)
    images = load_folder(tmp_path, 16, seed=0)
    assert images.train.shape == (2, 3, 16, 16)
    assert images.train.min() >= 0
    assert images.train.max() <= 1
    if mode not in ("1", "I;16", "I", "F"):  # one bit, and levels without a fixed range
        assert abs(images.train.mean() - 120 / 255) < 0.05


def test_transparency_becomes_white(tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for index in range(2):
            Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(tmp_path / label / f"{index}.png")
    assert (load_folder(tmp_path, 8, seed=0).train == 1).all()


def test_bad_folders_are_explained(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    def message(*arguments: object) -> str:
        assert run_demo("--output", tmp_path / "out", "--steps", 1, *arguments) == 1
        return capsys.readouterr().err

    assert "folder with one subfolder per class" in message("--data", tmp_path / "missing")
    (tmp_path / "nothing").mkdir()
    assert "has 0: none" in message("--data", tmp_path / "nothing")
    write_image(tmp_path / "one" / "cats" / "1.png", "L", 100)
    assert "has 1: cats" in message("--data", tmp_path / "one")
    write_image(tmp_path / "one" / "dogs" / "1.png", "L", 100)
    assert "cats (1), dogs (1)" in message("--data", tmp_path / "one")
    for path in (tmp_path / "one").rglob("*.png"):
        path.write_bytes(b"broken")
    assert "cats (0), dogs (0)" in message("--data", tmp_path / "one")
    assert "--image-size must be a positive multiple of 8, got 12" in message("--image-size", 12)
    assert "--image-size must be a positive multiple of 8, got 0" in message("--image-size", 0)
    assert "--steps must be at least 1, got 0" in message("--steps", 0)
    for seed in (2**64, -(2**63) - 1):
        assert f"--seed must be at least -2^63 and less than 2^64, got {seed}" in message(
            f"--seed={seed}"
        )
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("in the way")
    assert "file" in message("--output", tmp_path / "file")


@pytest.mark.parametrize("name", ["sklearn", "matplotlib", "tqdm"])
def test_missing_package_says_what_to_install(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match=rf'needs the package {name}.*pip install "\.\[demo\]"'):
        cli.main(["demo", "--output", str(tmp_path / "out"), "--steps", "1"])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_import_is_light() -> None:
    heavy = "{'sklearn', 'matplotlib', 'PIL'}"
    code = f"import sys, setformer_ext.cli.demo; sys.exit(bool({heavy} & set(sys.modules)))"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=Path(__file__).parent, check=False
        ).returncode
        == 0
    )


@pytest.mark.slow
def test_plans_are_drawn_from_the_most_telling_head(tmp_path: Path) -> None:
    """A head whose references draw alike tells nothing; the others have something to show."""
    from setformer_ext.cli.demo.figure import _most_telling_head

    torch.manual_seed(0)
    images = load_digits(8, seed=0)
    model = Classifier(1, 8, 10, make_set_attention)
    for depth, block in enumerate(model.blocks):
        for head in range(block.attention.num_heads):
            if (depth, head) != (1, 2):
                alike = block.attention.reference[head, :1].expand_as(
                    block.attention.reference[head]
                )
                block.attention.reference.data[head] = alike
        block.attention.position_bandwidth = None
    depth, head, plan = _most_telling_head(model, images.test[:4])
    assert (depth, head) == (1, 2)
    assert plan.shape == (4, 64, 16)
    draw_plans(model, images, tmp_path / "plans.png")
    assert is_png(tmp_path / "plans.png")


def test_only_set_attention_has_a_plan() -> None:
    model = Classifier(1, 8, 10, SoftmaxAttention)
    with pytest.raises(TypeError, match="only SetAttention has a plan, got SoftmaxAttention"):
        model.transport_plan(torch.zeros(1, 1, 8, 8), 0)


def test_accuracy_counts_right_answers() -> None:
    model = torch.nn.Identity()
    logits = torch.eye(3).repeat(200, 1)
    labels = torch.arange(3).repeat(200)
    assert accuracy(model, logits, labels) == 1
    labels[:150] = (labels[:150] + 1) % 3
    assert accuracy(model, logits, labels) == 0.75


def test_models_differ_in_attention_only() -> None:
    of_set = Classifier(3, 32, 5, make_set_attention)
    of_softmax = Classifier(3, 32, 5, SoftmaxAttention)
    assert of_set(torch.rand(2, 3, 32, 32)).shape == (2, 5)
    names = [
        {n for n, _ in model.named_parameters() if ".attention." not in n}
        for model in (of_set, of_softmax)
    ]
    assert names[0] == names[1]
    assert all(isinstance(block.attention, SetAttention) for block in of_set.blocks)
