"""Images that are too large, and those whose stored pixels are turned before they are shown."""

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from setformer_ext import cli
from setformer_ext.cli import images
from setformer_ext.cli.image_folder import ImageFolder
from setformer_ext.cli.images import MAX_PIXELS, annotated_size, middle, opened, read_image
from setformer_ext.cli.predict.predictors import Classifier
from setformer_ext.cli.train.labelled_images import LabelledImages
from training import arguments, classify, write_digits


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(15, 20) % 251).save(path)
    return path


def test_large_images_are_read_once_they_are_allowed(
    photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond what Pillow warns of and refuses of itself, too."""
    for own_limit in (50, 200, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", own_limit)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(OSError, match=r"photo.png: more than 299 pixels .*by --max-pixels"):
                read_image(photo, max_pixels=299)
            assert read_image(photo, max_pixels=300).size == (20, 15)


def test_a_folder_is_not_called_a_broken_image(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r": a folder, expected an image$"):
        read_image(tmp_path)


def test_a_file_made_to_fill_the_memory_is_refused_from_its_head(tmp_path: Path) -> None:
    """A PNG that says that it is of 60,000 x 60,000 pixels; Pillow itself names no option."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    path = tmp_path / "bomb.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )
    with pytest.raises(OSError, match=r"bomb.png: more than 178956970 pixels .*by --max-pixels"):
        read_image(path)
    with (
        pytest.raises(OSError, match=r"bomb.png: more than 1000000000 pixels"),
        opened(path, 10**9),
    ):
        pass


@pytest.mark.parametrize("mode", ["RGBA", "LA", "GIF", "P", "L", "RGB"])
def test_transparency_of_every_mode_becomes_white(mode: str, tmp_path: Path) -> None:
    """Also where one colour of a palette, of greys or of RGB stands for it."""
    path, alpha = tmp_path / f"image.{'gif' if mode == 'GIF' else 'png'}", {}
    if mode in ("RGBA", "LA", "GIF"):
        image = Image.new("RGBA", (4, 3), (10, 20, 30, 0))
        image.paste((10, 20, 30, 255), (0, 0, 2, 3))
        image = image.convert("LA") if mode == "LA" else image
    else:
        image = Image.new(mode, (4, 3), 0)
        image.paste({"RGB": (50, 60, 70)}.get(mode, 50), (0, 0, 2, 3))
        alpha = {"transparency": (0, 0, 0) if mode == "RGB" else 0}
    image.save(path, **alpha)
    pixels = np.asarray(read_image(path))
    assert (pixels[:, 2:] == 255).all(), "transparent"
    assert (pixels[:, :2] < 255).any(axis=-1).all()


