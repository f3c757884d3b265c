"""The steps of benchmarks/cuda/measure.sh, as far as they go without a card."""

import argparse
import contextlib
import json
import math
import re
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "cuda"))

import model
import sass
from layout import Problem
from measure import build, ceilings, device, limits, machine, plan, profiles, results
from measure import selftest as measured_selftest

from conftest import cuda_emulated
from emulator.build import find_nvcc
from measuring import CUDA, ENVIRONMENT, ended, record_of
from setformer_ext import cli
from setformer_ext.cli import profile, selftest
from setformer_ext.cli.timing import SHAPES


def report_of(folder: Path, *told: dict[str, Any]) -> None:
    """As earlier steps would have left it."""
    steps = [{"name": "earlier", "status": "ok", "results": list(told)}]
    (folder / "report.json").write_text(json.dumps({"steps": steps}), encoding="utf-8")


def fact(name: str, value: Any) -> dict[str, Any]:
    return {"kind": "fact", "name": name, "value": value}


def no_card() -> None:
    raise RuntimeError("why")


def test_the_build_is_for_the_card_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDAARCHS", raising=False)
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setattr(build, "find_nvcc", lambda: Path("/found/nvcc"))
    monkeypatch.setattr(build.torch.cuda, "get_device_capability", no_card)
    with pytest.raises(SystemExit, match="set CUDAARCHS"):
        build.environment()
    monkeypatch.setattr(build.torch.cuda, "get_device_capability", lambda: (12, 0))
    assert build.environment()["CUDAARCHS"] == "120-real"
    assert build.environment()["CUDACXX"] == "/found/nvcc"
    report_of(tmp_path, fact("capability", "9.0"))
    found = build.environment()
    assert found["CUDAARCHS"] == "90-real"
    assert found["SETFORMER_CUDA"] == "on"
    assert int(found["CMAKE_BUILD_PARALLEL_LEVEL"]) >= 1
    monkeypatch.setenv("CUDAARCHS", "89-real")
    monkeypatch.setenv("CUDACXX", "/my/nvcc")
    assert build.environment()["CUDAARCHS"] == "89-real"
    assert "CUDACXX" not in build.environment()


