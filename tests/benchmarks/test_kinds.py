"""benchmarks/vision: networks of equal cost, and pictures that show what their labels say."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "vision"))
import classification
import kinds
from classification import NETWORKS, STUDIED, Network, multiply_adds

SATURATED = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255)]


@pytest.fixture
def tuxpaint(tmp_path: Path) -> Path:
    """Rectangles of 200 shades and 10 grey photographs, in the layout of Debian's packages."""
    stamps, templates = tmp_path / "stamps" / "shades", tmp_path / "templates"
    for folder in (stamps, templates, tmp_path / "stamps" / "symbols"):
        folder.mkdir(parents=True)
    for i in range(200):
        Image.new("RGBA", (30, 20), (i, 255 - i, 40, 255)).save(stamps / f"{i:03}.png")
    for i in range(10):
        Image.new("RGB", (80, 70), (20 * i,) * 3).save(templates / f"{i}.jpg")
    return tmp_path


@pytest.mark.parametrize("channels", [1, 3])
def test_networks_that_are_compared_cost_the_same(channels: int) -> None:
    counted = {}
    for name in NETWORKS:
        with torch.device("meta"):
            network = Network(name, channels, classes=4)
        parameters = sum(p.numel() for p in network.parameters())
        counted[name] = (parameters, multiply_adds(name, channels, classes=4))
    for name, (parameters, products) in counted.items():
        attention = name in STUDIED or name in ("softmax", "mean", "none")
        assert parameters == pytest.approx(counted["SeT"][0], rel=0.002 if attention else 0.05)
        assert attention or products == pytest.approx(counted["SeT"][1], rel=0.05)


def test_every_picture_shows_as_many_colours_as_its_label_says() -> None:
    stamps = [Image.new("RGBA", (48, 48), (*colour, 255)) for colour in SATURATED]
    images, labels = kinds.pictures(
        stamps, [Image.new("RGB", (90, 60))], 40, np.random.default_rng(0)
    )
    assert images.shape == (40, 3, 56, 56)
    assert set(labels.tolist()) == {0, 1, 2, 3}
    for image, label in zip(images, labels, strict=True):
        pixels = {tuple(pixel) for pixel in (255 * image).round().int().flatten(1).T.tolist()}
        assert len(pixels & set(SATURATED)) == label + 1


def test_no_stamp_and_no_photograph_is_in_two_parts(tuxpaint: Path) -> None:
    stamps = kinds.read_stamps(tuxpaint / "stamps")
    for things in (stamps, kinds.read_photographs(tuxpaint / "templates")):
        parts = kinds.parts(things)
        assert [len(parts[split]) for split in kinds.SHARES] == [
            round(share * len(things)) for share in kinds.SHARES.values()
        ]
        assert len({thing.tobytes() for part in parts.values() for thing in part}) == len(things)


def test_copies_mirrored_stamps_and_symbols_are_left_out(tuxpaint: Path) -> None:
    for name in ("copy", "000_mirror"):
        Image.new("RGBA", (30, 20), (0, 255, 40, 255)).save(
            tuxpaint / "stamps" / "shades" / f"{name}.png"
        )
    Image.new("RGBA", (30, 20)).save(tuxpaint / "stamps" / "symbols" / "a.png")
    assert len(kinds.read_stamps(tuxpaint / "stamps")) == 200


def test_a_training_is_measured_once_and_kept(
    tuxpaint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(kinds, "COUNTS", {"training": 64, "validation": 8, "test": 8})
    results = tuxpaint / "runs.jsonl"
    command = ["kinds.py", "SeT", "--data", str(tuxpaint), "--steps", "2", "--seeds", "1"]
    command += ["--validate", "--results", str(results), "--output", str(tuxpaint / "plot.png")]
    monkeypatch.setattr(sys, "argv", command)
    assert kinds.main() == 0
    run = json.loads(results.read_text(encoding="utf-8"))
    assert (run["name"], run["data"], run["steps"]) == ("SeT", "validation", 2)
    assert f"| SeT | {run['accuracy']:.4f} |" in capsys.readouterr().out
    assert (tuxpaint / "plot.png").stat().st_size > 0

    monkeypatch.setattr(classification, "train", None)  # is not called again
    assert kinds.main() == 0
    assert len(results.read_text(encoding="utf-8").splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "install Debian's packages tuxpaint-stamps-default"),
        (["Resnet"], "NAME must be of SeT"),
    ],
)
def test_what_is_missing_or_misspelt_is_named(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(sys, "argv", ["kinds.py", *arguments])
    with pytest.raises(SystemExit):
        kinds.main()
    assert message in capsys.readouterr().err


def test_pictures_are_the_same_every_time(tuxpaint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "COUNTS", {"training": 4, "validation": 4, "test": 4})
    first, again, other = (kinds.load(tuxpaint, validate) for validate in (False, False, True))
    torch.testing.assert_close(first.test, again.test, rtol=0, atol=0)
    torch.testing.assert_close(first.train, other.train, rtol=0, atol=0)
    assert not torch.equal(first.test, other.test)
