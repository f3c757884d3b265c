"""The tests of a checkout, run by pytest on one device, in processes that may crash or hang."""

import importlib.util
import math
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .outcome import CHECKS
from .processes import SECONDS_TO_DIE, SECONDS_TO_END, Process
from .tasks import deadline

MOST_SECONDS = 1800.0
# For a process that is lost at the end, for starting and ending another, and for the verdict.
SECONDS_TO_FINISH = SECONDS_TO_END + 2 * SECONDS_TO_DIE + 1
MOST_LOST_PROCESSES = 5
LOST = 90  # the status of a process whose GPU fails every call
SECONDS_BETWEEN_LINES = 30  # of progress
SECONDS_BETWEEN_RECORDS = 1


@dataclass
class Test:
    """What came of a test."""

    outcome: str  # passed, failed or skipped
    seconds: float
    why: str  # it was skipped, or failed


@dataclass
class Suite:
    """The outcomes so far, by pytest's node id."""

    folder: Path
    device: torch.device
    collected: int = 0
    tests: dict[str, Test] = field(default_factory=dict)
    skipped: str = ""  # why
    error: str = ""  # why the suite did not run to its end
    running: str = ""  # the test that runs now

    def count(self, outcome: str) -> int:
        return sum(test.outcome == outcome for test in self.tests.values())

    @property
    def passed(self) -> bool:
        """False also for a suite that was asked for and not run."""
        return not self.error and self.count("passed") > 0 and self.count("failed") == 0

    @property
    def progress(self) -> str:
        counts = [f"{self.count(x)} {x}" for x in ("passed", "failed", "skipped")]
        return f"{', '.join(counts)} of {self.collected} tests"

    @property
    def verdict(self) -> str:
        name = f"the suite {self.folder} on {self.device}"
        if self.skipped:
            return f"{name} was skipped: {self.skipped}"
        error = f" ({self.error.splitlines()[0]})" if self.error else ""
        word = "passed" if self.passed else "FAILED" if self.count("failed") else "did not pass"
        return f"{name} {word}: {self.progress}{error}"

    def take(self, event: dict[str, Any]) -> str:
        """Take in a message of pytest; returns the report of a test that failed."""
        self.collected = max(self.collected, event.get("collected", 0))
        self.running = event.get("running", self.running)
        name = event.pop("test", "")
        if not name:
            return ""
        before = self.tests.get(name)
        if before is None or before.outcome == "passed":  # a later phase of the test may fail
            self.tests[name] = Test(**event)
        return _failure(name, event["why"]) if event["outcome"] == "failed" else ""

    def fail(self, why: str) -> str:
        """Note that the running test is lost; returns the report."""
        self.tests[self.running] = Test("failed", 0.0, why)
        return _failure(self.running, why)

    def to_json(self) -> dict[str, Any]:
        tests = {name: asdict(test) for name, test in self.tests.items()}
        facts = {"folder": str(self.folder), "device": str(self.device)}
        why = {"skipped": self.skipped, "error": self.error}
        return facts | why | {"collected": self.collected, "passed": self.passed, "tests": tests}


def run_suite(suite: Suite, seconds: float = MOST_SECONDS) -> Iterator[str]:
    """Run a suite; yields lines of progress and of failed tests. `suite` holds all results.

    Ends within these seconds; yields at least one line a second, perhaps an empty one.
    """
    if importlib.util.find_spec("pytest") is None:
        suite.skipped = "needs pytest, which is not installed"
        yield suite.verdict
        return
    seconds -= SECONDS_TO_FINISH
    if seconds <= 0:
        suite.error = "no time was left"
        yield suite.verdict
        return
    end = time.monotonic() + seconds
    for _ in range(MOST_LOST_PROCESSES):
        with tempfile.NamedTemporaryFile("w", encoding="utf-8") as done:
            done.write("\n".join(suite.tests))
            done.flush()
            with closing(_pytest(suite, done.name)) as process:
                lost = yield from _follow(suite, process, end, seconds)
        if not lost:
            break
    else:
        suite.error = f"{MOST_LOST_PROCESSES} processes were lost"
    skipped = [test.why for test in suite.tests.values() if test.outcome == "skipped"]
    for reason in sorted(set(skipped)):
        yield f"skipped {skipped.count(reason)}: {reason}"
    yield suite.verdict


def _pytest(suite: Suite, done: str) -> Process:
    # the plugin is found by its folder, because its package would import torch
    code = (
        "import os; os.environ.pop('PYTEST_ADDOPTS', None); "
        f"sys.path.append({str(Path(__file__).parent)!r}); "
        "import pytest; sys.exit(pytest.console_main())"
    )
    options = [
        *("-q", "--tb=short", "--no-header", "--no-summary"),
        *("-p", "no:cacheprovider", "-p", "suite_plugin", "."),
        f"--selftest-device={suite.device}",
        *(f"--selftest-done={done}", f"--selftest-lost={LOST}"),
    ]
    return Process(code, *options, folder=suite.folder)


def _follow(
    suite: Suite, process: Process, end: float, seconds: float
) -> Generator[str, None, bool]:
    """Follow a process of pytest; returns whether it was lost during a test, rather than ended."""
    suite.running = ""
    heard = told = recorded = time.monotonic()
    while True:
        now = time.monotonic()
        # on a CPU nothing hangs for certain, and tests may take minutes
        may_hang = suite.running and suite.device.type == "cuda"
        limit = deadline(CHECKS, suite.device) if may_hang else math.inf
        if now >= end:
            during = f", during {suite.running}" if suite.running else ""
            suite.error = f"ended after {seconds:.0f} s{during}"
            return False
        if now >= recorded + SECONDS_BETWEEN_RECORDS:
            recorded = now
            yield ""
        if now > told + SECONDS_BETWEEN_LINES:
            told = now
            yield suite.progress
        wait = min(heard + limit, end, recorded + SECONDS_BETWEEN_RECORDS) - now
        try:
            event = process.hear(wait)  # returns at once if there is a message
        except TimeoutError:
            if time.monotonic() < heard + limit:
                continue
            yield suite.fail(f"hung for {limit:g} s\n{process.stack()}")
            return True
        except EOFError:
            break
        heard = time.monotonic()
        if failure := suite.take(event):
            yield failure
    status = process.status()
    if suite.running and status != LOST:
        yield suite.fail(f"the process ended with status {status}\n{process.written()}")
    elif suite.running:
        if suite.tests.get(suite.running, Test("passed", 0.0, "")).outcome == "passed":
            yield suite.fail("the GPU fails every call after it")
    elif status not in (0, 1):
        suite.error = f"pytest ended with status {status}"
        yield f"{suite.error}\n{process.written()}"
    return bool(suite.running)


def _failure(name: str, text: str) -> str:
    return "\n".join([f"FAILED {name}", *(f"  {line}" for line in text.splitlines())])