def test_what_the_build_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    project = (build.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    required = re.findall(r'^    "([\w-]+)>=(\d+)"', project, re.MULTILINE)
    assert dict(required) == {name: str(least) for name, least in build.REQUIRED.items()}
    versions = {"setuptools": "68.1.2", "scikit-build-core": "1.0"}

    def version(name: str) -> str:
        if name not in versions:
            raise build.metadata.PackageNotFoundError
        return versions[name]

    monkeypatch.setattr(build.metadata, "version", version)
    assert build.missing() == "setuptools >= 77, found 68.1.2; pybind11 >= 3, found none"
    versions |= {"setuptools": "77", "pybind11": "3.0.0rc1"}
    assert build.missing() == ""


def test_what_the_driver_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.ask_driver("name,compute_cap", "0") == {"nvidia-smi": "not found"}
    tool(tmp_path, "nvidia-smi", "echo 'NVIDIA H200, 9.0'\n")
    found = machine.ask_driver("name,compute_cap", "0")
    assert found == {"name": "NVIDIA H200", "compute_cap": "9.0"}
    tool(tmp_path, "nvidia-smi", "echo 'no devices'; exit 6\n")
    assert machine.ask_driver("name", "0") == {"nvidia-smi": "no devices"}
    monkeypatch.setattr(machine, "SECONDS", 0.5)
    tool(tmp_path, "nvidia-smi", "while true; do :; done\n")
    assert machine.ask_driver("name", "0") == {"nvidia-smi": "no answer within 0.5 s"}


def test_the_driver_is_asked_of_torchs_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(sys, "argv", ["machine"])
    tool(tmp_path, "nvidia-smi", 'echo "$1"\n')

    def asked() -> str:
        found = map(results.read, capsys.readouterr().out.splitlines())
        return next(x["value"] for x in found if x is not None and x["name"] == "name")

    monkeypatch.setattr(machine, "ask_torch", lambda device: "GPU-1234")
    machine.main()
    assert asked() == "--id=GPU-1234"

    def fail(device: str) -> None:
        raise RuntimeError("no driver")

    monkeypatch.setattr(machine, "ask_torch", fail)
    with pytest.raises(RuntimeError):
        machine.main()
    assert asked() == "--id=0"


def test_the_commit_of_a_checkout_of_somebody_else() -> None:
    if not (machine.ROOT / ".git").exists():
        pytest.skip("needs a checkout")
    assert re.fullmatch("[0-9a-f]{40}(-dirty)?", machine.commit())


class FakeCuda:
    """torch.cuda as far as Card uses it, with a clock that calls and replays move."""

    def __init__(self) -> None:
        self.us = 0.0
        self.captured: list[float] | None = None
        self.most_in_graph = 0
        self.synchronize = self.current_stream = self.Stream = lambda: self
        self.stream = self.device = lambda which: contextlib.nullcontext()
        self.wait_stream = lambda stream: None
        self.CUDAGraph, self.Event = types.SimpleNamespace, self.make_event

    def call(self) -> None:
        """Takes 70 microseconds on the device, and 200 until it is launched."""
        if self.captured is not None:
            self.captured.append(70.0)
        else:
            self.us += 200.0

    def current_device(self) -> int:
        return 0

    @contextlib.contextmanager
    def graph(self, graph: types.SimpleNamespace) -> Iterator[None]:
        self.captured = []
        yield
        times, self.captured = self.captured, None
        self.most_in_graph = max(self.most_in_graph, len(times))

        def replay() -> None:
            self.us += sum(times)

        graph.replay = replay

    def make_event(self, enable_timing: bool) -> Any:
        event = types.SimpleNamespace(at=0.0, synchronize=lambda: None)

        def record() -> None:
            event.at = self.us

        event.record = record
        event.elapsed_time = lambda end: (end.at - event.at) / 1e3
        return event


def test_the_card_is_timed_by_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    monkeypatch.setattr(device.torch, "cuda", cuda)
    card = device.Card()
    times = card.microseconds(cuda.call)
    assert times == [pytest.approx(70)] * device.MOST_REPLAYS
    assert cuda.most_in_graph == 5  # 1000 us of calls that take 200
    assert card.host_microseconds(cuda.call) > 0


def test_the_limit_is_that_of_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shape = SHAPES["v3"]
    assert limits.limit(shape, "float16", 5, False, limits.measured_device()) is None
    report_of(tmp_path, {"kind": "ceiling", "name": "copy", "rate": 1e12})
    assert (
        limits.limit(shape, "float16", 5, False, limits.measured_device()) is None
    )  # of how many?

    def told(**rates: float) -> tuple[float, str] | None:
        ceilings = [{"kind": "ceiling", "name": n, "rate": rate} for n, rate in rates.items()]
        report_of(tmp_path, fact("multiprocessors", 100), *ceilings)
        return limits.limit(shape, "float16", 5, False, limits.measured_device())

    # A head is one block of at most 96 > 100 - 4: 96 of 100 multiprocessors work. Keys, values and
    # outputs are B H N D halves each; the rows and columns of every step, and A, are float32.
    bytes_moved = 96 * (3 * 196 * 32 * 2 + 4 * (6 * (196 + 49) + 49 * 32))
    memory = told(copy=1e12)
    assert memory is not None
    assert memory == (pytest.approx(bytes_moved / (0.96 * 1e12) * 1e6), "memory")
    special = told(copy=1e12, ex2=1e9)
    assert special is not None
    assert special[1] == "special"
    twice = told(copy=1e12, ex2=2e9)
    assert twice is not None
    assert twice == (pytest.approx(special[0] / 2), "special")
    clock = {"kind": "ceiling", "name": "fma", "rate": 1e13, "MHz": 1000}
    report_of(tmp_path, fact("multiprocessors", 100), clock)
    issued = limits.limit(shape, "float16", 5, False, limits.measured_device())
    (launch,) = model.forward(Problem(8, 12, 196, 32, 49), limits.measured_device())
    instructions = launch.work.issue / 32 / 96  # a warp of each of the four schedulers a clock
    assert issued == (pytest.approx(instructions / 4 / 1e9 * 1e6), "issue")
    one, three, five = (
        limits.limit(SHAPES["v1"], "bfloat16", steps, False, limits.measured_device())
        for steps in (1, 3, 5)
    )
    assert one is not None
    assert three is not None
    assert five is not None
    # Launches of a step each; the table counts whole instructions, of some 350,000 a step.
    assert five[0] - three[0] == pytest.approx(three[0] - one[0], rel=2 / 350_000)
    assert three[0] > one[0]
    # what is not counted: types, sizes, and devices where other heads are resident
    device = limits.measured_device()
    assert limits.limit(shape, "float32", 5, False, device) is None
    assert limits.limit(replace(shape, tokens=200), "bfloat16", 5, False, device) is None
    report_of(tmp_path, fact("shared memory of a block", 101376), clock)
    assert limits.limit(shape, "bfloat16", 5, False, device) is None


# What the longest loop of each kernel of ceilings.cu is made of, and what must not be in it.
LOOPS = {
    "3Ex2E": ("MUFU.EX2", 256, "MUFU.(?!EX2)"),
    "4MovmE": ("MOVM", 256, "MUFU|FFMA"),
    "3FmaE": ("FFMA", 256, "MUFU|FMUL"),
    "3MmaE": ("HMMA.16816.F32.BF16", 256, "MUFU|FFMA|LDL|STL"),
    "read_shared": ("LDS.128", 32, "LDG|LDL"),
    "read_cache": ("LDG.E.128.STRONG", 8, "LDL"),
    "ILi8EL8Exchange2E": ("STAS", 1, "MEMBAR|UCGABAR|CCTL"),  # st.async
    "ILi8EL8Exchange1E": ("UCGABAR_ARV", 1, "STAS"),  # the cluster's barrier
    "ILi1EL8Exchange0E": ("BAR.SYNC", 1, "MEMBAR|UCGABAR"),
}


def test_the_ceilings_have_the_names_that_are_asked_for() -> None:
    source = (CUDA / "measure" / "ceilings.cu").read_text(encoding="utf-8")
    names = re.findall(r'^    \{"([^"]+)", ', source, re.MULTILINE)
    assert sorted(names) == sorted(ceilings.RATES + ceilings.STEPS)
    assert {"mma", "ex2", "shared", "cache"} == set(limits.CEILINGS.values()) - {"copy"}


def test_the_loops_of_the_ceilings_are_what_they_say(tmp_path: Path) -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc")
    cubin = tmp_path / "ceilings.cubin"
    flags = ["-std=c++17", "-O3", "-arch=sm_90", "-cubin", "-o"]
    subprocess.run([nvcc, *flags, cubin, CUDA / "measure" / "ceilings.cu"], check=True)
    functions: dict[str, list[tuple[int, str]]] = {}
    for line in sass._cuobjdump(cubin, "-sass"):
        if match := re.match(r"\s*Function : (\S+)", line):
            code = functions.setdefault(match[1], [])
        elif match := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@\S+ )?([A-Z].*?) *;", line):
            code.append((int(match[1], 16), match[2]))
    for name, (wanted, least, unwanted) in LOOPS.items():
        (code,) = (code for function, code in functions.items() if name in function)
        loops = [
            [text for at, text in code if int(match[1], 16) <= at <= end]
            for end, branch in code
            if (match := re.match(r"BRA.* 0x([0-9a-f]+)$", branch)) and int(match[1], 16) < end
        ]
        loop = max(loops, key=len)
        count = sum(text.startswith(wanted) for text in loop)
        assert count >= least, name
        assert count % least == 0, name
        assert not [text for text in loop if re.match(unwanted, text)], name


