"""benchmarks/cuda/measure.sh: whatever becomes of a step, the run goes on and its report tells."""

import argparse
import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks" / "cuda"))

import sass
from measure import (
    ROOT,
    build,
    device,
    execute,
    limits,
    machine,
    outcomes,
    plan,
    profiles,
    report,
    results,
    run,
)
from measure.plan import Step
from measure.record import Record

from emulator.build import find_nvcc
from setformer_ext import profile, selftest
from setformer_ext.timing import SHAPES

CUDA = ROOT / "benchmarks" / "cuda"
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(CUDA), str(ROOT), os.environ.get("PYTHONPATH", "")]),
    "PYTHONUNBUFFERED": "1",
    "OMP_NUM_THREADS": "1",
}
IGNORE_TERM = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
SLEEP = "import time; time.sleep(600)\n"


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def step(name: str, code: str, seconds: float = 30, **more: Any) -> Step:
    return Step(name, python(code), 0, seconds, **more)


def run_steps(folder: Path, *steps: Step, seconds: float = 60) -> dict[str, Any]:
    """The record of a run of these steps."""
    record = Record(folder, seconds, device="cuda")
    execute.execute(list(steps), record, dict(ENVIRONMENT))
    read = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert isinstance(read, dict)
    return read


def ended(record: dict[str, Any]) -> dict[str, str]:
    return {step["name"]: step["status"] for step in record["steps"]}


def is_alive(process: int) -> bool:
    """Zombies are not."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    return text.rpartition(")")[2].split()[0] != "Z"


def wait_for(condition: Callable[[], Any], seconds: float = 20) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


@pytest.fixture
def quick_to_kill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "TO_END", 0.3)
    monkeypatch.setattr(run, "POLL", 0.02)
    monkeypatch.setattr(execute, "MARGIN", 0.3)


@pytest.mark.usefixtures("quick_to_kill")
def test_a_step_that_fails_hangs_or_prints_garbage_does_not_stop_the_next(tmp_path: Path) -> None:
    child = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', CODE])\n"
    hang = f"CODE = {IGNORE_TERM + SLEEP!r}\n{child}print('child', p.pid, flush=True)\n"
    garbage = (
        "import sys; sys.stdout.buffer.write(bytes(range(256)) * 1000 + b'\\n')\n"
        "for text in ('{', '[1]', '{}', '{\"kind\": 3}', '{\"kind\": \"row\", \"item\": \"x\"}',\n"
        "             '{\"kind\": \"begin\"}', 'NaN'): print('measure: ' + text)\n"
        'print(\'measure: \' + \'{"kind": "row", "x": "| ``` \\u2028"}\')\n'
    )
    steps = [
        step("fails", "print('the reason'); raise SystemExit(7)"),
        step("faults", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
        step("hangs", hang + IGNORE_TERM + SLEEP, seconds=2),
        step("garbage", garbage),
        Step("no such command", ("/no/such/command",), 0, 30),
        step("needs", "", needs=("fails",)),
        step("good", "from measure.results import tell; tell('row', us=1.5, bad=float('nan'))"),
    ]
    start = time.monotonic()
    record = run_steps(tmp_path, *steps)
    assert time.monotonic() - start < 15
    assert ended(record) == {
        "fails": "failed",
        "faults": "failed",
        "hangs": "timed out",
        "garbage": "ok",
        "no such command": "failed",
        "needs": "skipped",
        "good": "ok",
    }
    by_name = {step["name"]: step for step in record["steps"]}
    assert by_name["fails"]["note"] == "ended with status 7"
    assert by_name["fails"]["log_end"] == "the reason"
    assert by_name["faults"]["note"] == "ended by SIGSEGV"
    assert by_name["hangs"]["note"] == "ended after 2 s"
    assert by_name["needs"]["note"] == "needs fails, which is not ok"
    assert by_name["garbage"]["results"] == [{"kind": "row", "x": "| ``` \u2028"}]
    assert by_name["good"]["results"] == [{"kind": "row", "us": 1.5, "bad": None}]
    assert record["finished"]
    child_of_hanging = int((tmp_path / "hangs.log").read_text(encoding="utf-8").split()[1])
    wait_for(lambda: not is_alive(child_of_hanging))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| hangs | timed out |" in text
    assert "    the reason" in text
    assert "| 1.5 |  |" in text


@pytest.mark.usefixtures("quick_to_kill")
def test_what_cannot_be_killed_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_signal", lambda process, number: None)
    code = "import os; print(os.getpid(), flush=True)\n" + SLEEP
    start = time.monotonic()
    record = run_steps(tmp_path, step("stays", code, seconds=1), step("next", ""))
    assert time.monotonic() - start < 10
    os.kill(int((tmp_path / "stays.log").read_text(encoding="utf-8")), signal.SIGKILL)
    assert ended(record) == {"stays": "timed out", "next": "ok"}
    assert record["steps"][0]["note"].endswith("it could not be killed and was left behind")


@pytest.mark.usefixtures("quick_to_kill")
def test_endless_output_ends_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "MOST_LOG", 2 << 20)
    record = run_steps(tmp_path, step("talks", "while True: print('x' * 10000, end='')"))
    assert record["steps"][0]["note"] == "ended for having written 2 MiB"
    assert len(record["steps"][0]["log_end"]) <= run.LOG_END


# Items 0 to 5, of which 1 raises, 2 kills the process, 3 hangs and 4 loses the device.
ITEMS = """
import os, signal, time
from measure.items import Item, options, work
alive = True
def raises(): raise ValueError("no")
def dies(): os.kill(os.getpid(), signal.SIGKILL)
def hangs():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
def loses():
    global alive
    alive = False
    raise RuntimeError("sticky")
