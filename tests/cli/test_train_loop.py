"""What a training tells, which weights it keeps, how it goes on, and how it ends if it diverges."""

import argparse
import pty
import random
import sys
import time
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from select import select
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torchvision.transforms import v2

from setformer_ext import cli
from setformer_ext.cli import train as train_package
from setformer_ext.cli.train import journal, loop, options, sampling
from setformer_ext.cli.train.checkpoints import Checkpoints
from setformer_ext.cli.train.classify import Accuracy, Classify
from setformer_ext.cli.train.configuration import read_configuration
from setformer_ext.cli.train.detect import Detect
from setformer_ext.cli.train.divergence import explained
from setformer_ext.cli.train.journal import Journal
from setformer_ext.cli.train.mlm import Mlm
from setformer_ext.cli.train.options import TaskParser
from setformer_ext.cli.train.task import DataError, TrainingError
from training import arguments, classify, metrics, write_digits

SHORT = ("--batch-size=8", "--eval-every=2", "--lr=3e-3")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"), train=50, val=30)


@pytest.fixture(autouse=True)
def fresh_processes() -> None:
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_that_does_not_know_its_width_has_a_bar_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pseudo-terminals are 0 x 0 before someone says otherwise."""
    leader, follower = pty.openpty()
    with (
        open(leader, "rb", buffering=0) as screen,
        open(follower, "w", encoding="utf-8") as terminal,
    ):
        monkeypatch.setattr(sys, "stderr", terminal)
        told = Journal(tmp_path, speaks=True, step=0, steps=20, samples=8)
        for step in range(1, 11):
            told.step(step, {"loss": torch.tensor(0.5)}, 1e-3, began=0.0)
        told.bar.refresh()
        seen = ""  # a terminal may hand on in parts what was written to it at once
        while "samples/s=" not in seen and select([screen], [], [], 10)[0]:
            seen += screen.read(4096).decode(errors="ignore")
        told.close()
    for figure in ("| 10/20 [", "loss=0.5", "lr=1.0e-03", "samples/s="):
        assert figure in seen


@pytest.mark.parametrize("main_process", [True, False])
@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(
    terminal: bool,
    main_process: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Ten steps of 64 samples, a second each, before the first look; then 390 steps are left."""
    monkeypatch.setattr(sys, "stderr", bar := Terminal() if terminal else StringIO())
    now = 0.0
    monkeypatch.setattr(journal.time, "monotonic", lambda: now)
    told = Journal(tmp_path, main_process, step=0, steps=400, samples=64)
    for step in range(1, 51):
        began, now = now, now + 1.0
        told.step(step, {"a": torch.tensor(0.5), "b": torch.tensor(0.25)}, 1e-3, began)
    assert list(told.evaluating([7, 8])) == [7, 8]
    told.bar.refresh()
    told.close()
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("step ")]
    if not main_process:
        assert bar.getvalue() == out == ""
    elif terminal:
        assert lines == []
        for figure in ("loss=0.75", "lr=1.0e-03", "samples/s=64.0", "50/400", "<"):
            assert figure in bar.getvalue()
    else:
        assert bar.getvalue() == ""
        assert "\r" not in out
        assert lines == ["step 7/400  loss 0.75  lr 1.0e-03  samples/s 64.0  06:33 left"]


def test_evaluations_that_come_often_do_not_silence_the_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Steps of a second, evaluated after each 20, for ten minutes."""
    now = 0.0
    monkeypatch.setattr(journal.time, "monotonic", lambda: now)
    told = Journal(tmp_path, True, step=0, steps=600, samples=64)
    for step in range(1, 601):
        began, now = now, now + 1.0
        told.step(step, {"a": torch.tensor(0.5)}, 1e-3, began)
        if step % 20 == 0:
            assert list(told.evaluating([7, 8])) == [7, 8]
    told.close()
    lines = capsys.readouterr().out.splitlines()
    assert 9 <= len(lines) <= 11
    assert all("lr 1.0e-03  samples/s 64.0" in line and " left" in line for line in lines)


def test_a_log_gets_a_line_every_so_often_and_at_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A pipe or a file: no bar, each line written out as soon as it is told."""
    flushed = []
    monkeypatch.setattr(sys.stdout, "flush", lambda: flushed.append(True), raising=False)
    monkeypatch.setattr(journal, "LINE_EVERY", 0.0)
    classify(data, tmp_path / "out", *SHORT, "--steps=20", "--eval-every=10")
    text = capsys.readouterr()
    steps = [line.split()[1] for line in text.out.splitlines() if " left" in line]
    assert {"10/20", "20/20"} <= {*steps}
    assert "evaluation: batch 4/4" in text.out
    assert "\r" not in text.out + text.err
    assert len(flushed) >= len(steps) + 2