SIZES = asdict(SHAPES["v1"])
KERNELS = [
    {"kind": "kernel", "kernel": f"k{i}_kernel<float>", "shape": shape, "us": us, "sizes": SIZES}
    for i, shape, us in [
        (0, "v1", 1), (0, "v2", 9), (1, "v1", 3), (2, "v1", 4), (3, "v1", 5), (4, "v1", 6),
        (5, "v1", 7), (6, "v1", 2),
    ]
]  # fmt: skip
RAW = """==PROF== Connected
"ID","Kernel Name","gpu__time_duration.sum","launch__grid_size","sm__throughput.avg.pct_of_peak_sustained_elapsed"
"","","ns","",""
"0","k","12,345","1,024","71.5"
"""  # noqa: E501


def test_the_largest_kernels_where_they_take_longest() -> None:
    found = [(k["kernel"][:2], k["shape"]) for k in profiles.largest(KERNELS)]
    assert found == [("k0", "v2"), ("k5", "v1"), ("k4", "v1"), ("k3", "v1"), ("k2", "v1")]
    read = profiles.metrics(RAW)
    assert (read["us"], read["blocks"], read["SM %"]) == (12.345, 1024.0, 71.5)
    assert read["registers"] == ""
    assert "note" in profiles.metrics("No kernels were profiled.")


