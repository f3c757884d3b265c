"""Prints which test finds each fault that is seeded into a Python file. Fails if none does.

First the tests run without a fault: one that fails even then would count as finding every fault, so
this stops and names it.

    cd tests/cuda
    python -m mutations.python [--quick] [WORD ...]    # faults whose name, file or area has a word

Each fault is in a copy of the package that the tests of its area import in place of the installed
one; ``--quick`` runs those that are not marked as slow.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import setformer_ext

from .python_faults import PYTHON_FAULTS
from .seeding import Seeded, python_path

TESTS = Path(__file__).resolve().parents[2]
PACKAGE = Path(setformer_ext.__file__).parent
# Of test files, by patterns; the kernels' own tests and those of benchmarks find nothing here.
AREAS = {
    "operation": (
        *("definition", "gradients", "errors", "approximations", "modules", "module_interface"),
        *("numerics", "normalize", "numpy*", "arguments", "strides", "torch_layer", "varlen"),
        *("controls", "any_problem", "other_attentions", "memory", "trainer", "export"),
    ),
    "vision": ("vision*", "detection", "segmentation", "stochastic", "train_segment"),
    "language": ("language*", "distillation", "stochastic", "train_language", "texts"),
    "train": ("train*", "data_absolute", "image*", "coco_exports", "texts", "demo", "evaluate"),
    "predict": ("predict*", "evaluate", "pictures", "export", "vision_export", "data_absolute"),
    "explain": ("explain*",),
    "distributed": ("distributed*",),
}
LONGEST = 1800  # seconds of one fault's tests
COLUMNS = "{:<72} {:<30} {:<9} {}"


@dataclass(frozen=True)
class Finding:
    area: str
    fault: Seeded | None
    tests: tuple[str, ...]  # that failed, of a fault the first alone; none if all passed
    seconds: float

    @property
    def by(self) -> str:
        return " ".join(name.removeprefix("test_") for name in self.tests)


def find(area: str, fault: Seeded | None, quick: bool) -> Finding:
    """Run the tests of an area, with a fault until one fails.

    Raises:
        RuntimeError: if the tests could not run.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "setformer_ext"
        shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
        if fault is not None:
            file = package / fault.file
            file.write_text(fault.apply(file.read_text(encoding="utf-8")), encoding="utf-8")
        # What an emulated device computes is the kernels' matter, whose faults have a table too.
        chosen = ["-k", "not emulated", *(["-m", "not slow"] if quick else [])]
        chosen += [] if fault is None else ["--exitfirst"]
        command = [sys.executable, "-m", "pytest", "--quiet", "-rfE", *chosen]
        try:
            result = subprocess.run(
                [*command, "-p", "no:cacheprovider", *files(area, fault.file if fault else "")],
                capture_output=True,
                text=True,
                env=os.environ | python_path(folder),
                cwd=TESTS,
                timeout=LONGEST,
                encoding="utf-8",
            )
        except subprocess.TimeoutExpired:
            return Finding(area, fault, ("no end",), time.perf_counter() - start)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", result.stdout, re.MULTILINE)
    if result.returncode not in (0, 1):
        if fault is None:
            raise RuntimeError(f"{area}: {result.stdout[-2000:]}{result.stderr[-2000:]}")
        failed = [f"pytest, which ends with status {result.returncode}"]  # the import fails, say
    return Finding(area, fault, tuple(failed), time.perf_counter() - start)


def files(area: str, file: str = "") -> list[str]:
    """The test files of an area: first those that name the file's module, and of these the
    smallest."""
    found = {path for name in AREAS[area] for path in TESTS.rglob(f"test_{name}.py")}
    module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    def key(path: Path) -> tuple[bool, int, str]:
        names = module in path.read_text(encoding="utf-8")
        return not names, path.stat().st_size, path.name

    return [str(path) for path in sorted(found, key=key)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("words", nargs="*", metavar="WORD")
    options = parser.parse_args(arguments)
    faults = [
        (area, fault)
        for area, of_area in PYTHON_FAULTS.items()
        for fault in of_area
        if fault.is_meant(options.words, area)
    ]
    areas = dict.fromkeys(area for area, _ in faults)
    with ThreadPoolExecutor(options.jobs) as pool:
        clean = [*pool.map(lambda area: find(area, None, options.quick), areas)]
        if any(found.tests for found in clean):
            for found in clean:
                print(f"{found.area}, without a fault: {found.by or 'all tests pass'}")
            return 1
        print(COLUMNS.format("fault", "file", "time", "found by"))
        missed = 0
        for found in pool.map(lambda chosen: find(*chosen, options.quick), faults):
            columns = (found.fault.name, found.fault.file, f"{found.seconds:.0f} s")
            print(COLUMNS.format(*columns, found.by or "NOTHING"), flush=True)
            missed += not found.tests
    print(f"{len(faults) - missed} of {len(faults)} faults found")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
