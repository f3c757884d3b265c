"""Builds each fault into a copy of the kernels and lets the checks look for it."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from emulator import build

from .build import build_module
from .checks import PROBLEMS
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


def check(library: Path, problem: str, orders: Sequence[str] = ()) -> tuple[str, str]:
    """What kinds of objections there are, and the first one's words; `orders`: see checks.py."""
    command = [sys.executable, "-m", "mutations.checks", str(library), problem, *orders]
    environment = os.environ | sanitizer() | python_path(FOLDER)
    try:
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=environment,
            cwd=FOLDER,
            timeout=300,
            encoding="utf-8",
        )
        lines, error, status = result.stdout.splitlines(), result.stderr, result.returncode
    except subprocess.TimeoutExpired:
        return "no end", "the kernels did not end in 300 s"
    ends_by_sanitizer = "ERROR: AddressSanitizer" in error  # of a copy's source, say
    if status > 0 and not ends_by_sanitizer:
        raise RuntimeError(f"{' '.join(command)} failed:\n{error}")
    objections = [json.loads(line) for line in lines if line != "null"]
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