def entry(**figures: float) -> dict[str, float]:
    return {"step": 1, "top1": 0.5, "eval_loss": 1.0, **figures}


def test_ties_go_to_the_lower_loss() -> None:
    history = [entry(), entry(eval_loss=0.9), entry(eval_loss=0.9), entry(eval_loss=1.1)]
    assert Classify.best(history) is history[1]
    history.append(entry(top1=0.51, eval_loss=7.0))
    assert Classify.best(history) is history[-1]
    none = float("nan")
    assert Classify.best([entry(top1=none), entry(top1=0.0)])["top1"] == 0
    assert Classify.best([entry(eval_loss=none), entry()])["eval_loss"] == 1
    trained = [{"step": n, "mAP": 0.0, "train_loss": loss} for n, loss in ((1, 3.0), (2, 2.0))]
    assert Detect.best(trained)["step"] == 2, "the evaluation loss is not measured there"
    assert Mlm.best([entry(eval_loss=2.0), entry(eval_loss=1.0)])["eval_loss"] == 1
    old = [{"step": 1, "accuracy": 0.9}, entry(eval_loss=3.0)]
    assert Mlm.best(old) is old[1], "a checkpoint that has no loss yet"


def test_of_several_trainings_the_best_figures_are_averaged(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the last ones."""
    outputs = [argparse.Namespace(output=Path(name)) for name in ("sst2", "rte")]
    kind = SimpleNamespace(split=lambda options: outputs, monitor="score")
    monkeypatch.setattr(options, "task_class", lambda name: kind)
    made = iter([(0.9, 0.1), (0.6, 0.3)])

    def train(_: object, __: object) -> loop.Progress:
        best, last = next(made)
        return loop.Progress(best=best, history=[{"score": best}, {"score": last}])

    monkeypatch.setattr(loop, "train", train)
    assert train_package.run(argparse.Namespace(task="glue")) == 0
    rows = [line.split() for line in capsys.readouterr().out.rstrip().split("\n")[-3:]]
    assert rows == [["sst2", "0.9000"], ["rte", "0.6000"], ["average", "0.7500"]]


def test_the_weights_of_the_lower_loss_are_kept(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty images, and an accuracy that says the same of all of them."""
    compute = Accuracy.compute
    monkeypatch.setattr(Accuracy, "compute", lambda self: {**compute(self), "top1": 0.5})
    losses_of, modes = Classify.losses, []

    def losses(self: Classify, model: nn.Module, batch: Any) -> Any:
        modes.append(model.training)
        return losses_of(self, model, batch)

    monkeypatch.setattr(Classify, "losses", losses)
    result = classify(data, tmp_path / "out", *SHORT, "--steps=6", "--ema-decay=0")
    assert modes == [True] * 6, "also after an evaluation"
    measured = [e["eval_loss"] for e in result["history"]]
    assert result["best"] == result["history"][measured.index(min(measured))]
    checkpoint = Checkpoints(tmp_path / "out" / "checkpoints").load(pytest.fail)
    kept = load_file(tmp_path / "out" / "model.safetensors")
    same = all(torch.equal(kept[name], checkpoint["model"][name]) for name in kept)
    assert same == (min(measured) == measured[-1])


def test_the_loss_that_is_measured_is_that_of_all_samples() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(20, 10), torch.randint(10, (20,))
    accuracy = Accuracy(10)
    for part in (slice(0, 13), slice(13, 20)):
        accuracy.update(lambda images: images, (logits[part], labels[part]))
    figures = accuracy.compute()
    known = -logits.double().log_softmax(-1)[range(20), labels].mean()
    assert figures["eval_loss"] == pytest.approx(known.item(), rel=1e-6)
    accuracy.update(lambda images: images, (logits * torch.nan, labels))
    accuracy.update(lambda images: images, (logits, labels))
    assert accuracy.compute()["eval_loss"] == torch.inf


def training(rank: int = 0, **options: Any) -> loop.Training:
    """That of one of two processes, without data and with a learner that only seems to learn."""
    made = loop.Training.__new__(loop.Training)
    made.rank, made.processes, made.steps = rank, 2, 9
    made.shared = {"steps": 9, "batch_size": 1, "processes": 2, "accumulate": 1}
    made.options = argparse.Namespace(seed=0, output=Path(), **options)
    made.checkpoints, made.progress, made.sums = Checkpoints(Path()), loop.Progress(), {}
    device = torch.device("cpu")
    made.accelerator = SimpleNamespace(device=device, is_main_process=False, reduce=lambda x, _: x)
    made.eval_loader = []
    made.journal = SimpleNamespace(
        step=lambda *_: None, evaluation=lambda *_: None, evaluating=iter
    )
    made.learner = SimpleNamespace(
        model=nn.Linear(1, 1),
        lr=0.0,
        evaluated=lambda: nn.Linear(1, 1),
        **dict.fromkeys(("again", "step", "load_state"), lambda *_: None),
    )
    return made


def test_each_pass_of_each_step_and_process_draws_its_own_numbers() -> None:
    drawn: list[tuple[float, ...]] = []

    def backward(batch: torch.Tensor, last: bool) -> dict[str, torch.Tensor]:
        drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))  # noqa: NPY002
        return {}

    for rank in range(2):
        process = training(rank, accumulate=2)
        process.learner.backward = backward
        for _ in range(3):
            process._step(iter([(torch.zeros(1), [])] * 2))
    assert [len({*numbers}) for numbers in zip(*drawn, strict=True)] == [3 * 2 * 2] * 3


