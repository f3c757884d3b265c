"""The command `profile`: that it runs what it says, where it says, and explains bad options."""

import contextlib
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from setformer_ext import cli
from setformer_ext.cli import profile, timing
from setformer_ext.cli.timing import SHAPES, Shape
from setformer_ext.errors import UserError

SMALL = ["--batch=1", "--heads=2", "--tokens=9", "--references=3", "--depth=4"]


def run_profile(*arguments: str) -> int:
    return cli.main(["profile", "--device=cpu", *SMALL, "--repeats=2", "--warmup=1", *arguments])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The arguments of every call of set_attention."""
    seen: list[dict] = []
    original = profile.set_attention

    def spy(query: None, key: torch.Tensor, value: torch.Tensor, y: torch.Tensor, **options):
        grad = torch.is_grad_enabled() and key.requires_grad
        seen.append({"key": key, "value": value, "y": y, "grad": grad, **options})
        return original(query, key, value, y, **options)

    monkeypatch.setattr(profile, "set_attention", spy)
    return seen


def test_runs_what_it_says(calls: list[dict], capsys: pytest.CaptureFixture) -> None:
    options = ["--value-depth=5", "--dtype=bfloat16", "--kernel=linear", "--iterations=2"]
    assert run_profile(*options) == 0
    # the first shapes the output's gradient, then come one to warm up and two measured ones
    assert [call["grad"] for call in calls] == [False, True, True, True]
    for call in calls:
        assert call["key"].shape == (1, 2, 9, 4)
        assert call["value"].shape == (1, 2, 9, 5)
        assert call["y"].shape == (2, 3, 4)
        assert {call[name].dtype for name in ("key", "value", "y")} == {torch.bfloat16}
        assert (call["kernel"], call["iterations"]) == ("linear", 2)
    first, second = capsys.readouterr().out.splitlines()
    assert "forward and backward, B=1 H=2 N=9 M=3 D=4 Dv=5, bfloat16, linear kernel, T=2" in first
    numbers = r"([\d.e+-]+) ms per call: median of 2 after 1 to warm up, from (\S+) to (\S+)"
    median, least, most = (float(x) for x in re.fullmatch(numbers, second).groups())
    assert 0 < least <= median <= most


def test_forward_alone(calls: list[dict], capsys: pytest.CaptureFixture) -> None:
    assert run_profile("--no-backward") == 0
    assert [call["grad"] for call in calls] == [False] * 3
    assert "backward" not in capsys.readouterr().out


@pytest.mark.parametrize("name", SHAPES)
def test_named_shapes(name: str) -> None:
    parser = profile.argparse.ArgumentParser()
    profile.add_arguments(parser)
    assert profile.chosen_shape(parser.parse_args(["--shape", name])) == SHAPES[name]
    changed = profile.chosen_shape(parser.parse_args(["--shape", name, "--depth", "16"]))
    assert changed == replace(SHAPES[name], depth=16, value_depth=16)


def test_the_shapes_are_those_of_the_readme() -> None:
    assert SHAPES["v1"] == Shape(8, 3, 3136, 32, 32, 49)
    assert SHAPES["long"] == Shape(1, 8, 16384, 64, 64, 128)


@pytest.mark.parametrize(
    "options",
    [["--batch=0"], ["--tokens=-1"], ["--depth=x"], ["--iterations=-1"], ["--repeats=0"]],
)
def test_bad_sizes_are_explained(options: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        run_profile(*options)
    assert ended.value.code == 2
    name, value = options[0].split("=")
    least = 0 if name == "--iterations" else 1
    expected = f"argument {name}: must be an integer of at least {least}, got '{value}'"
    assert expected in capsys.readouterr().err


def test_no_iterations_and_no_warmup() -> None:
    assert run_profile("--iterations=0", "--warmup=0") == 0


@pytest.mark.parametrize("name", ["tpu", "mps", "cpu:x", ""])
def test_bad_device(name: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["profile", "--device", name]) == 1
    expected = f"setformer profile: --device must be cpu, cuda or cuda:N, got {name or 'nothing'}\n"
    assert capsys.readouterr().err == expected


def pretend(monkeypatch: pytest.MonkeyPatch, runtime: str, torch_cuda: str | None, gpus: int):
    facts = {"cuda": "not compiled: SETFORMER_CUDA=off", "cuda_runtime": runtime}
    monkeypatch.setattr(timing, "build_info", lambda: facts)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


@pytest.mark.parametrize(
    ("runtime", "torch_cuda", "gpus", "reason"),
    [
        ("", "13.0", 1, "no CUDA kernels (not compiled: SETFORMER_CUDA=off)"),
        ("13.0", None, 1, "was built without CUDA"),
        ("13.0", "13.0", 0, "torch finds no usable NVIDIA GPU"),
    ],
)
def test_says_why_there_is_no_cuda(
    runtime: str,
    torch_cuda: str | None,
    gpus: int,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, runtime, torch_cuda, gpus)
    with pytest.raises(UserError, match=re.escape(reason)) as refused:
        timing.find_device("cuda:0")
    assert str(refused.value).startswith("--device cuda:0 cannot be used: ")
    assert timing.find_device(None) == torch.device("cpu")


def test_finds_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "13.0", "13.0", 2)
    assert timing.find_device(None) == torch.device("cuda", 0)
    assert timing.find_device("cuda") == torch.device("cuda", 0)
    assert timing.find_device("cuda:1") == torch.device("cuda", 1)
    assert timing.find_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match=r"one of the 2 GPUs torch finds.*got cuda:2"):
        timing.find_device("cuda:2")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A pretended GPU: what is called of torch.cuda, in order."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")
            self.time = len(log)

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, later: "Event") -> float:
            return later.time - self.time

    def logged(name: str) -> Callable[[], None]:
        return lambda: log.append(name)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", logged("synchronize"))
    monkeypatch.setattr(torch.cuda.profiler, "start", logged("cudaProfilerStart"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", logged("cudaProfilerStop"))
    return log


def test_the_profiler_captures_the_measured_calls_alone(log: list[str]) -> None:
    times = profile._profiled(lambda: log.append("call"), torch.device("cuda", 0), 3)
    assert log == [
        *("synchronize", "cudaProfilerStart", "record"),
        *("call", "record") * 3,
        *("wait", "synchronize", "cudaProfilerStop"),
    ]
    assert times == [2, 2, 2]
