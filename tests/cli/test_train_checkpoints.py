"""That a training survives kills, full disks and broken files, and ends in the same numbers."""

import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from setformer_ext import cli
from setformer_ext.cli.train import parallel
from setformer_ext.cli.train.checkpoints import CheckpointError, Checkpoints, write_atomically
from setformer_ext.cli.train.journal import Journal
from training import arguments, classify, launch, metrics, run_command, write_digits

# Everything that is random: crops, erasing, mixup, stochastic depth.
RANDOM = (
    "--model-options",
    "dims=(32,32,32,32)",
    "depths=(1,1,1,1)",
    "num_references=(4,4,4,4)",
    "drop_path_rate=0.3",
    "--random-erasing=0.5",
    "--auto-augment=rand-m9-mstd0.5-inc1",
    "--mixup=0.8",
    "--cutmix=1.0",
    "--flip=0.5",
)
LENGTH = (
    *("--steps=7", "--batch-size=4", "--accumulate=2", "--lr=3e-3"),
    *("--eval-every=3", "--save-every=2"),
)
KILLS = int(os.environ.get("SETFORMER_TEST_KILLS", "3"))  # at random moments


@pytest.fixture(autouse=True)
def as_many_threads_as_launched_processes_have() -> Iterator[None]:
    """Convolutions sum in another order with each number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"), train=50, val=30)


@pytest.fixture(scope="module")
def timed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A training that nobody kills, and the seconds of its process."""
    output = tmp_path_factory.mktemp("whole")
    launch(1, print)  # starts the server of all processes
    start = time.monotonic()
    assert launch(1, run_command, arguments(data, output, *RANDOM, *LENGTH)) == [0]
    return output, time.monotonic() - start


@pytest.fixture(scope="module")
def uninterrupted(timed: tuple[Path, float]) -> Path:
    return timed[0]


def train_and_die(given: list[str], call: str, count: int) -> None:
    """Kill the process at the n-th of its calls that make a file lasting."""
    owner = Path if hasattr(Path, call) else os
    original, left = getattr(owner, call), count

    def counted(*args: object, **settings: object) -> object:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **settings)

    setattr(owner, call, counted)
    run_command(given)


def assert_same_numbers(output: Path, expected: Path) -> None:
    assert metrics(output) == metrics(expected)
    weights, known = (load_file(folder / "model.safetensors") for folder in (output, expected))
    assert weights.keys() == known.keys()
    assert all(torch.equal(weights[name], known[name]) for name in known)
    last, known_last = (
        Checkpoints(folder / "checkpoints").load(pytest.fail) for folder in (output, expected)
    )
    assert_equal(last, known_last)


def assert_equal(value: Any, known: Any) -> None:
    if isinstance(known, dict):
        assert value.keys() == known.keys()
        for key in known:
            assert_equal(value[key], known[key])
    elif isinstance(known, (list, tuple)):
        for part, known_part in zip(value, known, strict=True):
            assert_equal(part, known_part)
    elif isinstance(known, torch.Tensor):
        assert torch.equal(value, known)
    else:
        assert value == known


