"""What pytest loads (-p) to run the tests of one device and to tell of each as it goes.

Lines of JSON on the stdout that pytest was started with, whatever it captures.
"""

import faulthandler
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from .outcome import works
from .suite import LOST
from .worker import MARK

_stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
_stderr = os.fdopen(os.dup(2), "w", encoding="utf-8")


def _tell(**event: Any) -> None:
    print(MARK + json.dumps(event), file=_stdout, flush=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--selftest-device", default="cpu")
    parser.addoption("--selftest-done", type=Path, help="a file of tests to leave out")


def pytest_configure(config: pytest.Config) -> None:
    faulthandler.register(signal.SIGUSR1, file=_stderr)


def _is_for(item: pytest.Item, device: torch.device) -> bool:
    """On a GPU those whose backend it is, on the CPU all that are not about GPUs."""
    if device.type == "cpu":
        return "cuda" not in item.nodeid  # nor cuda-emulated
    parameters = getattr(item, "callspec", None)
    return parameters is not None and parameters.params.get("backend") == "cuda"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    device = torch.device(config.option.selftest_device)
    done = set(config.option.selftest_done.read_text(encoding="utf-8").splitlines())
    chosen = [item for item in items if _is_for(item, device)]
    _tell(collected=len(chosen))
    items[:] = [item for item in chosen if item.nodeid not in done]


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Files that cannot be imported, or leave themselves out."""
    if report.outcome != "passed":
        _tell(test=report.nodeid, outcome=report.outcome, seconds=0.0, text=_text(report))


def pytest_runtest_logstart(nodeid: str) -> None:
    _tell(running=nodeid)


def pytest_runtest_logfinish() -> None:
    _tell(running="")


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    outcome = report.outcome
    if hasattr(report, "wasxfail") and outcome == "skipped":
        outcome = "passed"  # it fails as it is expected to
    if report.when == "call" or outcome != "passed":
        _tell(test=report.nodeid, outcome=outcome, seconds=report.duration, text=_text(report))


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Nothing can be told of tests that run after the GPU is lost."""
    device = torch.device(item.config.option.selftest_device)
    if device.type == "cuda" and not works(device):
        pytest.exit("the GPU is lost", returncode=LOST)


def _text(report: pytest.CollectReport | pytest.TestReport) -> str:
    """Why it was skipped, or the end of how it failed."""
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    return report.longreprtext[-3000:]
