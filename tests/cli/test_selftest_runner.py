"""The processes that `selftest` runs its tasks in, which crash, hang and lose the GPU."""

import json
import math
import os
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import BACKENDS
from emulator import command
from setformer_ext.cli import selftest as package
from setformer_ext.cli.selftest import processes, report, runner, tasks, worker
from setformer_ext.cli.selftest.outcome import (
    CHECKS,
    SMOKE,
    Kernels,
    Outcome,
    Task,
    execute,
    works,
)
from setformer_ext.cli.selftest.tolerance import Comparison

CPU = torch.device("cpu")

# ---- every kernel fails, in the emulator ---------------------------------------------------------


def run_emulated(tmp_path: Path, fault: str, *options: str) -> dict[str, Any]:
    """The record of `setformer selftest` with kernels that fail, which hang for 2 s only."""
    library = str(BACKENDS["cuda-emulated"]().module.__file__)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "emulator.command", "selftest", "--device=cpu", "--quick"),
            *("--output", str(tmp_path / "report.txt"), *options),
        ],
        cwd=Path(command.__file__).parents[1],
        env=os.environ
        | {"EMULATOR_FAULT": fault, "EMULATOR_LIBRARY": library, "EMULATOR_PATIENCE": "2"}
        | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout == (tmp_path / "report.txt").read_text()
    return json.loads((tmp_path / "report.json").read_text())


@pytest.mark.slow
def test_a_kernel_that_always_hangs(tmp_path: Path) -> None:
    first, *rest = run_emulated(tmp_path, "hang")["tasks"]
    assert first["name"] == "smoke: resident, float32, forward"
    assert first["lost"]
    assert first["error"].startswith("hung: no result within ")
    assert 'functional.py", line' in first["error"]  # where it hangs
    assert len(rest) == len(tasks.all_tasks(CPU, quick=True)) - 1
    assert {task["not_run"].partition(" in ")[0] for task in rest} == {"nothing passed"}


def test_a_kernel_that_always_faults(tmp_path: Path) -> None:
    record = run_emulated(tmp_path, "fault", "--in-process")
    for task in record["tasks"]:
        if task["section"] == SMOKE and task["name"].endswith("forward"):
            assert "_kernel failed on cuda:0: cudaErrorIllegalAddress" in task["error"]
        elif task["name"] == "wrong arguments are refused":
            assert task["status"] == "ok"  # without a kernel
        else:
            assert "forward failed" in task["not_run"]


# ---- what the outcomes of the smoke checks tell of the other tasks -------------------------------


def pretend(raises: Callable[[Kernels], bool]) -> dict[str, Outcome]:
    """The outcomes where these smoke checks raise and everything that is run besides passes."""

    def do(task: Task, backward: bool, most: float) -> Outcome:
        failed = task.smoke is not None and raises(task.smoke)
        return Outcome(task.name, error="raised" if failed else "")

    all_tasks = tasks.all_tasks(torch.device("cuda", 0), quick=False)
    return {outcome.name: outcome for outcome in runner.run_tasks(all_tasks, do)}


def test_only_backward_fails() -> None:
    outcomes = pretend(lambda x: x.direction == "backward")
    broken = "all smoke checks of float32, backward failed"
    assert outcomes["odd sizes, float32"].status == "ok"
    assert outcomes["odd sizes, float32"].note == f"forward only: {broken}"
    assert outcomes["time of v1, float32, forward"].status == "ok"
    assert outcomes["time of v1, float32, forward"].note == ""
    assert outcomes["time of v1, float32, forward + backward"].not_run == broken
    assert outcomes["an epsilon that is not positive"].status == "ok"
    assert outcomes["a CUDA graph"].not_run == broken


def test_only_one_type_fails() -> None:
    outcomes = pretend(lambda x: x.dtype == torch.bfloat16)
    assert outcomes["smoke: resident, bfloat16, backward"].not_run == "its forward failed"
    assert outcomes["smoke: resident, float16, backward"].status == "ok"
    not_run = {name for name, outcome in outcomes.items() if outcome.not_run}
    assert "the module" in not_run  # under autocast to it
    assert all("bfloat16" in name for name in not_run - {"the module"})
    assert (
        sum("bfloat16" in name for name in outcomes) == len(not_run - {"the module"}) + 4
    )  # forward of each family


