"""setformer evaluate: its figures are those that the training measured with the best weights."""

import argparse
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

import test_train_detect as detection
import test_train_language as language
import test_train_segment as segmentation
from setformer_ext import cli
from setformer_ext.cli.evaluate import add_arguments
from setformer_ext.cli.train import examinations, options
from setformer_ext.cli.train.ade20k import Labels
from setformer_ext.cli.train.classify import Accuracy
from text_runs import write_text_run
from training import classify, launch, metrics, run_command, write_digits


@pytest.fixture(autouse=True)
def fresh_processes() -> None:
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)


def evaluate(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = cli.main(["evaluate", *map(str, arguments)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, captured.out, captured.err


def assert_figures_are_the_trainings(
    capsys: pytest.CaptureFixture, run: Path, *arguments: object
) -> dict[str, float]:
    """All that both measure; returns it."""
    report = run / "evaluation.json"
    given = (run, *arguments, "--workers=0", "--output", report)
    status, out, err = evaluate(capsys, *given)
    assert status == 0, err
    result = json.loads(report.read_text())
    figures = result["metrics"]
    best = {name: value for name, value in metrics(run)["best"].items() if name in figures}
    assert figures == pytest.approx(best, rel=1e-5, abs=1e-7)
    for name, value in figures.items():
        assert f"{name:<24}{value:>12.4f}\n" in out
    assert result["skipped"] == []
    assert f"{result['samples']} samples\n" in out
    return figures


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"), train=64, val=40)


@pytest.fixture(scope="module")
def classifier(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run")
    classify(digits, output, "--steps=8", "--batch-size=16", "--lr=3e-3", "--eval-every=4")
    return output


@pytest.mark.slow
def test_classes(
    digits: Path, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Without the images that were trained on, in batches of another size."""
    shutil.copytree(digits / "val", tmp_path / "data" / "val")
    given = ("--data", tmp_path / "data", "--batch-size=7")
    figures = assert_figures_are_the_trainings(capsys, classifier, *given)
    assert 0 < figures["top1"] < figures["top5"] < 1
    given = ("--data", tmp_path / "data" / "val", "--split=.")
    assert_figures_are_the_trainings(capsys, classifier, *given)


@pytest.mark.parametrize(("given", "low"), [((), False), (("--precision=bf16",), True)])
def test_models_compute_in_the_precision_that_is_asked_for(
    given: tuple[str, ...],
    low: bool,
    digits: Path,
    classifier: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    update, device = Accuracy.update, "cuda" if torch.cuda.is_available() else "cpu"
    seen: set[bool] = set()

    def look(*parts: Any) -> None:
        seen.add(torch.is_autocast_enabled(device))
        update(*parts)

    monkeypatch.setattr(Accuracy, "update", look)
    assert evaluate(capsys, classifier, "--data", digits, "--workers=0", *given)[0] == 0
    assert seen == {low}


def test_workers_are_those_of_trainings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "default_workers", lambda: 3)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert parser.parse_args(["run", "--data", "data"]).workers == 3


def test_broken_samples_and_unknown_classes(
    digits: Path, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(digits / "val", tmp_path / "val")
    broken = tmp_path / "val" / "3" / "broken.png"
    broken.write_text("no image")
    given = (classifier, "--data", tmp_path, "--workers=0", "--batch-size=1")
    status, _, err = evaluate(capsys, *given)
    assert (status, err.count("\n")) == (1, 1), "a batch of nothing else"
    assert f"{broken}: not an image" in err
    report = tmp_path / "a.json"
    status, out, _ = evaluate(capsys, *given, "--on-error=skip", "--output", report)
    assert (status, "41 samples, 1 left out" in out) == (0, True)
    assert str(broken) in json.loads(report.read_text())["skipped"][0]
    (tmp_path / "val" / "zebra").mkdir()
    status, _, err = evaluate(capsys, *given)
    assert (status, "the training lacks classes of" in err, "zebra" in err) == (1, True, True)


@pytest.mark.slow
def test_processes_share_the_samples_and_tell_of_all(
    digits: Path, classifier: Path, tmp_path: Path
) -> None:
    shutil.copytree(digits / "val", tmp_path / "val")
    broken = [tmp_path / "val" / name / "broken.png" for name in ("0", "9")]  # first and last
    for path in broken:
        path.write_text("no image")
    given = ("evaluate", classifier, "--data", tmp_path, "--workers=0", "--on-error=skip")
    reports = [tmp_path / f"{count}.json" for count in (1, 2)]
    for count, report in enumerate(reports, start=1):
        command = [str(part) for part in (*given, "--output", report)]
        assert launch(count, run_command, command) == [0] * count
    one, two = (json.loads(report.read_text()) for report in reports)
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-5)
    assert len(one["skipped"]) == len(broken)
    assert {*two["skipped"]} == {*one["skipped"]}


def test_classes_keep_their_labels_where_others_are_missing(
    digits: Path, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The sums of the halves are those of the whole."""
    halves = {"low": "01234", "high": "56789", "all": "0123456789"}
    sums = {}
    for half, names in halves.items():
        for name in names:
            shutil.copytree(digits / "val" / name, tmp_path / half / "val" / name)
        report = tmp_path / f"{half}.json"
        given = ("--data", tmp_path / half, "--workers=0", "--output", report)
        assert evaluate(capsys, classifier, *given)[0] == 0
        result = json.loads(report.read_text())
        sums[half] = {n: x * result["samples"] for n, x in result["metrics"].items()}
    for name, whole in sums["all"].items():
        assert whole == pytest.approx(sums["low"][name] + sums["high"][name], rel=1e-5), name


def test_what_a_training_says_of_its_data_is_told(
    digits: Path, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(digits / "val", tmp_path / "val")
    shutil.rmtree(tmp_path / "val" / "3")
    (tmp_path / "val" / "list.csv").write_text("")
    report = tmp_path / "a.json"
    status, out, _ = evaluate(
        capsys, classifier, "--data", tmp_path, "--workers=0", "--output", report
    )
    notes = [
        f"{tmp_path / 'val'} has no images of these classes: 3",
        f"1 files are no images or in no class: {tmp_path / 'val' / 'list.csv'}",
    ]
    assert (status, json.loads(report.read_text())["notes"]) == (0, notes)
    assert "".join(f"{note}\n" for note in notes) in out


@pytest.mark.slow
def test_objects(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = detection.write_shapes(tmp_path / "data", train=8, val=5)
    given = ("--detector-options", "score_thresh=0.0", "--detector=retinanet", "--steps=12")
    detection.train(data, tmp_path / "run", *given, "--batch-size=2", "--lr=2e-3", "--ema-decay=0")
    shutil.rmtree(data / "train2017")
    figures = assert_figures_are_the_trainings(capsys, tmp_path / "run", "--data", data)
    assert figures["AP50"] > 0
    path, report = data / "annotations" / "instances_val2017.json", tmp_path / "a.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"][2] = 10_000
    content["annotations"] += [{"id": f"bad {i}"} for i in range(6)]
    path.write_text(json.dumps(content))
    given = (tmp_path / "run", "--data", data, "--workers=0", "--output", report)
    status, out, err = evaluate(capsys, *given, "--on-error=skip")
    assert (status, "5 samples, 6 records left out:\n" in out) == (0, True), err
    result = json.loads(report.read_text())
    assert (len(result["left_out"]), result["skipped"]) == (6, [])
    note = "boxes that reach out of their images, and were cut: 1"
    assert (note in result["notes"], note in out) == (True, True)


@pytest.mark.slow
def test_pixels(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data, run = segmentation.write_shapes(tmp_path / "data", train=6, val=4), tmp_path / "run"
    (data / "classes.txt").write_text("red\ngreen\nblue\n")
    segmentation.train(data, run, "--steps=6", "--window=32", "--ema-decay=0")
    shutil.rmtree(data / "images" / "training")
    figures = assert_figures_are_the_trainings(capsys, run, "--data", data)
    assert 0 < figures["mIoU"] < 1
    out = tmp_path / "out"
    images = data / "images" / "validation"
    assert cli.main(["predict", str(run), str(images), "--output", str(out)]) == 0
    right = total = 0
    for path in sorted((data / "annotations" / "validation").iterdir()):
        truth, answer = (np.asarray(Image.open(p)) for p in (path, out / "masks" / path.name))
        assert answer.shape == truth.shape
        assert {*np.unique(answer)} <= {1, 2, 3}
        right += int((answer == truth).sum())
        total += int((truth > 0).sum())
    # Normalised in another order, so that a pixel between two classes may fall to either.
    assert abs(right - figures["pixel_accuracy"] * total) < 2.5
    (data / "classes.txt").write_text("red\nblue\ngreen\n")
    status, _, err = evaluate(capsys, run, "--data", data)
    assert (status, "has the classes red, blue, green; the training has" in err) == (1, True)


def test_pixels_are_read_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A photograph from a camera held upside down, whose labels fit the pixels either way."""
    classes = ("red", "green")
    trained = SimpleNamespace(classes=classes, labels=Labels(classes, ignored=0), model=None)
    monkeypatch.setattr(examinations, "load_run", lambda _: trained)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.25]
    card = {"task": "segment", "mean": mean, "std": std, "short_side": 0, "window": 0}
    (tmp_path / "card.json").write_text(json.dumps(card))
    (tmp_path / "model.safetensors").touch()
    segmentation.write_shapes(tmp_path, train=0, val=1, classes=2)
    path = tmp_path / "images" / "validation" / "0.png"
    pixels = np.array(Image.open(path))
    exif = Image.Exif()
    exif[0x0112] = 3  # turn by half
    Image.fromarray(pixels).save(path, exif=exif)

    def read(*given: str) -> torch.Tensor:  # [H, W, 3] in [0, 1]
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        parsed = parser.parse_args([str(tmp_path), f"--data={tmp_path}", *given])
        image, _ = examinations.prepare(parsed).samples[0]
        return image.permute(1, 2, 0) * torch.tensor(std) + torch.tensor(mean)

    with pytest.raises(OSError, match="say by --annotated upright or --annotated stored"):
        read()
    as_shown = {"upright": pixels[::-1, ::-1], "stored": pixels}
    for annotated, expected in as_shown.items():
        found = read(f"--annotated={annotated}")
        torch.testing.assert_close(found, torch.tensor(expected / np.float32(255)))
    few = pixels[..., 0].size - 1
    with pytest.raises(OSError, match=f"more than {few} pixels .*by --max-pixels"):
        read("--annotated=stored", f"--max-pixels={few}")


@pytest.mark.slow
def test_masked_words_and_glue(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text, encoder, run = tmp_path / "a.txt", tmp_path / "encoder", tmp_path / "run"
    for path, count, seed in ((text, 200, 0), (text.with_suffix(".dev"), 60, 1)):
        path.write_text("\n".join(text for text, _ in language.reviews(count, seed)))
    given = language.pretraining(text, encoder, "--steps=40", "--lr=1e-2", "--seed=5")
    assert cli.main([*given, "--mask-share=0.3"]) == 0
    given = ("--data", text.with_suffix(".dev"))
    figures = assert_figures_are_the_trainings(capsys, encoder, *given)
    assert 0 < figures["accuracy"] < 1
    data = language.write_reviews(tmp_path / "glue")
    given = language.glue(data, encoder, run, "--steps=4", "--lr=2e-3")
    assert cli.main(given) == 0
    (data / "SST-2" / "train.tsv").unlink()
    figures = assert_figures_are_the_trainings(capsys, run, "--data", data)
    assert 0 < figures["accuracy"] < 1


@pytest.mark.parametrize(
    ("task", "arguments", "message"),
    [
        ("rte", ["--data", "a", "b"], "--data: expected one folder for glue, got 2"),
        ("rte", ["--data", "a", "--split=b"], "--split: of images; a training of glue has none"),
        ("rte", ["--data", "nowhere"], "there is no nowhere"),
        ("mlm", ["--data", "nowhere"], "there is no nowhere"),
    ],
)
def test_what_does_not_fit_is_explained(
    task: str, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = write_text_run(tmp_path / "run", task)
    status, _, err = evaluate(capsys, run, *arguments)
    assert status == 1
    assert message in err
    assert err.count("\n") == 1


def test_trainings_of_earlier_versions_are_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = write_text_run(tmp_path / "run", "mlm")
    (run / "card.json").write_text('{"task": "mlm", "model_options": {}}')
    status, _, err = evaluate(capsys, run, "--data", tmp_path)
    assert (status, "lacks or does not know 'sequence_length'" in err) == (1, True)
    assert "an earlier version" in err
