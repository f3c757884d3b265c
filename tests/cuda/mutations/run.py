"""Builds each fault into a copy of the kernels and lets the checks look for it."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TextIO

from emulator import build

from .build import build_module
from .checks import LONGEST, PROBLEMS
from .faults import Fault
from .seeding import python_path

FOLDER = Path(__file__).resolve().parents[1]
CLEAN = "none"  # the fault of the kernels as they are


@dataclass(frozen=True)
class Row:
    fault: str
    file: str
    problem: str
    found_by: str  # nothing if no check objected
    words: str  # of the first objection
    seconds: float

    @property
    def as_expected(self) -> bool:
        return bool(self.found_by) == (self.fault != CLEAN)


def run(fault: Fault | None, problem_name: str) -> Row:
    """The checks' findings on one problem.

    Raises: BuildError, PtxError; ValueError if the kernels no longer have the fault's text.
    """
    start = time.perf_counter()
    problem = PROBLEMS[problem_name]
    with tempfile.TemporaryDirectory() as folder:
        sources = Path(folder) / "csrc"
        shutil.copytree(build.SOURCES, sources)
        if fault is not None:
            file = sources / "cuda" / fault.file
            file.write_text(fault.apply(file.read_text(encoding="utf-8")), encoding="utf-8")
        library = build_module(
            sources, problem.storage, problem.regime, problem.backward, problem.architecture
        )
    with checker() as check:
        found, words = check(library, problem_name)
    return Row(
        fault.name if fault else CLEAN,
        fault.file if fault else "",
        problem_name,
        found,
        words,
        time.perf_counter() - start,
    )


@functools.cache
def sanitizer() -> dict[str, str]:
    """The variables that load AddressSanitizer's runtime, where the compiler has one, and the
    library whose exceptions it intercepts."""
    found = []
    for name in ("libasan.so", "libstdc++.so.6"):
        command = [build.host_compiler(), f"-print-file-name={name}"]
        path = subprocess.run(
            command, capture_output=True, text=True, encoding="utf-8"
        ).stdout.strip()
        if not os.path.isabs(path):
            return {}
        found.append(os.path.realpath(path))
    return {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0:handle_segv=0"}


Check = Callable[..., tuple[str, str]]


@contextlib.contextmanager
def checker() -> Iterator[Check]:
    """check(library, problem, orders=()): what kinds of objections there are, and the first one's
    words. `orders`: see checks.py, whose process takes one check after another."""
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as errors,
        subprocess.Popen(
            [sys.executable, "-m", "mutations.checks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=os.environ | sanitizer() | python_path(FOLDER),
            cwd=FOLDER,
            encoding="utf-8",
        ) as process,
    ):
        yield partial(_check, process, errors)


def _check(
    process: subprocess.Popen[str],
    errors: TextIO,
    library: Path,
    problem: str,
    orders: Sequence[str] = (),
) -> tuple[str, str]:
    assert process.stdin
    assert process.stdout
    seen = errors.seek(0, os.SEEK_END)
    print(json.dumps([str(library), problem, *orders]), file=process.stdin, flush=True)
    objections = []
    status = None
    for line in process.stdout:
        said = json.loads(line)
        if isinstance(said, int):
            status = said
            break
        objections.append(said)
    errors.seek(seen)
    error = errors.read()
    if status == -signal.SIGALRM:
        return "no end", f"the kernels did not end in {LONGEST} s"
    # Of a copy's source, say; or a fault has overwritten what the sanitizer itself needs.
    ends = ("ERROR: AddressSanitizer", "AddressSanitizer: CHECK failed")
    ends_by_sanitizer = any(end in error for end in ends)
    if status is None or (status > 0 and not ends_by_sanitizer):
        raise RuntimeError(f"the check of {problem!r} failed:\n{error}")
    kinds = dict.fromkeys(objection["by"] for objection in objections)
    if ends_by_sanitizer:
        kinds["address"] = None
    if status < 0:
        kinds[f"signal {-status}"] = None
    return ", ".join(kinds), objections[0]["words"] if objections else ""


def clean_and(faults: Sequence[Fault]) -> list[tuple[Fault | None, str]]:
    """The faults, and before them the kernels as they are on each of the faults' problems."""
    problems = dict.fromkeys(fault.problem for fault in faults)
    return [(None, problem) for problem in problems] + [(fault, fault.problem) for fault in faults]


def run_all(faults: Sequence[Fault]) -> Iterator[Row]:
    jobs = clean_and(faults)
    yield run(*jobs[0])  # alone: it builds what all others share
    with ThreadPoolExecutor(build.most_jobs()) as pool:
        yield from pool.map(lambda job: run(*job), jobs[1:])
