"""Which files are read as images of which class: hidden ones, endings, one folder without a val."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from setformer_ext import cli
from setformer_ext.cli.demo.data import load_folder
from setformer_ext.cli.files import files_under, is_hidden
from setformer_ext.cli.image_folder import find_images, held_out
from setformer_ext.cli.train.ade20k import Ade20k
from setformer_ext.cli.train.classify import Classify
from setformer_ext.cli.train.task import DataError
from training import TINY, arguments, classify, options_of, write_digits

LEFT_BEHIND = (
    *(".ipynb_checkpoints/0-checkpoint.png", "__MACOSX/0.png", "__MACOSX/._0.png", "@eaDir/0.png"),
    *("lost+found/0.png", "$RECYCLE.BIN/0.png", "System Volume Information/0.png"),
    *("Thumbs.db", "THUMBS.DB", "desktop.ini", ".DS_Store", "._0.png", ".0.png"),
)


def write_image(path: Path, level: int = 9, size: tuple[int, int] = (9, 9)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, level).save(path, format=None if path.suffix else "PNG")


def leave_behind(folder: Path) -> None:
    """What notebooks, systems and file servers put beside the files of a folder."""
    for name in LEFT_BEHIND:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (9, 9)).save(path, format="PNG")  # so that reading one would work


def make_task(data: Path, *more: str, on_error: str = "stop", seed: int = 0) -> Classify:
    given = (f"--data={data}", *TINY, *more)
    return Classify(options_of(Classify, *given, on_error=on_error, seed=seed))


def test_what_systems_leave_behind_is_no_class_and_no_image(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Every reader gives the same with it as without."""
    data = write_digits(tmp_path / "digits", train=40, val=40)
    segments = tmp_path / "segments"
    for kind in ("images", "annotations"):
        write_image(segments / kind / "training" / "0.png")
    photos = sorted((data / "val").rglob("*.png"))[:2]

    def read() -> list[object]:
        task = make_task(data)
        flat = make_task(data / "train", "--val-share=0.5")
        demo = load_folder(data / "train", 8, seed=0)
        ade20k = Ade20k(segments, "training", lambda *sample: sample)
        names = [t.train.samples + t.eval.samples for t in (task, flat)]
        sums = [part.sum().item() for part in (demo.train, demo.test)]
        return [task.classes, task.describe(), *names, demo.classes, *sums, ade20k.samples]

    clean = read()
    for folder in [p for p in (data, segments) for p in [p, *p.rglob("*")] if p.is_dir()]:
        leave_behind(folder)
    assert read() == clean

    classify(data, tmp_path / "run", "--steps=1", "--batch-size=4")
    capsys.readouterr()
    given = sorted(photos[0].parent.glob("*"))
    assert cli.main(["predict", *map(str, [tmp_path / "run", *given, "--output", tmp_path])]) == 0
    captured = capsys.readouterr()
    answered = [line for line in captured.out.splitlines() if line.startswith(str(data))]
    assert len(answered) == len([path for path in given if not is_hidden(path)])
    assert f"{photos[0].parent / 'Thumbs.db'}: hidden or a system's, left out" in captured.err


def test_the_folder_itself_may_have_any_name_and_links_are_followed_once(tmp_path: Path) -> None:
    root = tmp_path / ".cache" / "lost+found"
    write_image(root / "b" / "c" / "1.png")
    write_image(root / "a.png")
    write_image(tmp_path / "elsewhere" / "2.png")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "b" / "back").symlink_to(root)
    (tmp_path / "elsewhere" / "back").symlink_to(root / "b")
    found = [str(path.relative_to(root)) for path in files_under(root)]
    assert found == ["a.png", "b/c/1.png", "link/2.png", "link/back/c/1.png"]
    assert not any(
        map(is_hidden, (Path("."), Path(".."), Path("a/.."), Path("a.b"), Path("train")))
    )


