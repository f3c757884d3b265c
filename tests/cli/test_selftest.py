"""The command `selftest`: green where all is well, and a report of everything that is not."""

import contextlib
import itertools
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import BACKENDS, Backend
from emulator.device import Emulator
from setformer_ext import cli, ops, set_attention
from setformer_ext.cli.selftest import (
    benchmark,
    cuda_checks,
    definition_checks,
    report,
    runner,
    selftest,
)
from setformer_ext.cli.selftest.outcome import (
    CHECKS,
    SECTIONS,
    SMOKE,
    SPEED,
    Outcome,
    SkippedError,
    Task,
    Timing,
    execute,
)
from setformer_ext.cli.selftest.problems import run
from setformer_ext.cli.selftest.tolerance import Comparison

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.slow
def test_quick_run_is_green(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend.emulated:  # whose times mean nothing
        monkeypatch.setattr(benchmark, "ROUNDS", 1)
        monkeypatch.setattr(benchmark, "CALLS", 1)
    result = selftest(backend.device, quick=True)
    assert result.passed, result.text
    assert {outcome.status for outcome in result.outcomes} <= {"ok", "skipped"}
    shares = [float(share) for share in re.findall(r"^ok .* (\S+)% +\d", result.text, re.M)]
    assert len(shares) > 25
    assert all(0 <= share <= 100 for share in shares)
    assert result.text.splitlines()[-1].startswith("PASSED: ")
    timings = [timing for outcome in result.outcomes for timing in outcome.timings]
    assert len(timings) == 2
    for timing in timings:
        assert set(timing.milliseconds) == {"setformer_ext", "definition", "softmax"}
        assert min(timing.milliseconds.values()) > 0


def test_full_holds_quick() -> None:
    for device in (CPU, GPU):
        quick, full = ([x.name for x in runner.all_tasks(device, q)] for q in (True, False))
        assert len(set(quick)) == len(quick)
        assert len(set(full)) == len(full)
        assert {name for name in quick if not name.startswith("time of ")} < set(full)


def test_smoke_then_speed_then_the_rest() -> None:
    for device in (CPU, GPU):
        sections = [task.section for task in runner.all_tasks(device, False)]
        assert sections == sorted(sections, key=SECTIONS.index)
        assert set(sections) == set(SECTIONS)
        for section in SECTIONS:
            few = runner.all_tasks(device, False, [section])
            assert [task.section for task in few] == sections.count(section) * [section]


def test_smoke_checks_run_every_family_in_every_type_and_direction() -> None:
    kernels = definition_checks.smoke_kernels()
    assert len(set(kernels)) == len(kernels) == (2 * 4 - 1) * 2 + 2 * 2
    for family, count in {"resident": 3, "streaming": 4, "cluster": 2, "shares": 2}.items():
        assert len({x.dtype for x in kernels if x.family == family}) == count
    # a process that is lost over each of them: two tell more where nothing is alike
    first, second = kernels[:2]
    assert first.family != second.family
    assert first.dtype != second.dtype


def test_smoke_checks_run_the_family_they_name() -> None:
    """As far as the launch code chooses on a device of capability 9.0."""
    own = {
        "resident": "on_chip_kernel",
        "streaming": "step_kernel",
        "cluster": "on_cluster_kernel",
        "shares": "on_shares_kernel",
    }
    backend = BACKENDS["cuda-emulated"]()
    emulator = Emulator(backend.module.__file__)
    with emulator.of_capability(90):
        for task in definition_checks.smoke_tasks():
            types = (torch.bfloat16, torch.float32)
            if task.smoke.dtype in types and task.smoke.direction == "forward":
                emulator.clear_launches()
                ops._C = backend.module
                assert execute(task, CPU).status == "ok"
                found = {
                    x for x in own.values() for launch in emulator.launches() if x in launch.kernel
                }
                assert found == {own[task.smoke.family]}


# What a wrong kernel does to its arrays, and a check that must notice.
FAULTS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {}


def fault(check: str) -> Callable[[Callable[[dict[str, Any]], None]], None]:
    def register(function: Callable[[dict[str, Any]], None]) -> None:
        FAULTS[function.__name__] = (function, check)

    return register


@fault("odd sizes, float32")
def output_off_by_a_thousandth(arrays: dict[str, Any]) -> None:
    if "grad_key" not in arrays and arrays["key"].dtype == torch.float32:
        arrays["output"].mul_(1.001)


@fault("every option, float64")
def derivative_by_epsilon_off(arrays: dict[str, Any]) -> None:
    if "grad_epsilon" in arrays:
        arrays["grad_epsilon"].mul_(1 + 1e-6)


@fault("every option, bfloat16")
def pooled_not_written(arrays: dict[str, Any]) -> None:
    if "output" not in arrays:
        arrays["pooled"].fill_(torch.nan)


RUNS = itertools.count()


@fault("two runs alike, float32")
def last_bits_vary(arrays: dict[str, Any]) -> None:
    for name in arrays.keys() & {"grad_key"}:
        # two units of float32's rounding more each time
        arrays[name].mul_(1 + 2.0**-22 * next(RUNS))


@fault("any layout, bfloat16")
def strides_matter(arrays: dict[str, Any]) -> None:
    if "grad_value" in arrays and not arrays["value"].is_contiguous():
        arrays["grad_value"].add_(1e-3)


@fault("any layout, float32")
def alignment_matters(arrays: dict[str, Any]) -> None:
    if "grad_value" not in arrays and arrays["key"].data_ptr() % 16:
        arrays["output"].mul_(1 + 1e-6)


@fault("extreme similarities, float32")
def infinite_at_small_epsilon(arrays: dict[str, Any]) -> None:
    if "grad_key" in arrays and arrays["epsilon"].min() < 0.01:
        arrays["grad_key"].view(-1)[0] = torch.inf


@fault("sizes of 0 and no valid token")
def padding_gets_output(arrays: dict[str, Any]) -> None:
    if "mask" in arrays and "output" in arrays and not arrays["mask"].any():
        arrays["output"].fill_(1)


@fault("not a number stays in its batch item")
def nan_spreads(arrays: dict[str, Any]) -> None:
    if "output" in arrays and arrays["value"].isnan().any():
        arrays["output"].fill_(torch.nan)


@fault("finite differences")
def derivative_by_keys_off(arrays: dict[str, Any]) -> None:
    if "grad_key" in arrays:
        arrays["grad_key"].mul_(1.01)


@fault("the module")
def no_gradient_of_references(arrays: dict[str, Any]) -> None:
    if "grad_reference" in arrays:
        arrays["grad_reference"].fill_(torch.inf)


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_kernel_is_reported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil, check = FAULTS[name]
    original = ops.run

    def run(function: str, arrays: dict[str, Any]) -> None:
        original(function, arrays)
        spoil(arrays)

    monkeypatch.setattr(ops, "run", run)
    tasks = [task for task in runner.all_tasks(CPU, quick=True) if task.name == check]
    monkeypatch.setattr(runner, "all_tasks", lambda *_: tasks)
    result = selftest(CPU, quick=True)
    assert not result.passed
    assert [outcome.name for outcome in result.outcomes] == [check]
    assert f"\nFAILED {check}\n  " in result.text
    assert result.text.splitlines()[-1].startswith("FAILED: 0 ok, 1 failed, 0 skipped")


def passing(device: torch.device) -> list[Comparison]:
    return [Comparison("x", 1e-8, 1e-7)]


def failing(device: torch.device) -> list[Comparison]:
    return [Comparison("x", 0, 0), Comparison("y", 2e-3, 1e-3, "a note")]


def not_a_number(device: torch.device) -> list[Comparison]:
    return [Comparison("x", 0, 0), Comparison("z", float("nan"), 1e-3)]


def raising(device: torch.device) -> list[Comparison]:
    raise RuntimeError("an illegal memory access was encountered")


def skipping(device: torch.device) -> list[Comparison]:
    raise SkippedError("torch finds one GPU")


def measuring(device: torch.device) -> list[Timing]:
    return [Timing("B=1", {"setformer_ext": 2.0, "definition": 5.0})]


MIXED = [
    Task(function.__name__, function)
    for function in (passing, failing, not_a_number, raising, skipping, measuring)
]


def test_one_failure_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(runner, "all_tasks", lambda *_: MIXED)
    file = tmp_path / "report.txt"
    options = ["--device=cpu", "--quick", "--in-process", "--output", str(file)]
    assert cli.main(["selftest", *options]) == 1
    text = capsys.readouterr().out
    assert text == file.read_text()
    assert_record_has_it_all(json.loads(file.with_suffix(".json").read_text()), text)
    checks = text.partition("allowed")[2].splitlines()[1 : len(MIXED) + 1]
    assert [line.split()[0] for line in checks] == [
        *("ok", "FAILED", "FAILED", "FAILED", "skipped", "ok")
    ]
    assert [line.split()[1] for line in checks] == [task.name for task in MIXED]
    assert [line.split()[2] for line in checks[:3]] == ["10%", "2e+02%", "inf%"]
    assert "  y: error 0.002, allowed 0.001 (a note)" in text
    assert "  z: error nan, allowed 0.001" in text
    assert "x: error" not in text
    assert "RuntimeError: an illegal memory access was encountered" in text
    assert "in raising" in text
    assert "torch finds one GPU" in text
    row = next(line.split() for line in text.splitlines() if line.startswith("B=1"))
    assert row == ["B=1", "2", "2.50", "failed"]
    assert text.splitlines()[-1].startswith("FAILED: 2 ok, 3 failed, 1 skipped, 0 not run in ")


def assert_record_has_it_all(record: dict[str, Any], text: str) -> None:
    assert [task["status"] for task in record["tasks"]] == [
        *("ok", "FAILED", "FAILED", "FAILED", "skipped", "ok")
    ]
    assert record["tasks"][1]["comparisons"][1] == {
        "name": "y",
        "error": 2e-3,
        "allowed": 1e-3,
        "note": "a note",
        "passed": False,
    }
    assert record["tasks"][2]["comparisons"][1]["error"] == "nan"
    assert "illegal memory access" in record["tasks"][3]["error"]
    assert record["tasks"][5]["timings"][0]["milliseconds"]["definition"] == 5.0
    assert record["facts"]["torch"] == report.facts(CPU)["torch"]
    assert record["verdict"] == text.splitlines()[-1]
    assert (record["finished"], record["passed"]) == (True, False)


def test_record_is_whole_after_every_task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A run that is cut short leaves what it found, in a file that can be read at any time."""
    file = tmp_path / "report.json"
    seen = []

    def looking(device: torch.device) -> list[Comparison]:
        seen.append(json.loads(file.read_text(), parse_constant=pytest.fail))
        return []

    tasks = [Task("infinite", lambda _: [Comparison("x", float("inf"), 0)], SMOKE)]
    tasks += [Task(f"look {i}", looking, SPEED) for i in range(2)]
    monkeypatch.setattr(runner, "all_tasks", lambda *_: tasks)
    selftest(CPU, json=file)
    assert [len(record["tasks"]) for record in seen] == [1, 2]
    assert not seen[1]["finished"]
    assert seen[1]["tasks"][0]["comparisons"][0]["error"] == "inf"
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_times_come_before_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [Task("measured", measuring, SPEED), Task("last", failing, CHECKS)]
    monkeypatch.setattr(runner, "all_tasks", lambda *_: tasks)
    lines = selftest(CPU).text.splitlines()
    row = next(i for i, line in enumerate(lines) if line.startswith("B=1"))
    assert row < next(i for i, line in enumerate(lines) if "last" in line)


def test_what_is_ok_does_not_look_like_an_error() -> None:
    """Similarities of 1e7 may be off by 11 where 14 is allowed: the table has the share of it."""
    [row] = [report.line(Outcome("extreme", [Comparison("output", 11.2, 14.5)]))]
    assert row.split() == ["ok", "extreme", "77%", "0.0", "output", "(of", "1)"]


def test_report_has_what_a_bug_report_needs() -> None:
    facts = report.facts(CPU)
    for name in ("setformer_ext", "Python", "torch", "CUDA driver", "compiler", "this run on"):
        assert facts[name]


def test_a_report_without_facts_is_better_than_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise OSError("no /proc here")

    monkeypatch.setattr(report.info, "collect", broken)
    assert report.facts(CPU)["setformer info"] == "OSError: no /proc here"


@pytest.mark.slow
def test_in_a_process_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """From a folder that holds another, unbuilt setformer_ext, as a checkout does."""
    (tmp_path / "setformer_ext").mkdir()
    (tmp_path / "setformer_ext" / "__init__.py").write_text("raise ImportError('not built')")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["selftest", "--device=cpu", "--only=smoke"]) == 0
    lines = capsys.readouterr().out.splitlines()
    count = len(runner.all_tasks(CPU, True, [SMOKE]))
    assert sum(line.startswith("ok ") for line in lines) == count
    assert lines[-1].startswith(f"PASSED: {count} ok, 0 failed, 0 skipped")


def test_outcomes_survive_the_crossing() -> None:
    comparison = Comparison("x", float("inf"), 1.5, "note")
    timing = Timing("B=1", {"setformer_ext": 1.0})
    outcome = Outcome("name", [comparison], [timing], "", "error", 0.5, SPEED, "", "a note", True)
    assert pickle.loads(pickle.dumps(outcome)) == outcome


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device=tpu"], "--device must be cpu, cuda or cuda:N, got tpu"),
        (["--suite=missing"], "--suite must be a folder of tests, got missing"),
        (["--output=no/such/folder.txt"], "no/such/folder.txt"),
        (["--output=report.json"], "--output must be the text's name, .* try report.txt"),
        (["--only=suite"], "--only suite needs the folder of the tests: --suite FOLDER"),
        (["--suite-seconds=0"], "--suite-seconds must be above 0, got 0.0"),
    ],
)
def test_bad_options(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["selftest", *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("setformer selftest: ")
    assert re.search(message, error)


class PretendedGraph:
    """Replays nothing."""

    def replay(self) -> None:
        pass


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the checks for GPUs use of torch.cuda, doing nothing: the tensors are the CPU's."""

    class Idle:
        def __init__(self, *_: object) -> None:
            pass

        def synchronize(self) -> None:
            pass

        def record(self) -> None:
            pass

        def query(self) -> bool:
            return True

    def nothing(*_: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    for name in ("device", "stream", "graph", "synchronize", "_sleep", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, nothing)
    for name in ("Stream", "Event"):
        monkeypatch.setattr(torch.cuda, name, Idle)
    for name, value in {
        "device_count": 1,
        "current_device": 0,
        "memory_allocated": 0,
        "max_memory_allocated": 1000,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", PretendedGraph)


def test_gpu_checks_without_the_caching_of_memory(
    pretended_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As docs/cuda.md runs them under compute-sanitizer."""
    monkeypatch.setenv(cuda_checks.NO_CACHING, "1")
    monkeypatch.setattr(cuda_checks, "MANY", cuda_checks.FEW)
    outcomes = {task.name: execute(task, CPU) for task in cuda_checks.tasks()}
    reason = "needs torch's caching of memory: PYTORCH_NO_CUDA_MEMORY_CACHING is set"
    assert {name for name, outcome in outcomes.items() if outcome.skipped == reason} == {
        "calls return before their work is done",
        "a CUDA graph",
        "packed sequences in a CUDA graph",
        "no memory of the size N x M",
    }
    assert outcomes["two streams at once"].status == "ok"


def test_gpu_checks_run_through(pretended_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a pretended GPU, which catches slips in the checks themselves."""
    monkeypatch.delenv(cuda_checks.NO_CACHING, raising=False)
    monkeypatch.setattr(cuda_checks, "MANY", cuda_checks.FEW | {"N": 50})
    outcomes = {task.name: execute(task, CPU) for task in cuda_checks.tasks()}
    errors = {name: outcome.error for name, outcome in outcomes.items() if outcome.error}
    # values of CPU tensors are looked at
    assert "epsilon must be > 0" in errors.pop("an epsilon that is not positive")
    assert not errors
    assert outcomes["the second GPU while the first is current"].skipped == "torch finds one GPU"
    assert {name for name, outcome in outcomes.items() if outcome.failures} == {
        "calls return before their work is done",  # the pretended stream is always idle
        "a CUDA graph",  # the pretended graph replays nothing
        "packed sequences in a CUDA graph",
    }


def test_gradients_come_from_every_input(pretended_gpu: None) -> None:
    arguments, grad_output = cuda_checks._problem(CPU, cuda_checks.FEW)
    results = run(set_attention, arguments, grad_output)
    assert set(results) == {
        *("output", "key", "value", "reference", "token_mass", "reference_mass")
    }