@pytest.mark.parametrize("measured", [{"mAP": 0.5}, {"eval_loss": 7.0, "top1": 0.5}])
def test_an_evaluation_tells_the_mean_losses_and_where_none_is_measured_their_sum(
    measured: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes of three passes each, whose losses add up to 6 and 18 over both."""
    monkeypatch.setattr(loop, "measure", lambda *_: measured)
    process = training()
    kind = Detect if "mAP" in measured else Classify
    process.task = SimpleNamespace(metrics=dict, best=kind.best, monitor=kind.monitor)
    process.sums = {name: torch.tensor(x).double() for name, x in (("a", 6.0), ("b", 18.0))}
    process.progress = loop.Progress(step=9, passes=3)
    process._evaluate()
    means = {"a": 1.0, "b": 3.0} | ({} if "eval_loss" in measured else {"train_loss": 4.0})
    assert process.progress.history == [{"step": 9, **means, **measured}]
    assert process.sums == {}
    assert process.progress.passes == 0


def test_losses_from_before_a_resume_count_once_whatever_the_processes() -> None:
    """A checkpoint between two evaluations has the sums of all processes."""
    saved = loop.Progress(step=5, losses={"a": 6.0, "b": 18.0}, passes=2)
    both = []
    for rank in range(2):
        process = training(rank)
        process._restore({"shared": process.shared, "progress": asdict(saved)})
        both.append(process._all_sums())
    assert {name: both[0][name] + both[1][name] for name in ("a", "b")} == saved.losses


def lrs(output: Path) -> dict[int, float]:
    events = EventAccumulator(str(output / "logs")).Reload().Scalars("step/lr")
    return {event.step: event.value for event in events}


@pytest.mark.slow
def test_a_finished_run_is_extended(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Along the cosine of all steps; killed meanwhile, it ends in the same numbers."""
    monkeypatch.setattr(journal, "LOSS_EVERY", 1)
    short, given = (*SHORT, "--warmup=0"), (*SHORT, "--warmup=0", "--resume")
    first = classify(data, tmp_path / "out", *short, "--steps=4")
    capsys.readouterr()
    time.sleep(1)  # TensorBoard tells the order of files by the second in their names
    result = classify(data, tmp_path / "out", *given, "--steps=8")
    out = capsys.readouterr().out
    assert "going on after step 4, of 8 steps instead of 4: the learning rate goes from " in out
    assert [e["step"] for e in result["history"]] == [2, 4, 6, 8]
    assert result["history"][:2] == first["history"]
    cosine = [3e-3 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * n / 8)).item()) for n in range(8)]
    assert {n: lrs(tmp_path / "out")[n] for n in range(5, 9)} == {
        n: pytest.approx(cosine[n - 1]) for n in range(5, 9)
    }
    classify(data, tmp_path / "again", *short, "--steps=4")
    with monkeypatch.context() as patch:
        save = Checkpoints.save

        def stop(self: Checkpoints, step: int, state: dict) -> None:
            save(self, step, state)
            if step == 6:
                raise KeyboardInterrupt

        patch.setattr(Checkpoints, "save", stop)
        assert cli.main(arguments(data, tmp_path / "again", *given, "--steps=8")) == 130
    assert classify(data, tmp_path / "again", *given, "--steps=8") == result
    assert classify(data, tmp_path / "again", *given, "--epochs=2")["last"]["step"] == 13
    assert metrics(tmp_path / "again")["history"][:4] == result["history"]