@pytest.mark.slow
def test_killed_again_and_again_it_ends_in_the_same_numbers(
    data: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """kill -9 while a file is written, before it gets its name, before older ones are removed."""
    given = arguments(data, tmp_path, *RANDOM, *LENGTH, "--resume")
    for call, count, newest in (("fsync", 5, 2), ("replace", 4, 3), ("unlink", 3, 4)):
        assert launch(1, train_and_die, given, call, count) == [-signal.SIGKILL]
        checkpoint = Checkpoints(tmp_path / "checkpoints").load(pytest.fail)
        assert checkpoint["progress"]["step"] == newest
    assert launch(1, run_command, given) == [0]
    assert_same_numbers(tmp_path, uninterrupted)
    assert not list(tmp_path.rglob(".*")), "what killed processes left is cleared away"


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_in_the_same_numbers(
    data: Path, timed: tuple[Path, float], tmp_path: Path
) -> None:
    """kill -9 from outside, anywhere between the start of a process and its end."""
    uninterrupted, whole = timed
    output = tmp_path / "killed"
    given = arguments(data, output, *RANDOM, *LENGTH, "--resume")
    kills = 0
    while kills < KILLS:
        [status] = launch(1, run_command, given, kill_after=random.uniform(0, whole))
        if status == -signal.SIGKILL:
            kills += 1
        else:  # what is left of a training can be over before its moment
            assert status == 0
            assert_same_numbers(output, uninterrupted)
            shutil.rmtree(output)
    assert launch(1, run_command, given) == [0]
    assert_same_numbers(output, uninterrupted)


@pytest.mark.slow
def test_seed_and_workers(data: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """Another number of workers is the same training, another seed is not."""
    same = classify(data, tmp_path / "same", *RANDOM, *LENGTH, "--workers=1")
    assert same == metrics(uninterrupted)
    other = classify(data, tmp_path / "other", *RANDOM, *LENGTH, "--seed=1")
    assert other["history"] != same["history"]


def test_resuming_what_is_finished_changes_nothing(
    data: Path, uninterrupted: Path, capsys: pytest.CaptureFixture
) -> None:
    before = (uninterrupted / "metrics.json").read_bytes()
    classify(data, uninterrupted, *RANDOM, *LENGTH, "--resume")
    assert (uninterrupted / "metrics.json").read_bytes() == before
    assert "going on after step 7" in capsys.readouterr().out


@pytest.mark.slow
def test_a_broken_checkpoint_is_named_and_the_one_before_taken(
    data: Path, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given = (*RANDOM, *LENGTH)
    classify(data, tmp_path, *given)
    newest, before = Checkpoints(tmp_path / "checkpoints").paths()
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1  # one bit of some weight
    newest.write_bytes(content)
    classify(data, tmp_path, *given, "--resume")
    text = capsys.readouterr().out
    assert f"{newest}: a broken checkpoint (" in text
    assert "going on after step 6" in text
    assert_same_numbers(tmp_path, uninterrupted)
    for path in (newest, before):
        path.write_bytes(path.read_bytes()[:1000])
    assert cli.main(arguments(data, tmp_path, *given, "--resume")) == 1
    assert "no checkpoint can be read" in capsys.readouterr().err


def test_other_options_are_refused(
    data: Path, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given = arguments(data, uninterrupted, *RANDOM, *LENGTH)
    assert cli.main(given) == 1
    assert "holds a training already; go on with it by --resume" in capsys.readouterr().err
    assert cli.main([*given, "--resume", "--lr=0.1", "--seed=3", "--workers=1"]) == 1
    message = capsys.readouterr().err
    assert "lr was 0.003, is 0.1; seed was 0, is 3; go on" in message
    assert "workers" not in message
    fewer = write_digits(tmp_path, train=40, val=30)
    assert cli.main([*given, "--resume", f"--data={fewer}"]) == 1
    assert "training samples was 50, is 40" in capsys.readouterr().err


def train_on_a_full_disk(given: list[str], log: Path) -> None:
    """Files beyond this size cannot be written, which fails as a full disk does."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (900_000, 900_000))
    with log.open("w") as sys.stderr:
        run_command(given)


@pytest.mark.slow
def test_a_full_disk_loses_nothing(data: Path, uninterrupted: Path, tmp_path: Path) -> None:
    given = arguments(data, tmp_path, *RANDOM, *LENGTH, "--resume")
    assert launch(1, train_and_die, given, "replace", 2) == [-signal.SIGKILL]
    kept = {path: path.read_bytes() for path in (tmp_path / "checkpoints").glob("step-*.pt")}
    assert [path.name for path in kept] == ["step-00000002.pt"]
    assert launch(1, train_on_a_full_disk, given, tmp_path / "log") == [1]
    message = (tmp_path / "log").read_text()
    assert "cannot write " in message
    assert "File too large" in message
    assert "earlier checkpoints are untouched" in message
    assert "Traceback" not in message
    assert {path: path.read_bytes() for path in kept} == kept
    assert launch(1, run_command, given) == [0]
    assert_same_numbers(tmp_path, uninterrupted)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_logs_that_a_full_disk_does_not_take_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # TensorBoard's thread ends too
    journal = Journal(tmp_path, speaks=True, step=0, steps=1, samples=1)
    journal.writer.flush()
    [log] = journal.logs.iterdir()
    log.unlink()
    log.symlink_to("/dev/full")
    message = rf"cannot write {journal.logs}: .*No space left.*earlier checkpoints are untouched"
    with pytest.raises(CheckpointError, match=message):
        journal.evaluation({"step": 1, "loss": 0.5})


def test_parameters_without_gradients_so_far_resume_as_they_were() -> None:
    """A detector may meet its first mask, say, after the checkpoint."""

    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.ModuleDict({"used": torch.nn.Linear(3, 1), "later": torch.nn.Linear(3, 1)})
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, *names: str) -> None:
        optimizer.zero_grad()
        sum(model[name](torch.ones(1, 3)).square().sum() for name in names).backward()
        optimizer.step()

    model, optimizer = make()
    step(model, optimizer, "used")
    resumed, resumed_optimizer = make()
    resumed.load_state_dict(model.state_dict())
    whole = get_optimizer_state_dict(model, optimizer, options=parallel.WHOLE)
    state = deepcopy(whole)  # as a file would be
    parallel.load_optimizer_state(resumed, resumed_optimizer, state)
    for _ in range(2):
        step(model, optimizer, "used", "later")
        step(resumed, resumed_optimizer, "used", "later")
    assert_equal(resumed.state_dict(), model.state_dict())


def test_a_file_is_written_wholly_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def fail(file: object) -> None:
        file.write(b"half")
        raise OSError("no space left")

    with pytest.raises(CheckpointError, match=rf"cannot write {path}: no space left"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"before"
    write_atomically(path, lambda file: file.write(b"after"))
    assert path.read_bytes() == b"after"
    assert list(tmp_path.iterdir()) == [path]


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.load(pytest.fail) is None
    for step in (9, 10, 100):
        checkpoints.save(step, {"step": step})
    assert [path.name for path in checkpoints.paths()] == ["step-00000100.pt", "step-00000010.pt"]
    assert checkpoints.load(pytest.fail) == {"step": 100}
