"""`setformer selftest --suite`: the tests of a checkout on one device."""

import importlib.util
import json
import re
import subprocess
import time
from pathlib import Path

import pytest
import torch

from setformer_ext import cli
from setformer_ext.cli import selftest as package
from setformer_ext.cli.selftest import runner, selftest
from setformer_ext.cli.selftest import suite as module
from setformer_ext.cli.selftest.outcome import Task
from setformer_ext.cli.selftest.suite import Suite, run_suite

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)

# On a GPU that is not there: its plugin finds that it works until a test says otherwise.
CONFTEST = """
import pytest
import suite_plugin

suite_plugin.works = lambda device: not hasattr(pytest, "lost")
"""


def write(folder: Path, body: str) -> Path:
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_it.py").write_text(f"import os, time\nimport pytest\n{body}")
    return folder


@pytest.fixture(autouse=True)
def no_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which a machine may have slow ones."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


@pytest.fixture
def backends(tmp_path: Path) -> Path:
    """A test that passes on the CPU's backend alone, and one without a backend."""
    return write(
        tmp_path,
        "@pytest.mark.parametrize('backend', ['cpu', 'cuda-emulated', 'cuda'])\n"
        "def test_backend(backend): assert backend == 'cpu', 'wrong on ' + backend\n"
        "def test_of_host(): pytest.skip('no reason')\n",
    )


def test_suite_of_the_cpu(backends: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "all_tasks", lambda *_: [Task("x", lambda _: [])])
    file = backends / "report.json"
    result = selftest(CPU, suite=backends, json=file)
    assert result.passed
    verdict = f"the suite {backends} on cpu passed: 1 passed, 0 failed, 1 skipped of 2 tests"
    assert result.text.splitlines()[-1].endswith(f"; {verdict}")
    assert "skipped 1: no reason" in result.text
    tests = json.loads(file.read_text())["suite"]["tests"]
    assert {name: test["outcome"] for name, test in tests.items()} == {
        "test_it.py::test_backend[cpu]": "passed",
        "test_it.py::test_of_host": "skipped",
    }


def test_suite_of_a_gpu(backends: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "deadline", lambda *_: 60)
    suite = Suite(backends, GPU)
    text = "\n".join(run_suite(suite))
    assert "AssertionError: wrong on cuda\n" in text
    assert list(suite.tests) == ["test_it.py::test_backend[cuda]"]
    assert suite.verdict == (
        f"the suite {backends} on cuda:0 FAILED: 0 passed, 1 failed, 0 skipped of 1 tests"
    )


def test_a_failed_suite_fails_the_selftest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "all_tasks", lambda *_: [Task("x", lambda _: [])])
    write(tmp_path, "def test_it(): assert 1 == 2\n")
    result = selftest(CPU, suite=tmp_path)
    assert not result.passed
    assert result.text.splitlines()[-1].startswith("FAILED: 1 ok, 0 failed")


@pytest.mark.slow
def test_tests_that_crash_hang_or_lose_the_gpu_cost_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = """
@pytest.mark.parametrize("backend", ["cuda"])
@pytest.mark.parametrize("kind", ["ok", "crash", "well", "lose", "right", "hang", "good"])
def test_kind(backend, kind):
    if kind == "crash":
        os.abort()
    if kind == "hang":
        time.sleep(1000)
    if kind == "lose":
        pytest.lost = True
"""
    write(tmp_path, body)
    monkeypatch.setattr(module, "deadline", lambda *_: 2)
    suite = Suite(tmp_path, GPU)
    "\n".join(run_suite(suite))
    found = {name.partition("[")[2].partition("-")[0]: test for name, test in suite.tests.items()}
    assert {kind: test.outcome for kind, test in found.items()} == {
        **dict.fromkeys(("ok", "well", "right", "good"), "passed"),
        **dict.fromkeys(("crash", "lose", "hang"), "failed"),
    }
    assert found["crash"].why.startswith("the process ended with status -6\n")
    assert found["lose"].why == "the GPU fails every call after it"
    assert found["hang"].why.startswith("hung for 2 s\n")
    assert "in test_kind" in found["hang"].why
    assert suite.collected == 7
    assert not suite.error


@pytest.mark.slow
def test_a_suite_that_is_cut_short_tells_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record has each test within a second or two, and the command ends in time."""
    body = """
def test_first(): pass
def test_reads_the_record():
    while '"test_it.py::test_first": {' not in open("report.json").read(): time.sleep(0.1)
def test_endless(): time.sleep(1000)
"""
    write(tmp_path, body)
    monkeypatch.setattr(package, "age", lambda: 100.0)
    monkeypatch.setattr(module, "SECONDS_TO_FINISH", 2.0)
    options = [f"--output={tmp_path / 'report.txt'}", f"--suite={tmp_path}", "--suite-seconds=110"]
    start = time.monotonic()
    assert cli.main(["selftest", "--device=cpu", "--only=suite", *options]) == 1
    assert time.monotonic() - start < 10
    record = json.loads((tmp_path / "report.json").read_text())
    assert record["tasks"] == []
    assert re.match(r"ended after [678] s, during .*test_endless", record["suite"]["error"])
    assert [test["outcome"] for test in record["suite"]["tests"].values()] == ["passed"] * 2
    assert record["finished"]
    counts = "did not pass: 2 passed, 0 failed, 0 skipped of 3 tests (ended after"
    assert counts in record["verdict"]


def test_no_process_starts_where_no_time_is_left(tmp_path: Path) -> None:
    suite = Suite(tmp_path, CPU)
    assert len(list(run_suite(suite, module.SECONDS_TO_FINISH))) == 1
    assert suite.error == "no time was left"
    assert not suite.passed


def test_age_of_a_process() -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        young = package.age(child.pid)
        time.sleep(0.5)
        assert 0 <= young < package.age(child.pid) - 0.4
    finally:
        child.kill()
        child.wait(10)
    assert young < package.age()
    assert package.age(child.pid) == 0  # as where there is no /proc


def test_a_suite_that_cannot_be_run(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("raise OSError('unreadable')")
    suite = Suite(tmp_path, CPU)
    assert "unreadable" in "\n".join(run_suite(suite))
    assert suite.error == "pytest ended with status 4"


def test_a_suite_without_pytest_is_skipped_and_has_not_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    file = tmp_path / "report.json"
    result = selftest(CPU, sections=(), suite=tmp_path, json=file)
    reason = "needs pytest, which is not installed"
    assert result.text.endswith(f"; the suite {tmp_path} on cpu was skipped: {reason}")
    assert not result.passed
    assert json.loads(file.read_text())["suite"]["skipped"] == reason