calls = [lambda: {"us": 1.0}, raises, dies, hangs, loses, lambda: {"us": 2.0}]
given = options()
work([Item({"name": f"item {i}"}, call) for i, call in enumerate(calls)],
     given.start, given.seconds, lambda: alive)
"""


@pytest.mark.usefixtures("quick_to_kill")
def test_an_item_that_is_lost_costs_no_other(tmp_path: Path) -> None:
    record = run_steps(tmp_path, step("items", ITEMS, items=True, patience=1.5))
    found = {r["name"]: r.get("error", r.get("us")) for r in record["steps"][0]["results"]}
    assert found == {
        "item 0": 1.0,
        "item 1": "ValueError: no",
        "item 2": "ended by SIGKILL",
        "item 3": "ended after 2 s without a new result",
        "item 4": "RuntimeError: sticky",
        "item 5": 2.0,
    }
    assert record["steps"][0]["status"] == "failed"
    assert record["steps"][0]["note"] == "4 of 6 failed"


def test_items_end_in_time_and_say_what_is_left_out(tmp_path: Path) -> None:
    code = (
        "import time\nfrom measure.items import Item, options, work\n"
        "call = lambda: time.sleep(0.4) or {}\ngiven = options()\n"
        "work([Item({}, call)] * 100, given.start, given.seconds, lambda: True)"
    )
    record = run_steps(tmp_path, step("many", code, seconds=8, items=True))
    *rows, left_out = record["steps"][0]["results"]
    assert ended(record) == {"many": "ok"}
    assert left_out == {"kind": "left out", "rows": 100 - len(rows), "why": "no time"}
    assert record["seconds"] < 8


def test_time_is_kept_for_later_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, given = [0.0], {}
    monkeypatch.setattr(Record, "elapsed", lambda self: clock[0])

    def take_all(step: Step, record: Record, seconds: float, environment: dict[str, str]) -> None:
        given[step.name] = seconds
        clock[0] += seconds
        record.end("timed out")

    monkeypatch.setattr(execute, "_run_step", take_all)
    sizes = {"first": (10, 300), "second": (100, 170), "third": (20, 200), "fourth": (4, 50)}
    steps = [Step(name, (), *size) for name, size in sizes.items()]
    record = run_steps(tmp_path, *steps, seconds=400)
    # 400 - 124 kept; all of the rest but 24; all but 4; and 4 s are not worth starting in
    assert given == {"first": 276, "second": 100, "third": 20}
    assert record["steps"][-1]["note"] == "no time left of 400 s"
    total = sum(step.least for step in plan.steps(tmp_path, "cuda", None, 600))
    assert total < 400  # so that a build of 200 s starves nothing


def begin_run(folder: Path, code: str) -> subprocess.Popen[bytes]:
    """A run of a step that hangs, once it has told a row."""
    script = (
        "import os, signal\nfrom pathlib import Path\nfrom measure import __main__ as command\n"
        "from measure.execute import execute\nfrom measure.plan import Step\n"
        "from measure.record import Record\n"
        "signal.signal(signal.SIGTERM, command.interrupted)\n"
        f"steps = [Step('one', {python('')}, 0, 60), Step('two', {python(code)}, 0, 60)]\n"
        f"record = Record(Path({str(folder)!r}), 60, device='cuda')\n"
        "execute(steps, record, dict(os.environ))"
    )
    process = subprocess.Popen(python(script), env=ENVIRONMENT)
    wait_for(lambda: (folder / "report.json").exists() and '"pid":' in read_text(folder))
    return process


def read_text(folder: Path) -> str:
    return (folder / "report.json").read_text(encoding="utf-8")


ROW_THEN_SLEEP = (
    f"import os\nfrom measure.results import tell\ntell('row', pid=os.getpid())\n{SLEEP}"
)


def test_a_killed_run_leaves_a_readable_report_and_no_process(tmp_path: Path) -> None:
    process = begin_run(tmp_path, ROW_THEN_SLEEP)
    process.kill()
    process.wait()
    record = json.loads(read_text(tmp_path))
    assert ended(record) == {"one": "ok", "two": "running"}
    assert not record["finished"]
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "**Not finished**" in text
    assert "| two | running |" in text
    wait_for(lambda: not is_alive(record["steps"][1]["results"][0]["pid"]))


def test_an_interrupted_run_says_so(tmp_path: Path) -> None:
    process = begin_run(tmp_path, ROW_THEN_SLEEP)
    process.terminate()
    assert process.wait(timeout=20) != 0
    record = json.loads(read_text(tmp_path))
    assert ended(record) == {"one": "ok", "two": "interrupted"}
    wait_for(lambda: not is_alive(record["steps"][1]["results"][0]["pid"]))


def test_readers_never_find_a_part_of_a_report(tmp_path: Path) -> None:
    record = Record(tmp_path, 60, device="cuda")
    record.begin("table", 60, [])
    done = threading.Event()

    def write() -> None:
        for i in range(150):
            record.add({"kind": "row", "us": i, "text": "x" * 1000})
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        assert not json.loads(read_text(tmp_path))["finished"]
        assert (tmp_path / "report.md").read_text(encoding="utf-8").endswith("\n")
    writer.join()


def test_cells_and_code_cannot_break_the_markdown() -> None:
    row = {"text": "a|b\nc", "number": 123456.0, "small": 0.123456, "none": None, "whole": 12345}
    assert report.table([row]).splitlines()[-1] == "| a\\|b c | 1.2346e+05 | 0.1235 |  | 12345 |"
    assert report.indented("```\n\x1b[31mred") == "    ```\n    ?[31mred"


def test_outcomes_of_a_selftest_that_was_cut_short(tmp_path: Path) -> None:
    assert outcomes.outcomes(tmp_path / "none.json") == []
    path = tmp_path / "smoke.json"
    bad = {"name": "x", "error": 2.0, "allowed": 1.0, "passed": False}
    good = {"name": "y", "error": 0.0, "allowed": 1.0, "passed": True}
    tasks = [
        {"name": "a", "status": "ok", "error": "", "comparisons": [good]},
        {"name": "b", "status": "FAILED", "error": "", "comparisons": [good, *[bad] * 5]},
        {"name": "c", "status": "FAILED", "error": "Traceback\nlast line\n", "comparisons": []},
    ]
    path.write_text(json.dumps({"finished": False, "tasks": tasks}), encoding="utf-8")
    counts, b, c = outcomes.outcomes(path)
    assert counts == {"kind": "outcomes", "ok": 1, "FAILED": 2, "verdict": "not finished"}
    assert b["why"] == "; ".join(["x: error 2.0, allowed 1.0"] * 3) + " and 2 more"
    assert c["why"] == "last line"
    for text in ("{", "[]", '{"tasks": [{}]}'):
        path.write_text(text, encoding="utf-8")
        assert "not what was expected" in outcomes.outcomes(path)[0]["verdict"]


def report_of(folder: Path, *told: dict[str, Any]) -> None:
    """As earlier steps would have left it."""
    steps = [{"name": "earlier", "status": "ok", "results": list(told)}]
    (folder / "report.json").write_text(json.dumps({"steps": steps}), encoding="utf-8")


def fact(name: str, value: Any) -> dict[str, Any]:
    return {"kind": "fact", "name": name, "value": value}


def test_the_build_is_for_the_card_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDAARCHS", raising=False)
    monkeypatch.setattr(build, "ask_driver", lambda query: {})
    with pytest.raises(SystemExit, match="set CUDAARCHS"):
        build.environment()
    monkeypatch.setattr(build, "ask_driver", lambda query: {"compute_cap": "12.0"})
    assert build.environment()["CUDAARCHS"] == "120-real"
    report_of(tmp_path, fact("capability", "9.0"))
    found = build.environment()
    assert found["CUDAARCHS"] == "90-real"
    assert found["SETFORMER_CUDA"] == "on"
    assert int(found["CMAKE_BUILD_PARALLEL_LEVEL"]) >= 1
    monkeypatch.setenv("CUDAARCHS", "89-real")
    assert build.environment()["CUDAARCHS"] == "89-real"


def test_what_the_driver_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.ask_driver("name,compute_cap") == {"nvidia-smi": "not found"}
    tool(tmp_path, "nvidia-smi", "echo 'NVIDIA H200, 9.0'\n")
    found = machine.ask_driver("name,compute_cap")
    assert found == {"name": "NVIDIA H200", "compute_cap": "9.0"}
    tool(tmp_path, "nvidia-smi", "echo 'no devices'; exit 6\n")
    assert machine.ask_driver("name") == {"nvidia-smi": "no devices"}


class FakeCuda:
    """torch.cuda as far as Card uses it, with a clock that calls and replays move."""

    def __init__(self) -> None:
        self.us = 0.0
        self.captured: list[float] | None = None
        self.most_in_graph = 0
        self.synchronize = self.current_stream = self.Stream = lambda: self
        self.stream = lambda stream: contextlib.nullcontext()
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
    assert limits.limit(shape, 5, False, limits.measured_device()) is None

    def told(**rates: float) -> tuple[float, str] | None:
        ceilings = [{"kind": "ceiling", "name": n, "rate": rate} for n, rate in rates.items()]
        report_of(tmp_path, fact("multiprocessors", 100), *ceilings)
        return limits.limit(shape, 5, False, limits.measured_device())

    # A head is one block of at most 96 > 100 - 4: 96 of 100 multiprocessors work. Keys, values and
    # outputs are B H N D halves each; the rows and the columns of every step are float32.
    heads, tokens, references, depth = 96, 196, 49, 32
    bytes_moved = heads * (3 * tokens * depth * 2 + 5 * 4 * (tokens + references))
    memory = told(copy=1e12)
    assert memory is not None
    assert memory == (pytest.approx(bytes_moved / (0.96 * 1e12) * 1e6, rel=0.01), "memory")
    special = told(copy=1e12, ex2=1e9)
    assert special is not None
    assert special[1] == "special"
    twice = told(copy=1e12, ex2=2e9)
    assert twice is not None
    assert twice == (pytest.approx(special[0] / 2), "special")
    assert limits.counted("bfloat16")
    assert not limits.counted("float32")
    report_of(tmp_path, fact("shared memory of a block", 101376))
    assert not limits.counted("bfloat16")  # other heads are resident there


# What the longest loop of each kernel of ceilings.cu is made of, and what must not be in it.
LOOPS = {
    "3Ex2E": ("MUFU.EX2", 256, "MUFU.(?!EX2)"),
    "4MovmE": ("MOVM", 256, "MUFU|FFMA"),
    "3FmaE": ("FFMA", 256, "MUFU|FMUL"),
    "read_shared": ("LDS.128", 32, "LDG|LDL"),
    "read_cache": ("LDG.E.128.STRONG", 8, "LDL"),
    "ILi8EL8Exchange2E": ("STAS", 1, "MEMBAR|UCGABAR|CCTL"),  # st.async
    "ILi8EL8Exchange1E": ("UCGABAR_ARV", 1, "STAS"),  # the cluster's barrier
    "ILi1EL8Exchange0E": ("BAR.SYNC", 1, "MEMBAR|UCGABAR"),
}


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
    assert first[first.index("--kernel-name") + 1] == "regex:^k0_kernel$"
    parser = argparse.ArgumentParser()  # that `setformer profile` takes what it is given
    profile.add_arguments(parser)
    options = parser.parse_args(first[first.index("profile") + 1 :])
    assert profile.chosen_shape(options) == SHAPES["v1"]
    tool(tmp_path, "ncu", "echo '==ERROR== ERR_NVGPUCTRPERM - no permission'\n")
    rows = run_tool_step(tmp_path, "profiles")["rows"]
    assert all("only root" in row["error"] for row in rows)


def test_the_sanitizer_sees_arrays_of_exact_size(tmp_path: Path) -> None:
    missing = run_tool_step(tmp_path, "sanitize", "--tool", "memcheck")
    assert missing["rows"][0]["kind"] == "skipped"
    tool(tmp_path, "compute-sanitizer", 'env; echo "$@"; exit 9\n')
    found = run_tool_step(tmp_path, "sanitize", "--tool", "memcheck")
    assert found["status"] == 9
    assert "PYTORCH_NO_CUDA_MEMORY_CACHING=1" in found["output"]
    assert "--tool memcheck" in found["output"]
    assert "--only smoke --in-process" in found["output"]


def test_the_selftest_takes_what_it_is_given(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    selftest.add_arguments(parser)
    given = [s.command[5:] for s in plan.steps(tmp_path, "cuda", None, 600) if s.outcomes]
    given.append(("--only", "smoke", "--in-process"))  # of sanitize.py
    for arguments in given:
        parser.parse_args([word.replace(plan.SECONDS, "20.0") for word in arguments])
    assert len(given) == 4


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


def test_the_emulated_device_in_place_of_a_card(tmp_path: Path) -> None:
    from conftest import cuda_emulated

    module = cuda_emulated().module
    steps = ["machine", "ceilings", "table", "knobs", "kernels", "profiles"]
    output = tmp_path / "output"
    done = measure(
        output, "--device", "emulated", "--package", str(module.__file__), "--only", *steps
    )
    record = json.loads(read_text(output))
    statuses = ended(record)
    assert statuses.pop("profiles") in ("skipped", "failed")  # where there is an ncu
    assert statuses == dict.fromkeys(steps[:-1], "ok"), done.stdout + done.stderr
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
    assert "attention_forward_resident_kernel<__nv_bfloat16>" in kernels
    text = (output / "report.md").read_text(encoding="utf-8")
    assert text.count("times mean nothing") >= 1
