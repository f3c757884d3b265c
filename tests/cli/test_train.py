"""Training: that it learns, measures rightly, runs in several processes and names what is wrong."""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import setformer_ext.vision  # noqa: F401 (registers the models)
from setformer_ext import cli
from setformer_ext.cli.train import sampling
from setformer_ext.cli.train.classify import Classify
from setformer_ext.cli.train.optimization import make_schedule, parameter_groups
from setformer_ext.cli.train.options import TaskParser
from setformer_ext.cli.train.task import DataError, TrainingError
from training import (
    PLAIN,
    TINY,
    arguments,
    classify,
    launch,
    metrics,
    options_of,
    run_command,
    write_digits,
)

SHORT = ("--steps=4", "--batch-size=8", "--eval-every=2", "--lr=3e-3")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"), train=50, val=31)


@pytest.fixture(scope="module")
def frozen(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """With batch norms that are constants it does not matter how a batch is split."""
    output = tmp_path_factory.mktemp("pretrained") / "output"
    classify(data, output, *SHORT)
    return (*SHORT, f"--pretrained={output / 'model.safetensors'}", "--freeze-batch-norm")


@pytest.fixture(scope="module")
def one_process(
    data: Path, frozen: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What several processes have to give, too."""
    output = tmp_path_factory.mktemp("one") / "output"
    classify(data, output, *frozen, "--batch-size=16")
    return output


@pytest.fixture(autouse=True)
def fresh_processes() -> None:
    """Accelerate keeps the precision of the first training of a process."""
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
def test_it_learns_and_its_weights_give_the_figures_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The metrics are recomputed here from the exported weights, by timm and by hand."""
    data = write_digits(tmp_path / "data", train=1200, val=200)
    output = tmp_path / "output"
    result = classify(data, output, "--steps=80", "--batch-size=64", "--lr=5e-3", "--eval-every=40")
    assert result["best"]["top1"] > 0.7
    assert result["last"]["cross_entropy"] < result["history"][0]["cross_entropy"]
    card = json.loads((output / "card.json").read_text())
    assert card["classes"] == [str(digit) for digit in range(10)]
    model = timm.create_model(
        card["model"], checkpoint_path=output / "model.safetensors", **card["model_options"]
    ).eval()
    within = {1: 0, 5: 0}
    for path in sorted(data.glob("val/*/*.png")):
        size = (math.floor(16 / card["crop_pct"]),) * 2
        with Image.open(path) as image:
            pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
        first = round((size[0] - 16) / 2)
        pixels = pixels[first : first + 16, first : first + 16] / 255
        logits = model(torch.tensor((pixels - card["mean"]) / card["std"]).float()[None, None])
        rank = (logits[0] > logits[0, int(path.parent.name)]).sum().item()
        for k in within:
            within[k] += rank < k
    assert abs(within[1] / 200 - result["best"]["top1"]) < 0.006  # one image near a tie
    assert abs(within[5] / 200 - result["best"]["top5"]) < 0.006
    logs = EventAccumulator(str(output / "logs")).Reload()
    logged = {event.step: event.value for event in logs.Scalars("evaluation/top1")}
    assert logged == {entry["step"]: pytest.approx(entry["top1"]) for entry in result["history"]}
    assert [event.step for event in logs.Scalars("step/loss")] == list(range(10, 81, 10))
    table = capsys.readouterr().out
    assert f"{'top1':<24}{result['best']['top1']:>12.4f}{result['last']['top1']:>12.4f}" in table


@pytest.mark.slow
def test_two_processes_are_one_with_the_whole_batch(
    data: Path, frozen: tuple[str, ...], one_process: Path, tmp_path: Path
) -> None:
    """Under torchrun, DDP; 31 evaluation images are no multiple of 2, and none counts twice."""
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "setformer_ext"]
    two = arguments(data, tmp_path / "two", *frozen, "--batch-size=8")
    # elsewhere: in a checkout its own folder would come before the installed package
    subprocess.run([sys.executable, *command, *two], check=True, timeout=100, cwd=tmp_path)
    assert_close(metrics(tmp_path / "two"), metrics(one_process))


def assert_close(result: dict, known: dict) -> None:
    for entry, other in zip(result["history"], known["history"], strict=True):
        assert entry.keys() == other.keys()
        assert entry["cross_entropy"] == pytest.approx(other["cross_entropy"], rel=1e-4)
        for name in ("top1", "top5"):
            assert abs(entry[name] * 31 - other[name] * 31) < 1.01  # an image near a tie
            assert abs(entry[name] * 31 - round(entry[name] * 31)) < 1e-4


def train_sharded(given: list[str], stop_after: int | None) -> None:
    """With blocks small enough that the tiny network has some; leaves off after a checkpoint."""
    from torch.distributed.tensor import DTensor

    from setformer_ext.cli.train import parallel
    from setformer_ext.cli.train.checkpoints import Checkpoints
    from setformer_ext.cli.train.learner import Learner

    parallel.SHARD_PARAMETERS = 5000
    original, original_step = Checkpoints.save, Learner.step

    def step(self: Learner, number: int) -> None:
        assert all(isinstance(p, DTensor) for p in self.model.parameters())
        original_step(self, number)

    def save(self: Checkpoints, step: int, state: dict) -> None:
        original(self, step, state)
        if step == stop_after:
            os._exit(7)

    Checkpoints.save, Learner.step = save, step
    run_command(given)


@pytest.mark.slow
def test_sharded_training_is_the_same_and_resumes(
    data: Path, frozen: tuple[str, ...], one_process: Path, tmp_path: Path
) -> None:
    given = arguments(data, tmp_path / "two", *frozen, "--shard", "--resume")
    assert launch(2, train_sharded, given, 2)[0] == 7
    assert not (tmp_path / "two" / "metrics.json").exists()
    assert launch(2, train_sharded, given, None) == [0, 0]
    assert_close(metrics(tmp_path / "two"), metrics(one_process))
    weights = load_file(tmp_path / "two" / "model.safetensors")
    known = load_file(one_process / "model.safetensors")
    # Of 16 x 16 pixels the last two stages have one token: their references have no say, and Adam
    # makes steps of the rounding of gradients of 0.
    for name in [x for x in known if re.match(r"stages\.[23]\..*\.attention\.reference", x)]:
        del weights[name], known[name]
    torch.testing.assert_close(weights, known, rtol=0, atol=1e-3)


def remember_statistics(given: list[str], folder: Path) -> None:
    """Train, and write what the model that is evaluated knows beside its weights."""
    from setformer_ext.cli.train.learner import Learner

    original = Learner.evaluated

    def evaluated(self: Learner) -> nn.Module:
        model = original(self)
        save_file(dict(model.named_buffers()), folder / f"{self.accelerator.process_index}")
        return model

    Learner.evaluated = evaluated
    run_command(given)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--shard",), ("--ema-decay=0",)])
def test_processes_evaluate_with_the_same_statistics(
    more: tuple[str, ...], data: Path, tmp_path: Path
) -> None:
    given = arguments(data, tmp_path / "run", *SHORT, *more)
    assert launch(2, remember_statistics, given, tmp_path) == [0, 0]
    first, second = (load_file(tmp_path / str(rank)) for rank in range(2))
    assert any(name.endswith("running_mean") for name in first)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_accumulated_passes_are_one_batch(
    data: Path, frozen: tuple[str, ...], tmp_path: Path
) -> None:
    whole = classify(data, tmp_path / "whole", *frozen)
    parts = classify(data, tmp_path / "parts", *frozen, "--batch-size=4", "--accumulate=2")
    assert_close(parts, whole)


def test_gradient_checkpointing_and_average(data: Path, tmp_path: Path) -> None:
    plain = classify(data, tmp_path / "plain", *SHORT)
    again = classify(data, tmp_path / "again", *SHORT, "--gradient-checkpointing")
    assert_close(again, plain)
    no_average = classify(data, tmp_path / "weights", *SHORT, "--ema-decay=0")
    losses = [[entry["cross_entropy"] for entry in r["history"]] for r in (plain, no_average)]
    assert losses[0] == losses[1]  # of the weights themselves
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("plain", "weights")]
    assert any(not torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_bfloat16(data: Path, tmp_path: Path) -> None:
    """At 32 x 32: torch's CPU gives garbage as a strided convolution's gradient at 1 x 1."""
    full = classify(data, tmp_path / "full", *SHORT, "--input-size=32")
    AcceleratorState._reset_state(reset_partial_state=True)
    low = classify(data, tmp_path / "low", *SHORT, "--input-size=32", "--precision=bf16")
    for entry, other in zip(low["history"], full["history"], strict=True):
        assert entry["cross_entropy"] != other["cross_entropy"]
        assert entry["cross_entropy"] == pytest.approx(other["cross_entropy"], rel=0.02)


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_images_stop_or_are_left_out(
    workers: int, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(data, tmp_path / "data")
    truncated = next((tmp_path / "data" / "train").glob("*/*.png"))
    truncated.write_bytes(truncated.read_bytes()[:60])
    text = next((tmp_path / "data" / "val").glob("*/*.png"))
    text.write_text("no image")
    epoch = ("--epochs=1", "--batch-size=10", f"--workers={workers}")
    given = arguments(tmp_path / "data", tmp_path / "stopped", *epoch)
    assert cli.main(given) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"setformer train classify: {truncated}: a broken image (")
    assert error.count("\n") == 1
    result = classify(tmp_path / "data", tmp_path / "out", *epoch, "--on-error=skip")
    assert len(result["skipped"]) == 2
    assert result["last"]["top1"] * 30 == pytest.approx(round(result["last"]["top1"] * 30))
    out = capsys.readouterr().out
    assert "2 broken samples were left out:" in out
    assert str(truncated) in out
    assert f"{text}: not an image" in out


def test_every_policy_works_at_every_magnitude(data: Path, tmp_path: Path) -> None:
    """Where no bit of an image is kept all is black, as it was before Pillow 13 refused that."""
    hardest = "--auto-augment=rand-m10-n15-p1-inc1"  # nearly each image is posterized to 0 bits
    classify(data, tmp_path / "hardest", *SHORT, hardest)
    for channels in (1, 3):
        options = options_of(Classify, f"--data={data}", f"--in-chans={channels}")
        image = Image.linear_gradient("L").convert("L" if channels == 1 else "RGB")
        steps = [s for s in Classify(options).train.transform.transforms if hasattr(s, "ops")]
        for operation in steps[0].ops:  # of the default policy
            operation.prob, operation.magnitude_std = 1, 0
            for operation.magnitude in np.arange(0, 10.1, 0.5):
                result = np.asarray(operation(image))
                assert result.shape == np.asarray(image).shape
                if operation.name == "PosterizeIncreasing":
                    kept = 256 - 2 ** (8 - 4 + int(0.4 * operation.magnitude))
                    assert np.array_equal(result, np.asarray(image) & kept)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_transforms_that_fail_stop_or_are_left_out(
    workers: int,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever they raise, with the name of the file and of the step."""

    def fail(image: Image.Image, **more: object) -> None:
        raise ZeroDivisionError("no level\nand more")

    monkeypatch.setitem(timm.data.auto_augment.NAME_TO_OP, "Invert", fail)
    policy = "--auto-augment=rand-m9-n15-p1"  # inverts two of three images
    given = ("--steps=1", "--batch-size=24", f"--workers={workers}", policy)
    assert cli.main(arguments(data, tmp_path / "stopped", *given)) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"setformer train classify: {data}/train/")
    assert ".png: the transform AugmentOp(name=Invert, " in error
    assert "failed: ZeroDivisionError: no level (--on-error skip" in error
    assert error.count("\n") == 1
    result = classify(data, tmp_path / "skipped", *given, "--on-error=skip")
    assert len(result["skipped"]) > 10
    assert all("the transform AugmentOp(name=Invert" in failure for failure in result["skipped"])


def test_a_run_that_stopped_may_skip_when_it_goes_on(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(data, tmp_path / "data")
    broken = next((tmp_path / "data" / "val").glob("*/*.png"))
    intact = broken.read_bytes()
    given = arguments(tmp_path / "data", tmp_path / "out", *SHORT, "--save-every=1", "--resume")
    broken.write_bytes(b"")
    assert cli.main(given) == 1
    assert cli.main([*given, "--on-error=skip"]) == 0
    assert "going on after step 1" in capsys.readouterr().out
    broken.write_bytes(intact)


def test_data_that_cannot_be_trained_on(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "data"

    def error(*more: object) -> str:
        assert cli.main(arguments(folder, tmp_path / "out", *SHORT, *more)) == 1
        return capsys.readouterr().err

    assert f"there is no folder {folder}/train; expected train/CLASS/*.jpg" in error()
    (folder / "train").mkdir(parents=True)
    assert f"{folder}/train has no folders, one for each class" in error()
    (folder / "train" / "cat").mkdir()
    assert f"no images in the 1 folders of {folder}/train" in error()
    Image.new("RGB", (9, 9)).save(folder / "train" / "cat" / "1.png")
    assert f"there is no folder {folder}/val" in error()
    shutil.copytree(folder / "train", folder / "val")
    assert f"{folder}/train has one class, cat; expected two or more" in error()
    shutil.copytree(folder / "train" / "cat", folder / "val" / "dog")
    assert f"{folder}/train lacks classes of {folder}/val: dog" in error()
    (folder / "val" / "dog").rename(folder / "train" / "dog")
    assert f"{folder}/val has no images of these classes: dog" in error()
    assert not (tmp_path / "out").exists()
    result = classify(folder, tmp_path / "out", *SHORT, "--on-error=skip")
    assert "top5" not in result["last"]
    assert f"; {folder}/val has no images of these classes: dog" in capsys.readouterr().out


def test_labels_go_by_name_where_val_lacks_a_class(data: Path, tmp_path: Path) -> None:
    """ImageFolder alone would call the 1 a 0."""
    shutil.copytree(data, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "val" / "0")
    given = ("--data", str(tmp_path / "data"), *TINY)
    samples = Classify(options_of(Classify, *given, on_error="skip")).eval
    for index, (path, _) in enumerate(samples.samples):
        assert samples[index][1] == int(Path(path).parent.name)


def test_options_that_do_not_work(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def error(*more: str) -> str:
        assert cli.main(arguments(data, tmp_path / "out", *SHORT, *more)) == 1
        return capsys.readouterr().err

    assert "timm knows no 'setformer_huge'" in error("--model=setformer_huge")
    assert "setformer_tiny" in error("--model=tiny")
    assert "num_classes comes from the folders" in error("--model-options", "num_classes=3")
    assert "--model-options: setformer_mini: " in error("--model-options", "width=3")
    assert "dims must be multiples of 32" in error("--model-options", "dims=(3,3,3,3)")
    pairs = ("--cutmix=1", "--batch-size=3")
    assert "--batch-size: expected an even number, got 3" in error(*pairs)
    assert "--auto-augment: 'rend'" in error("--auto-augment=rend")
    assert "--shard: there is one process, expected several" in error("--shard")
    if not torch.cuda.is_available():
        assert "fp16 needs a GPU" in error("--precision=fp16")
    assert "--pretrained: cannot read weights from missing" in error("--pretrained=missing")
    assert "the loss cross_entropy is nan by step " in error("--lr=1e30", "--steps=30")


def test_pretrained_weights(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    classify(data, tmp_path / "ten", *SHORT)
    weights = tmp_path / "ten" / "model.safetensors"
    shutil.copytree(data, tmp_path / "data")
    for split in ("train", "val"):
        shutil.rmtree(tmp_path / "data" / split / "9")
    still = ("--steps=1", "--lr=0", f"--pretrained={weights}", "--freeze-batch-norm")
    classify(tmp_path / "data", tmp_path / "nine", *still)
    before, after = load_file(weights), load_file(tmp_path / "nine" / "model.safetensors")
    assert after["head.fc.weight"].shape[0] == 9
    counts = {name for name in before if name.endswith("num_batches_tracked")}
    assert before.keys() - after.keys() == counts, "what is frozen counts no batches"
    for name in after.keys() - {"head.fc.weight", "head.fc.bias"}:
        torch.testing.assert_close(after[name], before[name])
    # Such weights are those of a model whose norms are not frozen, too.
    frozen = tmp_path / "nine" / "model.safetensors"
    classify(tmp_path / "data", tmp_path / "again", "--steps=1", f"--pretrained={frozen}")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == before.keys()
    given = arguments(data, tmp_path / "out", "--freeze-batch-norm")
    assert cli.main(given) == 1
    assert "--freeze-batch-norm: expected with --pretrained" in capsys.readouterr().err
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    given = arguments(data, tmp_path / "out", f"--pretrained={tmp_path / 'other.safetensors'}")
    assert cli.main(given) == 1
    error = capsys.readouterr().err
    assert "holds weights of another model: missing, unknown or of another shape are " in error
    (tmp_path / "text.safetensors").write_text("text")
    given[-1] = f"--pretrained={tmp_path / 'text.safetensors'}"
    assert cli.main(given) == 1
    assert "--pretrained: cannot read weights from" in capsys.readouterr().err


def test_configuration_file(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The same as the options that it holds; the command line wins."""
    config = tmp_path / "config.yaml"
    config.write_text(
        f"data: {data}\nmodel: setformer_mini\nin_chans: 1\ninput-size: 16\nworkers: 0\n"
        "model-options:\n  dims: (32, 32, 32, 32)\n  depths: (1, 1, 1, 1)\n"
        "  num_references: (4, 4, 4, 4)\nprecision: no\nshard: false\nlr: 1e-1\nsteps: 4\n"
        "batch_size: 8\neval-every: 2\n" + "".join(f"{o[2:].replace('=', ': ')}\n" for o in PLAIN)
    )
    output = tmp_path / "out"
    given = ["train", "classify", f"--output={output}", "--lr=3e-3", "--config", str(config)]
    assert cli.main(given) == 0
    assert metrics(output) == classify(data, tmp_path / "same", *SHORT)
    capsys.readouterr()
    for line, expected in {
        "batchsize: 8": "batchsize: no such option; did you mean batch-size",
        "config: x": "config: no such option",
        "steps: many": "steps: expected a whole number of at least 1, got 'many'",
        "steps: [1, 2]": "steps: expected one value, got ['1', '2']",
        "in-chans: 2": "in-chans: expected one of 1, 3, got '2'",
        "in-chans: x": "in-chans: expected a valid int, got 'x'",
        "precision: fp8": "precision: expected one of no, bf16, fp16, got 'fp8'",
        "shard: 3": "shard: expected true or false, got '3'",
        "- a": "expected lines of `option: value`, got ['- a']".replace("- ", ""),
        "a: b: c": "not YAML: mapping values are not allowed here",
    }.items():
        config.write_text(f"{line}\n")
        with pytest.raises(SystemExit) as error:
            cli.main(given)
        assert error.value.code == 2
        text = capsys.readouterr().err
        assert text.count("\n") == 1
        assert f"{config}: {expected}" in text
    config.unlink()
    with pytest.raises(SystemExit):
        cli.main(given)
    assert "--config: cannot read " in capsys.readouterr().err


@pytest.mark.slow
def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def error(*given: str) -> str:
        with pytest.raises(SystemExit) as error:
            cli.main(["train", *given])
        assert error.value.code == 2
        return capsys.readouterr().err

    given = ["classify", "--data=x", f"--output={tmp_path}"]
    assert "required: task" in error()
    assert "required: --data, --output" in error("classify")
    assert "unrecognized arguments: --stepz=3" in error(*given, "--stepz=3")
    assert "--steps: expected a whole number of at least 1, got '0'" in error(*given, "--steps=0")
    command = [sys.executable, "-m", "setformer_ext", "train", *given]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("setformer train classify: --data: there is no folder x/train")
    assert result.stderr.count("\n") == 1


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.classification", None)
    monkeypatch.delitem(sys.modules, "setformer_ext.cli.train.classify")
    with pytest.raises(SystemExit, match=r'needs the package torchmetrics.*install "\.\[train\]"'):
        cli.main(["train", "classify", "--help"])


class Recorder(torch.utils.data.Dataset):
    """Ten samples, the fourth of which is broken."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[int, float, float]:
        if index == 3:
            raise DataError("the fourth")
        return index, np.random.rand(), torch.rand(()).item()  # noqa: NPY002


def test_each_epoch_holds_each_sample_once_whatever_the_processes() -> None:
    def places(passes: tuple[int, int], batch: int, processes: int) -> list[tuple[int, int]]:
        streams = [
            list(sampling.Stream(10, batch, 0, passes, rank, processes))
            for rank in range(processes)
        ]
        return [place for batches in zip(*streams, strict=True) for b in batches for place in b]

    whole = places((0, 10), 6, 1)
    for epoch in range(6):
        indices = [index for _, index in whole[10 * epoch : 10 * epoch + 10]]
        assert sorted(indices) == list(range(10))
    assert whole[:10] != [(p, i) for p, (_, i) in enumerate(whole[10:20])]
    assert places((0, 10), 3, 2) == whole
    assert places((4, 10), 3, 2) == whole[24:]
    once = [list(sampling.Once(10, 2, rank, 3)) for rank in range(3)]
    assert sorted(i for batches in once for b in batches for _, i in b) == list(range(10))
    assert max(len(b) for batches in once for b in batches) == 2


def test_samples_draw_by_their_place_and_broken_ones_are_told() -> None:
    data = sampling.SeededDataset(Recorder(), 0, sampling.SAMPLE, replace=True)
    sample, failures = data[(7, 2)]
    torch.rand(5)
    assert (sample, failures) == data[(7, 2)]
    assert failures == []
    assert data[(8, 2)].sample[1:] != sample[1:]
    replaced = data[(7, 3)]
    assert replaced.failures == ["the fourth"]
    assert replaced.sample == (4, *sample[1:])
    dropped = sampling.SeededDataset(Recorder(), 0, sampling.SAMPLE, replace=False)[(7, 3)]
    assert dropped == (None, ["the fourth"])
    batch, failures = sampling.Collate(list)([dropped, data[(7, 2)]])
    assert (batch, failures) == ([sample], ["the fourth"])
    assert sampling.Collate(list)([dropped]) == (None, ["the fourth"])


def test_layer_decay_and_weight_decay() -> None:
    options = {"dims": (32,) * 4, "depths": (1,) * 4, "num_references": (4,) * 4}
    model = timm.create_model("setformer_mini", num_classes=10, **options)
    groups = parameter_groups(model, weight_decay=0.1, layer_decay=0.5)
    of = {id(p): group for group in groups for p in group["params"]}
    assert len(of) == len(list(model.parameters()))
    named = {name: of[id(p)] for name, p in model.named_parameters()}
    layers = ["stem", *(f"stages.{i}.blocks.0" for i in range(4)), "head"]
    for above, layer in enumerate(reversed(layers)):
        scales = {named[name]["lr_scale"] for name in named if name.startswith(layer)}
        assert scales == {0.5**above}, layer
    assert named["norm.weight"]["lr_scale"] == 0.5  # timm's: as the last block
    assert named["head.fc.weight"]["weight_decay"] == 0.1
    assert named["head.fc.bias"]["weight_decay"] == 0
    assert named["stages.0.blocks.0.attention.reference"]["weight_decay"] == 0
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    schedule = make_schedule(optimizer, argparse.Namespace(lr=1.0, warmup=0.1), 100)
    schedule.step_update(50)
    for group in optimizer.param_groups:
        expected = 0.5 * (1 + math.cos(math.pi * 0.5)) * group["lr_scale"]
        assert group["lr"] == pytest.approx(expected)


def test_a_single_step_is_not_called_no_schedule(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=1.0)
    schedule = make_schedule(optimizer, argparse.Namespace(lr=1.0, warmup=0.0), 1)
    assert caplog.text == ""
    schedule.step_update(1)
    assert optimizer.param_groups[0]["lr"] == 0


def test_layer_decay_of_a_backbone_inside_a_detector() -> None:
    """The rest learns at the full rate; what a module there exempts does not decay."""

    class Head(nn.Linear):
        def no_weight_decay(self) -> set[str]:
            return {"sca*"}

    options = {"dims": (32,) * 4, "depths": (1,) * 4, "num_references": (4,) * 4}
    backbone = timm.create_model("setformer_mini", num_classes=0, **options)
    model = nn.Sequential()
    model.add_module("backbone", backbone)
    model.add_module("head", Head(32, 4))
    model.head.scale = nn.Parameter(torch.ones(4, 4))
    groups = parameter_groups(model, weight_decay=0.1, layer_decay=0.5)
    of = {id(p): group for group in groups for p in group["params"]}
    assert len(of) == len(list(model.parameters()))
    assert sum(len(group["params"]) for group in groups) == len(of)
    for parameter, decay in (
        (model.head.weight, 0.1),
        (model.head.bias, 0),
        (model.head.scale, 0),
    ):
        assert of[id(parameter)]["lr_scale"] == 1
        assert of[id(parameter)]["weight_decay"] == decay
    assert of[id(backbone.stem.first.conv.weight)]["lr_scale"] < 0.1
    with pytest.raises(TrainingError, match="--layer-decay: Linear does not say what its layers"):
        parameter_groups(nn.Linear(3, 3), weight_decay=0.1, layer_decay=0.5)


def test_lists_and_mappings_of_a_configuration_file_hold_numbers(tmp_path: Path) -> None:
    parser = TaskParser(prog="setformer train classify")
    parser.task = "classify"
    (tmp_path / "c.yaml").write_text(
        "data: d\noutput: o\nmodel_options:\n"
        "  dims: [32, 64]\n  attention_options: {epsilon: 0.1}\n"
    )
    options = parser.parse_args([f"--config={tmp_path / 'c.yaml'}"])
    assert dict(options.model_options) == {
        "dims": [32, 64],
        "attention_options": {"epsilon": 0.1},
    }