def test_every_command_that_reads_images_has_the_limit(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    torch.set_num_threads(1)
    data = write_digits(tmp_path / "data", train=40, val=40)
    few, enough = "--max-pixels=63", "--max-pixels=300"
    run = tmp_path / "run"
    given = ("--steps=1", "--batch-size=4")

    def refused(*arguments: object) -> None:
        assert cli.main([*map(str, arguments), few]) == 1
        error = capsys.readouterr().err
        assert "more than 63 pixels" in error
        assert "by --max-pixels" in error

    refused(*arguments(data, tmp_path / "none", *given))
    classify(data, run, *given, "--max-pixels=64")
    refused("predict", run, photo, "--output", tmp_path / "out")
    refused("explain", run, photo, "--stage=1", "--output", tmp_path / "e.png")
    refused("evaluate", run, "--data", data, "--workers=0")
    assert cli.main(["predict", str(run), str(photo), f"--output={tmp_path}", enough]) == 0
    assert cli.main(["demo", f"--data={data / 'train'}", "--steps=1", few]) == 1
    assert "more than 63 pixels" in capsys.readouterr().err


def turned(upright: np.ndarray, turn: int) -> np.ndarray:
    """The pixels as a camera stores them that EXIF's orientation turns back, by EXIF's own table:
    where the first row and the first column of what is stored are to be shown."""
    return {
        1: upright,  # top, left
        2: upright[:, ::-1],  # top, right
        3: upright[::-1, ::-1],  # bottom, right
        4: upright[::-1],  # bottom, left
        5: upright.T,  # left, top
        6: upright[:, ::-1].T,  # right, top
        7: upright[::-1, ::-1].T,  # right, bottom
        8: upright[::-1].T,  # left, bottom
    }[turn]


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff"])
@pytest.mark.parametrize("shape", [(15, 20), (17, 17)])
@pytest.mark.parametrize("turn", range(1, 9))
def test_labels_fit_the_upright_or_the_stored_pixels(
    turn: int, shape: tuple[int, int], suffix: str, tmp_path: Path
) -> None:
    upright = np.uint8(np.add.outer(9 * np.arange(shape[0]), 3 * np.arange(shape[1])))
    stored = turned(upright, turn)
    path = tmp_path / f"x.{suffix}"
    exif = Image.Exif()
    exif[images.ORIENTATION] = turn
    more = {"quality": 100} if suffix == "jpg" else {}
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, **more)
    sizes = {name: a.shape[::-1] for name, a in (("upright", upright), ("stored", stored))}
    for name, pixels in (("upright", upright), ("stored", stored)):
        size, is_upright = annotated_size(path, sizes[name], annotated=name)
        assert size == sizes[name]
        if suffix == "tiff" and turn != 1 and not is_upright:
            with pytest.raises(OSError, match=r"x.tiff: .*Pillow itself turns TIFFs"):
                read_image(path, upright=False)
        else:
            read = np.asarray(read_image(path, upright=is_upright))[..., 0]
            assert np.abs(read - pixels.astype(float)).max() <= 2
        if turn != 1 and sizes["upright"] == sizes["stored"]:
            with pytest.raises(OSError, match=rf"x.{suffix}: its EXIF .*--annotated upright or"):
                annotated_size(path, sizes[name])
        else:
            assert annotated_size(path, sizes[name]) == (size, is_upright)
    assert annotated_size(path, (3, 4)) == (sizes["upright"], True)


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1), (250, 2)])
def test_a_line_of_pixels_is_classified_by_its_middle(
    size: tuple[int, int], tmp_path: Path
) -> None:
    """Its shorter side is brought to some hundred pixels: all of it would be of gigabytes."""
    picture = np.full((*size[::-1], 3), (255, 0, 0), np.uint8)
    centre = [
        slice(max(0, side // 2 - side // 8 - 1), side // 2 + side // 8 + 1) for side in size[::-1]
    ]
    picture[tuple(centre)] = (0, 0, 255)
    path = tmp_path / "line.png"
    Image.fromarray(picture).save(path)
    folder = ImageFolder("", {"line": [path]}, [])
    images = LabelledImages(folder, ["line"], "RGB", MAX_PIXELS)
    images.transform = create_transform(
        (3, 224, 224), mean=(0, 0, 0), std=(1, 1, 1), crop_pct=0.9, interpolation="bilinear"
    )
    seen = images[0][0]
    assert seen.shape == (3, 224, 224)
    assert (seen[2] > 0.99).all()  # blue
    assert (seen[0] < 0.01).all()
    classifier = Classifier(
        {
            "model": "setformer_mini",
            "model_options": {"num_classes": 2},
            "classes": ["a", "b"],
            "input_size": (3, 32, 32),
            "interpolation": "bilinear",
            "mean": (0, 0, 0),
            "std": (1, 1, 1),
            "crop_pct": 0.9,
        }
    )
    classifier.model.eval()
    assert classifier(read_image(path)).probabilities.isfinite().all()


def test_images_of_usual_sides_are_classified_as_a_whole() -> None:
    for size in ((7, 500), (500, 7), (100, 1), (3, 3)):
        image = Image.new("RGB", size)
        assert middle(image).size == size
