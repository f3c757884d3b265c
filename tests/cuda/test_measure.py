"""benchmarks/cuda/measure.sh: whatever becomes of a step, the run goes on and its report tells."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "cuda"))

from measure import bounded, execute, outcomes, plan, report, run
from measure.plan import Step
from measure.record import Record

from measuring import ENVIRONMENT, ended, record_of

IGNORE_TERM = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
SLEEP = "import time; time.sleep(600)\n"


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def step(name: str, code: str, seconds: float = 30, **more: Any) -> Step:
    return Step(name, python(code), 0, seconds, **more)


def items_step(name: str, code: str, **more: Any) -> Step:
    """Its process is told when it must have ended."""
    planned = step(name, code, items=True, **more)
    return replace(planned, command=(*planned.command, "--end", plan.END))


def run_steps(folder: Path, *steps: Step, seconds: float = 60) -> dict[str, Any]:
    """The record of a run of these steps."""
    record = Record(folder, seconds, device="cuda")
    execute.execute(list(steps), record, dict(ENVIRONMENT))
    return record_of(folder)


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
    monkeypatch.setattr(bounded, "TO_END", 0.3)
    monkeypatch.setattr(run, "POLL", 0.02)
    monkeypatch.setattr(execute, "MARGIN", 0.3)


@pytest.mark.slow
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
    monkeypatch.setattr(bounded, "signal_group", lambda process, number: None)
    code = "import os; print(os.getpid(), flush=True)\n" + SLEEP
    start = time.monotonic()
    record = run_steps(tmp_path, step("stays", code, seconds=1), step("next", ""))
    assert time.monotonic() - start < 10
    left = int((tmp_path / "stays.log").read_text(encoding="utf-8"))
    wait_for(lambda: not is_alive(left))  # by its guard
    assert ended(record) == {"stays": "timed out", "next": "ok"}
    assert record["steps"][0]["note"].endswith("it could not be killed and was left behind")


@pytest.mark.usefixtures("quick_to_kill")
def test_endless_output_ends_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "MOST_LOG", 2 << 20)
    start = time.monotonic()
    record = run_steps(tmp_path, step("talks", "while True: print('x' * 10000, end='')"))
    assert time.monotonic() - start < 10
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
def last():
    assert alive
    return {"us": 2.0}
calls = [lambda: {"us": 1.0}, raises, dies, hangs, loses, last]
given = options()
work([Item({"name": f"item {i}"}, call) for i, call in enumerate(calls)],
     given.start, given.end, lambda: alive)
"""


@pytest.mark.usefixtures("quick_to_kill")
def test_an_item_that_is_lost_costs_no_other(tmp_path: Path) -> None:
    record = run_steps(tmp_path, items_step("items", ITEMS, patience=1.5))
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


@pytest.mark.slow
def test_items_end_in_time_and_say_what_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import time\ntime.sleep(1.5)\nfrom measure.items import Item, options, work\n"
        "call = lambda: time.sleep(0.4) or {}\ngiven = options()\n"
        "work([Item({}, call)] * 100, given.start, given.end, lambda: True)"
    )
    monkeypatch.setattr(execute, "MARGIN", 1.0)  # less than it takes to load what the step needs
    record = run_steps(tmp_path, items_step("many", code, seconds=4))
    *rows, left_out = record["steps"][0]["results"]
    assert ended(record) == {"many": "ok"}
    assert rows
    assert left_out == {"kind": "left out", "rows": 100 - len(rows), "why": "no time"}
    assert record["seconds"] < 4


@pytest.mark.usefixtures("quick_to_kill")
def test_an_item_that_its_deadline_cuts_has_not_failed(tmp_path: Path) -> None:
    code = (
        "import time\nfrom measure.items import Item, options, work\ngiven = options()\n"
        "items = [Item({'name': n}, lambda n=n: time.sleep(n) or {}) for n in (0, 60)]\n"
        "work(items, given.start, given.end, lambda: True)"
    )
    record = run_steps(tmp_path, items_step("slow", code, seconds=2))
    assert ended(record) == {"slow": "timed out"}
    _, cut = record["steps"][0]["results"]
    assert cut == {"kind": "left out", "item": 1, "name": 60, "why": "no time"}


def test_time_is_kept_for_later_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, given = [0.0], {}
    monkeypatch.setattr(Record, "elapsed", lambda self: clock[0])

    def take_all(step: Step, record: Record, seconds: float, environment: dict[str, str]) -> None:
        given[step.name] = seconds
        clock[0] += seconds
        record.end("timed out")

    monkeypatch.setattr(execute, "_run_step", take_all)
    sizes = {"first": (10, 300), "second": (100, 170), "third": (20, 200), "fourth": (24, 50)}
    steps = [Step(name, (), *size) for name, size in sizes.items()]
    record = run_steps(tmp_path, *steps, seconds=400)
    # 400 - 144 kept; all of the rest but 44; all but 24
    assert given == {"first": 256, "second": 100, "third": 20, "fourth": 24}
    clock[0] = 0.0
    record = run_steps(tmp_path, *steps, seconds=50)  # none for `first` to keep: it has its 10
    assert record["steps"][1]["note"] == "no time left of 50 s: needs 100, has 40"
    times = {step.name: step.least for step in plan.steps(tmp_path, "cuda", None, 600)}
    assert sum(times.values()) - times["build"] < 400  # so that a build of 200 s starves nothing