def test_whatever_pillow_reads_is_read_whatever_its_ending(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    suffixes = [
        "gif",
        "jfif",
        "jpg",
        "JPG",
        "png",
        "ppm",
        "tga",
        "tiff",
        "webp",
        "jp2",
        "ico",
        "pcx",
    ]
    if ".avif" in Image.registered_extensions():  # from Pillow 11.3 on
        suffixes.append("avif")
    for split in ("train", "val"):
        for label, level in (("dark", 20), ("light", 230)):
            for suffix in suffixes:
                write_image(tmp_path / split / label / f"x.{suffix}", level, (16, 16))
    task = make_task(tmp_path)
    assert Counter(Path(path).suffix for path, _ in task.train.samples) == {
        f".{suffix}": 2 for suffix in suffixes
    }
    for data in (task.train, task.eval):
        for index, (path, label) in enumerate(data.samples):
            task.eval.samples[0] = (path, label)
            image, _ = task.eval[0]
            light = (image * task.config["std"][0] + task.config["mean"][0]).mean()
            assert abs(light - (230 if label else 20) / 255) < 0.03, (path, index)
    demo = load_folder(tmp_path / "train", 8, seed=0)
    assert len(demo.train) + len(demo.test) == 2 * len(suffixes)


def test_images_that_pillow_cannot_read_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = write_digits(tmp_path / "data", train=30, val=30)
    photo = data / "train" / "3" / "IMG_0001.HEIC"
    photo.write_bytes(b"\0\0\0\x24ftypheic")
    epoch = ("--epochs=1", "--batch-size=31")
    assert cli.main(arguments(data, tmp_path / "out", *epoch)) == 1
    error = capsys.readouterr().err
    assert error.startswith(
        f"setformer train classify: {photo}: not an image of a kind that Pillow"
    )
    assert error.count("\n") == 1
    result = classify(data, tmp_path / "skipped", *epoch, "--on-error=skip")
    assert len(result["skipped"]) == 1
    photo.unlink()

    stray, unnamed, notes = (data / "train" / n for n in ("stray.png", "3/0001", "3/notes.txt"))
    for path in (stray, unnamed, notes):
        write_image(path) if path is not notes else path.write_text("no image")
    text = make_task(data).describe()
    assert text.startswith("30 training and 30 evaluation images of 10 classes")
    assert f"3 files are no images or in no class: {stray}; {unnamed}; {notes}" in text


def write_classes(root: Path, **counts: int) -> Path:
    for label, (name, count) in enumerate(counts.items()):
        for index in range(count):
            write_image(root / name / f"{index}.png", 90 * label)
    return root


def test_one_folder_of_classes_is_split_by_class_and_seed(tmp_path: Path) -> None:
    data = write_classes(tmp_path / "data", cat=40, dog=10, eel=3)
    task = make_task(data, "--val-share=0.2")
    assert Counter(label for _, label in task.eval.samples) == {0: 8, 1: 2, 2: 1}
    everything = task.train.samples + task.eval.samples
    assert sorted(path for path, _ in everything) == sorted(map(str, data.rglob("*.png")))
    for path, label in everything:
        assert Path(path).parent.name == task.classes[label]
    assert make_task(data, "--val-share=0.2").eval.samples == task.eval.samples
    assert make_task(data, "--val-share=0.2", seed=1).eval.samples != task.eval.samples
    assert Counter(label for _, label in make_task(data, "--val-share=.99").train.samples) == {
        0: 1,
        1: 1,
        2: 1,
    }
    result = classify(data, tmp_path / "out", "--steps=1", "--batch-size=8", "--val-share=0.2")
    assert result["last"]["top1"] * 11 == pytest.approx(round(result["last"]["top1"] * 11))


def test_the_split_of_the_demo_is_that_of_training(tmp_path: Path) -> None:
    data = write_classes(tmp_path, cat=9, dog=5)
    task = make_task(data, "--val-share=0.25")
    demo = load_folder(data, 8, seed=0)
    assert np.array_equal([label for _, label in task.eval.samples], demo.test_labels)
    assert held_out([*"aaabbbbcd"], 0.5, 3).count(True) == 4  # the only c and d stay
    assert held_out([], 0.5, 3) == []


def test_folders_that_cannot_be_split_are_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = write_classes(tmp_path / "flat", cat=4, dog=4)
    with pytest.raises(DataError, match=r"flat/train; expected train/CLASS.* and --val-share"):
        make_task(data)
    with pytest.raises(DataError, match=r"there is no folder .*nothing; expected CLASS"):
        make_task(tmp_path / "nothing", "--val-share=0.5")
    write_image(data / "eel" / "1.png")
    expected = "the held-out share of .*flat has no images of these classes: eel"
    with pytest.raises(DataError, match=expected):
        make_task(data, "--val-share=0.5")
    task = make_task(data, "--val-share=0.5", on_error="skip")
    assert len(task.train.samples) == 5
    with pytest.raises(DataError, match=r"flat has one class, cat; expected two or more"):
        make_task(write_classes(tmp_path / "one" / "flat", cat=4), "--val-share=0.5")
    for split in ("train", "test"):
        write_classes(tmp_path / "split" / split, cat=4, dog=4)
    with pytest.raises(DataError, match=r"--val-share: .*split/train has folders itself"):
        make_task(tmp_path / "split", "--val-share=0.5")
    given = arguments(data, tmp_path / "out", "--val-share=1.5")
    with pytest.raises(SystemExit):
        cli.main(given)
    assert (
        "--val-share: expected a number from 0.001 to 0.999, got '1.5'" in capsys.readouterr().err
    )
    assert find_images(data).others == []
    for path in data.rglob("*.png"):
        path.rename(path.with_suffix(""))
    with pytest.raises(
        DataError, match=r"no images in the 3 folders of .*flat; .* none: .*cat/0; "
    ):
        make_task(data, "--val-share=0.5")
