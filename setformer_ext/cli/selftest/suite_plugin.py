"""A plugin of pytest (-p) that runs the tests of one device and reports each of them at once.

It reports through the channel of `processes.Process`, whose code is the main module. It imports
nothing of this package: if something cannot be imported, the tests must show that.
"""

import faulthandler
import os
import signal
from pathlib import Path

import pytest

from __main__ import channel

_stderr = os.fdopen(os.dup(2), "w", encoding="utf-8")  # a copy that pytest does not capture


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--selftest-device", help="cpu or cuda:N")
    parser.addoption("--selftest-done", type=Path, help="a file of tests to leave out")
    parser.addoption("--selftest-lost", type=int, help="the status where the GPU fails every call")


def pytest_configure() -> None:
    faulthandler.register(signal.SIGUSR1, file=_stderr)


def _is_for(item: pytest.Item, device: str) -> bool:
    """On a GPU the tests with the backend cuda, on the CPU all that are not about GPUs."""
    if device == "cpu":
        return "cuda" not in item.nodeid.rpartition("/")[2]  # nor cuda-emulated
    parameters = getattr(item, "callspec", None)
    return parameters is not None and parameters.params.get("backend") == "cuda"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    done = set(config.option.selftest_done.read_text(encoding="utf-8").splitlines())
    chosen = [item for item in items if _is_for(item, config.option.selftest_device)]
    channel.send({"collected": len(chosen)})
    items[:] = [item for item in chosen if item.nodeid not in done]


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Report files that cannot be imported, or skip themselves."""
    if report.outcome != "passed":
        _tell(report, report.outcome, 0.0)


def pytest_runtest_logstart(nodeid: str) -> None:
    channel.send({"running": nodeid})


def pytest_runtest_logfinish() -> None:
    channel.send({"running": ""})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    outcome = report.outcome
    if hasattr(report, "wasxfail") and outcome == "skipped":
        outcome = "passed"  # an expected failure
    if report.when == "call" or outcome != "passed":
        _tell(report, outcome, report.duration)


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Stop if the GPU is lost: the results of later tests would mean nothing."""
    options = item.config.option
    if options.selftest_device != "cpu" and not works(options.selftest_device):
        pytest.exit("the GPU is lost", returncode=options.selftest_lost)


def works(device: str) -> bool:
    """Whether the GPU still answers."""
    import torch

    from setformer_ext.cli.selftest.outcome import works

    return works(torch.device(device))


def _tell(report: pytest.CollectReport | pytest.TestReport, outcome: str, seconds: float) -> None:
    """Send the outcome, with why the test was skipped or the end of how it failed."""
    why = report.longreprtext[-3000:]
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        why = str(report.longrepr[2]).removeprefix("Skipped: ")
    channel.send({"test": report.nodeid, "outcome": outcome, "seconds": seconds, "why": why})