def test_only_one_family_fails() -> None:
    """Which others use it nobody knows before they run; float64 has no other."""
    outcomes = pretend(lambda x: x.family == "streaming")
    not_run = {name for name, outcome in outcomes.items() if outcome.not_run}
    assert {name for name in not_run if not name.startswith("smoke: ")} == {
        name for name in outcomes if "float64" in name and not name.startswith("smoke: ")
    } | {"finite differences"}


def test_wrong_numbers_stop_nothing() -> None:
    def do(task: Task, backward: bool, most: float) -> Outcome:
        return Outcome(task.name, [Comparison("x", 2, 1)])

    outcomes = runner.run_tasks(tasks.all_tasks(CPU, quick=True), do)
    assert {outcome.status for outcome in outcomes} == {"FAILED"}


def test_gives_up_when_much_time_was_lost() -> None:
    all_tasks = [Task(f"task {i}", lambda _: []) for i in range(9)]

    def do(task: Task, backward: bool, most: float) -> Outcome:
        lost = task.name != "task 0"
        error = "hung" if lost else ""
        return Outcome(task.name, error=error, lost=lost, seconds=runner.MOST_LOST_SECONDS / 2.5)

    outcomes = list(runner.run_tasks(all_tasks, do))
    assert [outcome.status for outcome in outcomes] == [
        *("ok", "FAILED", "FAILED", "FAILED"),
        *("not run",) * 5,
    ]
    assert outcomes[-1].not_run == "3 processes and 216 s were lost"


def test_a_process_that_has_lost_the_gpu_does_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(device: torch.device) -> list[Comparison]:
        raise RuntimeError("an illegal memory access was encountered")

    all_tasks = [Task("first", raising), Task("second", lambda _: [])]
    monkeypatch.setattr(runner, "all_tasks", lambda *_: all_tasks)
    assert [x.status for x in runner.run_here(CPU, True)] == ["FAILED", "ok"]
    monkeypatch.setattr("setformer_ext.cli.selftest.outcome.works", lambda device: False)
    assert [x.status for x in runner.run_here(CPU, True)] == ["FAILED", "not run"]


# ---- processes -----------------------------------------------------------------------------------

# Answers as a worker does, except that it dies or hangs over some tasks.
WORKER = """
import faulthandler, os, signal, time
faulthandler.register(signal.SIGUSR1)
kinds = {kinds!r}
if "import" in kinds.values():
    raise ImportError("libcudart.so.99")
channel.send("ready")
channel.recv()
if "no device" in kinds.values():
    time.sleep(20)
channel.send("on the device")
while True:
    name, backward = channel.recv()
    kind = kinds[name]
    if kind == "crash":
        print("a kernel's assertion", file=sys.stderr, flush=True)
        os.abort()
    if kind == "hang":
        time.sleep(20)
        os._exit(1)
    if kind == "leave":
        sys.exit(0)
    channel.send_bytes({outcomes!r}[name])  # pickled, so that it need not import torch
"""