def tool(folder: Path, name: str, script: str) -> None:
    """A program of that name, the first on PATH."""
    path = folder / name
    path.write_text("#!/bin/sh\n" + script, encoding="utf-8")
    path.chmod(0o755)


def run_tool_step(folder: Path, name: str, *arguments: str) -> dict[str, Any]:
    """A step that runs a program, with the programs of `folder` alone."""
    report_of(folder, *KERNELS)
    environment = ENVIRONMENT | {"PATH": f"{folder}:/usr/bin:/bin"}
    command = [sys.executable, "-m", f"measure.{name}", "--device", "cuda", *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, encoding="utf-8"
    )
    told = [result for line in done.stdout.splitlines() if (result := results.read(line))]
    rows = [result for result in told if result["kind"] != "begin"]
    return {"status": done.returncode, "rows": rows, "output": done.stdout + done.stderr}


def test_profiles_by_a_tool_that_works_one_without_permission_and_none(tmp_path: Path) -> None:
    missing = run_tool_step(tmp_path, "profiles")
    assert missing["rows"][0]["kind"] == "skipped"
    (tmp_path / "raw.csv").write_text(RAW, encoding="utf-8")
    tool(
        tmp_path, "ncu",
        'echo "$@" >> arguments\nif [ "$1" = --import ]; then cat raw.csv; exit; fi\n'
        'while [ "$1" != --export ]; do shift; done; touch "$2.ncu-rep"\n',
    )  # fmt: skip
    rows = run_tool_step(tmp_path, "profiles")["rows"]
    assert [row["kernel"] for row in rows] == [k["kernel"] for k in profiles.largest(KERNELS)]
    assert all(row["us"] == 12.345 for row in rows)
    first = (tmp_path / "arguments").read_text(encoding="utf-8").splitlines()[0].split()
    assert first[first.index("--clock-control") + 1] == "none"
    assert first[first.index("--kernel-name") + 1] == "regex:^k0_kernel$"
    parser = argparse.ArgumentParser()  # that `setformer profile` takes what it is given
    profile.add_arguments(parser)
    options = parser.parse_args(first[first.index("profile") + 1 :])
    assert profile.chosen_shape(options) == SHAPES["v1"]
    tool(tmp_path, "ncu", "echo '==ERROR== ERR_NVGPUCTRPERM - no permission'\n")
    rows = run_tool_step(tmp_path, "profiles")["rows"]
    assert [row["kind"] for row in rows] == ["skipped"]  # once for all five
    assert "only root" in rows[0]["note"]