def test_a_run_whose_schedule_does_not_allow_it_is_not_extended(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    given = arguments(data, tmp_path, *SHORT, "--resume")
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", interrupted_after(Checkpoints.save, 2))
        assert cli.main([*given, "--steps=7"]) == 130
    capsys.readouterr()
    for length in ("--steps=8", "--steps=3", "--epochs=2"):
        assert cli.main([*given, length]) == 1
        message = capsys.readouterr().err
        assert f"--resume: {tmp_path} is at step 2 of 7" in message
        assert "a cosine of 7 steps; take these first" in message
    assert cli.main([*given, "--epochs=1"]) == 0, "50 samples are seven steps of eight"
    assert cli.main([*given, "--steps=3"]) == 1
    assert "is at step 7 of 7" in capsys.readouterr().err
    assert cli.main([*given, "--steps=8", "--lr=1"]) == 1
    assert "lr was 0.003, is 1.0; go on" in capsys.readouterr().err


def interrupted_after(save: Any, last: int) -> Any:
    def stop(self: Checkpoints, step: int, state: dict) -> None:
        save(self, step, state)
        if step == last:
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize("nothing", ["null", "~", "", "Null", "NULL"])
def test_nothing_in_a_configuration_file_is_not_given(nothing: str, tmp_path: Path) -> None:
    def parse(text: str) -> argparse.Namespace:
        parser = TaskParser(prog="setformer train classify")
        parser.task = "classify"
        (tmp_path / "c.yaml").write_text(f"data: d\noutput: o\n{text}")
        return parser.parse_args([f"--config={tmp_path / 'c.yaml'}"])

    dash = nothing or "~"  # a list has no empty place
    absent = parse(
        f"steps: {nothing}\nlr: {nothing}\nshard: {nothing}\npretrained: {nothing}\n"
        f"auto_augment: {nothing}\nmodel_options: {nothing}\nprecision: no\n"
    )
    assert vars(absent) == {**vars(parse("")), "precision": "no"}
    inside = parse(
        f"model_options:\n  dims: [32, {dash}, 64]\n  drop_path_rate: {nothing}\n"
        f"  attention_options: {{epsilon: 0.1, iterations: {dash}}}\n"
        f"  other: {{a: {dash}}}\n  word: '{dash}'\n"
    )
    assert dict(inside.model_options) == {
        "dims": [32, 64],
        "attention_options": {"epsilon": 0.1},
        "word": dash,
    }
    assert parse(f"model_options: [{dash}]").model_options == []
    assert parse(f'auto_augment: "{nothing}"\n').auto_augment == nothing
    assert read_configuration_of(tmp_path, nothing) == {}
    with pytest.raises(SystemExit):
        parse(f"stepz: {nothing}\n")


def read_configuration_of(folder: Path, text: str) -> dict[str, Any]:
    (folder / "d.yaml").write_text(text)
    return read_configuration(folder / "d.yaml")


@pytest.mark.parametrize(
    ("cores", "processes", "workers"), [(1, 1, 0), (2, 1, 1), (3, 2, 0), (16, 1, 4), (16, 8, 1)]
)
def test_workers_are_as_many_as_there_are_cores_for(
    cores: int, processes: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options.os, "sched_getaffinity", lambda _: {*range(cores)}, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert options.default_workers() == workers


class Contrasts(torch.utils.data.Dataset):
    """Whose mean over a million pixels threads add up in an order of their own."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> torch.Tensor:
        return v2.functional.adjust_contrast(torch.rand(3, 700, 900), 1.5)


def test_samples_are_the_same_from_workers_and_from_any_number_of_threads() -> None:
    def load(workers: int, threads: int) -> list[torch.Tensor]:
        torch.set_num_threads(threads)
        data = sampling.SeededDataset(Contrasts(), 0, sampling.SAMPLE, replace=True)
        batches = sampling.Once(3, 2)
        collate = sampling.Collate(torch.stack)
        loader = torch.utils.data.DataLoader(
            data, batch_sampler=batches, collate_fn=collate, num_workers=workers
        )
        loaded = [batch for batch, _ in loader]
        assert torch.get_num_threads() == threads
        return loaded

    known = load(workers=1, threads=1)
    for threads in (1, 2, 3):
        for batch, same in zip(load(0, threads), known, strict=True):
            assert torch.equal(batch, same)


class Refusing(nn.Module):
    """As torchvision's detectors and SetAttention do of some of their inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x)
        if not x.isfinite().all() or x[0, 0] == 0:
            raise ValueError("masses must be > 0")
        return x


def test_what_a_model_raises_over_infinite_numbers_is_told_as_the_loss() -> None:
    model, fine = Refusing(), torch.ones(1, 2)

    def message(x: torch.Tensor, losses: dict[str, torch.Tensor], again: bool = True) -> str:
        try:
            with explained(losses, model, 7, (lambda: model(x)) if again else None):
                model(x)
                raise ValueError("masses must be > 0")
        except (TrainingError, ValueError) as error:
            return str(error)

    told = "the loss is lost: the results of Linear are not finite (masses must be > 0) by step 7"
    assert message(fine * torch.inf, {}).startswith(told)
    assert message(fine * torch.inf, {}, again=False) == "masses must be > 0", "not looked into"
    assert message(fine, {}) == "masses must be > 0", "a fault of its own"
    losses = {"mask": torch.tensor(torch.inf)}
    assert message(fine, losses).startswith("the loss mask is inf by step 7; try a lower --lr")
    with torch.no_grad():
        model.inner.weight[0, 0] = torch.nan
    told = "the loss is lost: the weights inner.weight are not finite by step 7; try a lower --lr"
    assert message(fine, {}, again=False).startswith(told)
    with pytest.raises(DataError, match="a file"), explained({}, model, 7, None):
        raise DataError("a file")
    with pytest.raises(torch.OutOfMemoryError), explained({}, model, 7, None):
        raise torch.OutOfMemoryError("memory")


@pytest.mark.parametrize("every", [4, 100])
@pytest.mark.parametrize("lr", ["10", "1e10"])
def test_a_model_that_refuses_its_weights_ends_in_the_message_about_the_loss(
    lr: str, every: int, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Reference masses were 0, and were refused, before the loss was infinite."""
    length = ("--steps=12", f"--eval-every={every}", f"--lr={lr}", "--warmup=0")
    status = cli.main(arguments(data, tmp_path / "out", "--batch-size=8", *length))
    error = capsys.readouterr().err
    assert (status, error) == (0, "") or "setformer train classify: the loss " in error


def test_weights_that_the_last_step_spoils_are_not_written(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The losses were finite up to then."""
    step = torch.optim.AdamW.step

    def spoil(self: torch.optim.AdamW, *arguments: Any) -> None:
        step(self, *arguments)
        self.param_groups[0]["params"][0].data.fill_(torch.nan)

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    assert cli.main(arguments(data, tmp_path / "out", *SHORT, "--steps=1")) == 1
    error = capsys.readouterr().err
    assert "the loss is lost: the weights " in error
    assert error.count("\n") == 1
    assert not list((tmp_path / "out").glob("**/*.pt"))
    assert not (tmp_path / "out" / "model.safetensors").exists()