def run_pretended(kinds: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[list[Outcome], int]:
    """The outcomes of tasks of these kinds, and how many processes began to do some."""
    names = [f"task {i}" for i in range(len(kinds))]
    by_name = dict(zip(names, kinds, strict=True))
    outcomes = {
        name: Outcome(
            name, error="raised" if kind in ("error", "lost") else "", lost=kind == "lost"
        )
        for name, kind in by_name.items()
    }
    code = WORKER.format(
        kinds=by_name, outcomes={name: pickle.dumps(x) for name, x in outcomes.items()}
    )
    begun = []
    take_device = worker.Worker.take_device

    def counted(self: worker.Worker, blocking: bool, most: float) -> None:
        begun.append(self)
        take_device(self, blocking, most)

    named = [Task(name, lambda _: []) for name in names]
    monkeypatch.setattr(runner, "all_tasks", lambda *_: named)
    monkeypatch.setattr(runner, "deadline", lambda *_: 2)
    monkeypatch.setattr(worker, "code", lambda *_: code)
    monkeypatch.setattr(worker.Worker, "take_device", counted)
    monkeypatch.setattr(worker, "SECONDS_TO_GET_DEVICE", 2)
    found = list(runner.run_apart(CPU, True))
    assert [outcome.name for outcome in found] == names
    return found, len(begun)


def test_a_crash_costs_one_check(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes, begun = run_pretended(["ok", "crash", "ok", "crash", "ok"], monkeypatch)
    assert [outcome.status for outcome in outcomes] == ["ok", "FAILED", "ok", "FAILED", "ok"]
    assert outcomes[1].error == "the process ended with status -6; it wrote:\na kernel's assertion"
    assert begun == 3


def test_a_hang_costs_one_check(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes, begun = run_pretended(["ok", "hang", "ok"], monkeypatch)
    assert [outcome.status for outcome in outcomes] == ["ok", "FAILED", "ok"]
    assert outcomes[1].error.startswith("hung: no result within 2 s; it wrote:\n")
    assert "most recent call first" in outcomes[1].error
    assert begun == 2


def test_a_process_that_cannot_be_killed_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that waits for the GPU in the kernel of the operating system goes when that lets it."""
    kept: list[subprocess.Popen] = []
    kill = subprocess.Popen.kill

    def kill_all_but_the_first(self: subprocess.Popen) -> None:
        kept.append(self)
        if self is not kept[0]:
            kill(self)

    monkeypatch.setattr(subprocess.Popen, "kill", kill_all_but_the_first)
    monkeypatch.setattr(processes, "SECONDS_TO_DIE", 0.1)
    monkeypatch.setattr(processes, "SECONDS_TO_TELL", 0.1)
    start = time.monotonic()
    outcomes, _ = run_pretended(["hang", "ok"], monkeypatch)
    seconds = time.monotonic() - start
    alive = [process.poll() is None for process in kept]
    monkeypatch.undo()
    for process in kept:
        process.kill()
        process.wait(10)
    assert [outcome.status for outcome in outcomes] == ["FAILED", "ok"]
    assert alive[0]
    assert seconds < 10


def test_a_lost_gpu_costs_one_check(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes, begun = run_pretended(["lost", "error", "ok", "lost", "lost", "ok"], monkeypatch)
    assert [outcome.status for outcome in outcomes].count("FAILED") == 4
    assert {outcome.error for outcome in outcomes} == {"", "raised"}
    assert begun == 4


def test_a_process_that_leaves_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes, begun = run_pretended(["leave", "ok"], monkeypatch)
    assert outcomes[0].error == "the process ended with status 0"
    assert begun == 2


@pytest.mark.parametrize(
    ("kind", "error"), [("import", "libcudart.so.99"), ("no device", "no result within 2 s")]
)
def test_gives_up_without_a_process(kind: str, error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes, begun = run_pretended([kind, "ok", "ok"], monkeypatch)
    assert outcomes[0].error.startswith("no process could take cpu: ")
    assert error in outcomes[0].error
    assert {outcome.not_run for outcome in outcomes[1:]} == {"no process could take cpu"}
    assert begun == 1


def test_a_worker_ends_with_the_process_that_asks_it() -> None:
    """Even if that was killed while a task never ends: nobody else ends it."""
    process = processes.Process(worker.code(CPU, True))
    process.channel.close()
    assert process.process.wait(60) == 0
    process.close()


def test_output_has_a_bound() -> None:
    python = [sys.executable, "-c"]
    code = "import sys; print('out'); print('err', file=sys.stderr)"
    assert processes.output([*python, code], 60).split() == ["out", "err"]
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.5 s"):
        processes.output([*python, "import time; time.sleep(20)"], 0.5)
    assert time.monotonic() - start < 10


def test_nvidia_smi_has_a_bound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexec sleep 20\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(report, "SECONDS_OF_NVIDIA_SMI", 0.5)
    assert report._driver() == "no answer within 0.5 s"


def test_a_lost_device_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(*_: object, **__: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    assert works(CPU)
    monkeypatch.setattr(torch, "ones", raising)
    assert not works(CPU)
    assert execute(Task("x", raising), CPU).lost
    assert not execute(Task("x", lambda _: []), CPU).lost


# ---- deadlines -----------------------------------------------------------------------------------


def test_the_report_is_there_within_a_minute_where_every_kernel_hangs() -> None:
    """Whatever else goes wrong, on a machine that imports torch as fast as most."""
    nvidia_smi = report.SECONDS_OF_NVIDIA_SMI + 2 * processes.SECONDS_TO_DIE  # to end, to die
    first_process = worker.USUAL_SECONDS_TO_IMPORT + worker.SECONDS_TO_GET_DEVICE
    first_loss = (
        worker.MOST_SLOWNESS * tasks.SECONDS[SMOKE]
        + processes.SECONDS_TO_TELL
        + processes.SECONDS_TO_DIE
    )
    last_loss = runner.MOST_SECONDS_WITHOUT_SUCCESS + runner.SECONDS_OF_LAST_CHANCE
    told = max(processes.SECONDS_TO_TELL, processes.SECONDS_TO_END)  # its stack, or its status
    closed = 2 * processes.SECONDS_TO_DIE  # it and the next one
    assert first_loss < last_loss
    assert nvidia_smi + first_process + last_loss + told + closed < 60


def test_after_a_loss_without_success_little_time_is_left() -> None:
    """And all of it once something has passed."""
    experience = runner.Experience()
    task = Task("x", lambda _: [])
    assert experience.seconds_left() == math.inf
    experience.learn(task, Outcome("x", error="hung", lost=True, seconds=8))
    total = runner.MOST_SECONDS_WITHOUT_SUCCESS + runner.SECONDS_OF_LAST_CHANCE
    assert total - 9 < experience.seconds_left() < total - 7
    experience.learn(task, Outcome("x"))
    assert experience.seconds_left() == math.inf


@pytest.mark.parametrize(("usual", "waited"), [(2, "[01]"), (1, "2")])
def test_the_last_chance_is_short_except_for_a_compiler(
    usual: float, waited: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deadline of 2 s, longer than usual where kernels are compiled, and 1.5 s left."""
    monkeypatch.setattr(runner.Experience, "seconds_left", lambda self: 1.5)
    monkeypatch.setattr(runner, "SECONDS", {CHECKS: usual})
    outcomes, _ = run_pretended(["hang"], monkeypatch)
    assert re.match(f"hung: no result within {waited} s", outcomes[0].error)


def test_a_kernel_that_must_be_compiled_may_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    for architectures, seconds in (("90-real", tasks.SECONDS[SMOKE]), ("80", 600)):
        monkeypatch.setattr(tasks, "build_info", lambda a=architectures: {"cuda_architectures": a})
        assert tasks.deadline(SMOKE, torch.device("cuda", 0)) == seconds


@pytest.mark.parametrize(
    ("architectures", "capability", "there"),
    [
        ("80-real;90", (8, 0), True),
        ("80-real;90", (8, 9), True),
        ("86", (8, 0), False),
        ("80-virtual", (8, 0), False),
        ("80-real;90", (10, 0), False),
        ("90a-real", (9, 0), True),
        ("100a", (10, 3), False),
        ("100f", (10, 3), True),
        ("120-real", (12, 0), True),
        ("", (8, 0), False),
    ],
)
def test_code_for_a_capability(
    architectures: str, capability: tuple[int, int], there: bool
) -> None:
    assert tasks.has_code(architectures, capability) == there


def test_the_package_waits_for_no_process_without_a_bound() -> None:
    """subprocess.run waits without one even for what it has killed after a timeout."""
    for path in Path(package.__file__).parents[2].rglob("*.py"):
        if path.name != "processes.py":
            text = path.read_text(encoding="utf-8")
            for word in ("subprocess", "multiprocessing", "os.system", "os.popen"):
                assert word not in text, f"{path} runs processes of its own: see processes.py"