def test_the_sanitizer_sees_arrays_of_exact_size(tmp_path: Path) -> None:
    missing = run_tool_step(tmp_path, "sanitize", "--tool", "memcheck")
    assert missing["rows"][0]["kind"] == "skipped"
    tool(tmp_path, "compute-sanitizer", 'env; echo "$@"; exit 9\n')
    found = run_tool_step(tmp_path, "sanitize", "--tool", "memcheck")
    assert found["status"] == 9
    assert "PYTORCH_NO_CUDA_MEMORY_CACHING=1" in found["output"]
    assert "--tool memcheck" in found["output"]
    assert "--only smoke --in-process" in found["output"]


def test_the_selftest_takes_what_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    selftest.add_arguments(parser)
    given: list[list[str]] = []
    monkeypatch.setattr(cli, "main", lambda arguments: given.append(arguments))
    commands = [s.command[3:] for s in plan.steps(tmp_path, "cuda", None, 600) if s.outcomes]
    commands.append(("--device", "cuda", "--only", "smoke", "--in-process"))  # of sanitize.py
    end = time.monotonic() + 50
    for command in commands:
        words = [word.replace(plan.END, str(end)) for word in command]
        monkeypatch.setattr(sys, "argv", ["selftest", *words])
        with pytest.raises(SystemExit):
            measured_selftest.main()
    read = [parser.parse_args(arguments[1:]) for arguments in given]
    assert len(read) == 4
    (suite,) = [x for x in read if x.suite]
    assert 40 < suite.suite_seconds <= 50
    monkeypatch.setattr(measured_selftest.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["selftest", "--device", "cuda", "--suite", "tests"])
    measured_selftest.main()
    told = results.read(capsys.readouterr().out.splitlines()[-1])
    assert told == {"kind": "skipped", "note": "pytest is not installed"}


def measure(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", CUDA / "measure.sh", *arguments],
        env=ENVIRONMENT | {"PYTHON": sys.executable},
        capture_output=True,
        encoding="utf-8",
    )


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    report_of(tmp_path)
    for arguments, expected in {
        (): "OUTPUT",
        (tmp_path,): "a folder without a report",
        (tmp_path / "file",): "a folder that can be written to",
        (tmp_path / "new", "--only", "tabel"): "--only must name steps of",
        (tmp_path / "new", "--seconds", "nan"): "--seconds must be",
        (tmp_path / "new", "--package", tmp_path / "none"): "--package must be",
    }.items():
        done = measure(*arguments)
        assert done.returncode != 0
        assert expected in done.stderr, done.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_the_emulated_device_in_place_of_a_card(tmp_path: Path) -> None:
    module = cuda_emulated().module
    steps = ["ceilings", "table", "knobs", "kernels", "profiles"]
    output = tmp_path / "output"
    done = measure(
        output, "--device", "emulated", "--package", str(module.__file__), "--only", *steps
    )
    record = record_of(output)
    statuses = ended(record)
    assert statuses.pop("profiles") in ("skipped", "failed")  # where there is an ncu
    assert statuses == dict.fromkeys(["machine", *steps[:-1]], "ok"), done.stdout + done.stderr
    assert done.returncode in (3, 5)
    found = {step["name"]: step["results"] for step in record["steps"]}
    assert {"name": "card", "value": "emulated: times mean nothing"}.items() <= dict(
        next(x for x in found["machine"] if x["name"] == "card")
    ).items()
    assert {x["name"] for x in found["ceilings"]} >= {"copy", "matmul bfloat16", "ceilings.cu"}
    for row in found["table"]:
        assert row["sdpa"] in ("flash", "math")
        assert row["ratio"] == pytest.approx(row["sdpa_us"] / row["us"])
        assert row["share"] == pytest.approx(row["limit_us"] / row["us"])
        assert math.isfinite(row["host_us"])
        assert row["limit"] in limits.CEILINGS
    assert [row["design"] for row in found["knobs"]] == ["default", "SETFORMER_CUDA_RESIDENT=off"]
    kernels = {x["kernel"] for x in found["kernels"] if x["kind"] == "kernel"}
    assert "attention_backward_resident_kernel<__nv_bfloat16>" in kernels
    text = (output / "report.md").read_text(encoding="utf-8")
    assert text.count("times mean nothing") >= 1