def test_a_build_has_the_time_of_what_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, float] = {}

    def succeed(step: Step, record: Record, seconds: float, environment: dict[str, str]) -> None:
        given[step.name] = seconds
        record.end("ok")

    monkeypatch.setattr(execute, "_run_step", succeed)
    run_steps(tmp_path, *plan.steps(tmp_path, "cuda", None, 300), seconds=300)
    assert given["build"] == pytest.approx(280, abs=1)  # all but that of the ceilings


def has_row(record: dict[str, Any]) -> bool:
    return any(step["results"] for step in record["steps"])


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
    wait_for(lambda: (folder / "report.json").exists() and has_row(record_of(folder)))
    return process


ROW_THEN_SLEEP = (
    f"import os\nfrom measure.results import tell\ntell('row', pid=os.getpid())\n{SLEEP}"
)


def test_a_killed_run_leaves_a_readable_report_and_no_process(tmp_path: Path) -> None:
    process = begin_run(tmp_path, ROW_THEN_SLEEP)
    process.kill()
    process.wait()
    record = record_of(tmp_path)
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
    record = record_of(tmp_path)
    assert ended(record) == {"one": "ok", "two": "interrupted"}
    wait_for(lambda: not is_alive(record["steps"][1]["results"][0]["pid"]))


@pytest.mark.parametrize("how", ["its time is up", "its caller is killed"])
def test_a_tools_own_processes_end_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """As ncu has them: not those of its caller, and not its children for long."""
    monkeypatch.setattr(bounded, "TO_END", 0.3)
    child = python(f"{IGNORE_TERM}import os\nprint(os.getpid(), flush=True)\n{SLEEP}")
    tool = f"import subprocess\nsubprocess.Popen({child})\n{IGNORE_TERM}{SLEEP}"
    path = tmp_path / "pid"

    def pid() -> int:
        return int(path.read_text(encoding="utf-8") or 0) if path.exists() else 0

    if how == "its time is up":
        with path.open("w") as file, pytest.raises(subprocess.TimeoutExpired):
            bounded.run(python(tool), 2, stdout=file)
    else:
        code = f"from measure import bounded\nbounded.run({python(tool)}, 60, stdout=None)"
        with path.open("w") as file:
            caller = subprocess.Popen(python(code), env=ENVIRONMENT, stdout=file)
        wait_for(pid)
        caller.kill()
        caller.wait()
    wait_for(lambda: not is_alive(pid()))


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
        assert not record_of(tmp_path)["finished"]
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
    assert outcomes.out_of_time(path) == ""
    for text in ("{", "[]", '{"tasks": [{}]}', '{"tasks": [], "suite": {}}'):
        path.write_text(text, encoding="utf-8")
        assert "not what was expected" in outcomes.outcomes(path)[0]["verdict"]


def test_outcomes_of_a_suite(tmp_path: Path) -> None:
    path = tmp_path / "suite.json"

    def write(error: str, **tests: str) -> None:
        told = {name: {"outcome": x, "seconds": 1.0, "why": f"a\n{x}"} for name, x in tests.items()}
        suite = {"folder": "tests", "error": error, "collected": 9, "tests": told}
        path.write_text(json.dumps({"tasks": [], "suite": suite}), encoding="utf-8")

    write("", x="passed", y="failed", z="failed")
    _, counts, *failed = outcomes.outcomes(path)
    expected = {"passed": 1, "failed": 2, "of": 9, "error": ""}
    assert counts == {"kind": "suite", **expected}
    assert failed == [{"kind": "failed test", "test": x, "why": "failed"} for x in "yz"]
    code = "import shutil; shutil.copy({!r}, 'suite.json'); raise SystemExit(1)"
    names = ("fails and is cut", "is cut", "lost")
    steps = [replace(step(name, code.format(name)), outcomes=path) for name in names]
    for one, error, tests in zip(
        steps,
        ["ended after 9 s, during y", "ended after 9 s, during y", "5 processes were lost"],
        [{"x": "failed"}, {"x": "passed"}, {"x": "passed"}],
        strict=True,
    ):
        write(error, **tests)
        path.rename(tmp_path / one.name)
    record = run_steps(tmp_path, *steps)
    assert list(ended(record).values()) == ["failed", "timed out", "failed"]
    assert record["steps"][1]["note"] == "ended after 9 s, during y"
