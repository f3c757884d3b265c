"""The checks find faults that were seeded into the kernels, and every fault fits its file. Finding
one takes a build of its own: that is tried where MUTATIONS=some or MUTATIONS=all asks for it;
`python -m mutations` and `python -m mutations.python` in tests/cuda print the tables."""

import ast
import os

import pytest

from emulator.build import SOURCES, find_nvcc
from mutations import python
from mutations.faults import FAULTS, Fault
from mutations.python import AREAS, PACKAGE, files
from mutations.python_faults import PYTHON_FAULTS
from mutations.run import run
from mutations.seeding import Seeded

# One of each kind, and cheap to compile.
SOME = {
    "registers of an mma fragment swapped",
    "16-byte copies of rows that are not aligned",
    "waits for one group of copies too few",
    "no barrier before a buffer is filled again",
    "log-sum-exp of the last block not merged",
    "sign of an adjoint",
}
WANTED = {"all": {fault.name for fault in FAULTS}, "some": SOME}
CHOSEN = [f for f in FAULTS if f.name in WANTED.get(os.environ.get("MUTATIONS", ""), set())]

needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="the emulator needs nvcc")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_kernels_have_the_text_that_a_fault_changes(fault: Fault) -> None:
    text = (SOURCES / "cuda" / fault.file).read_text(encoding="utf-8")
    changed = fault.apply(text)
    assert changed != text
    assert changed.count("\n") == text.count("\n")


OF_PYTHON = [fault for of_area in PYTHON_FAULTS.values() for fault in of_area]


@pytest.mark.parametrize("fault", OF_PYTHON, ids=lambda fault: fault.name)
def test_python_files_have_the_text_that_a_fault_changes(fault: Seeded) -> None:
    text = (PACKAGE / fault.file).read_text(encoding="utf-8")
    changed = fault.apply(text)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(text))


def test_python_faults_are_everywhere_and_have_tests() -> None:
    assert len({fault.name for fault in OF_PYTHON}) == len(OF_PYTHON) >= 40
    assert PYTHON_FAULTS.keys() == AREAS.keys()
    for area in AREAS:
        assert len(files(area)) >= len(AREAS[area])


@pytest.mark.parametrize("clean", [True, False])
def test_faults_are_looked_for_only_by_tests_that_pass_without_them(
    clean: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def find(area: str, fault: Seeded | None, quick: bool) -> python.Finding:
        broken = area == "train" and not clean
        return python.Finding(area, fault, ("a",) if fault or broken else (), 1.0)

    monkeypatch.setattr(python, "find", find)
    assert python.main(["--jobs=1", "cli/"]) == (0 if clean else 1)
    out = capsys.readouterr().out
    assert (" faults found" in out) == clean
    assert ("train, without a fault: a\n" in out) != clean


@needs_nvcc
@pytest.mark.parametrize("problem", dict.fromkeys(fault.problem for fault in CHOSEN))
def test_checks_have_no_objection_to_the_kernels(problem: str) -> None:
    row = run(None, problem)
    assert not row.found_by, row.words


@needs_nvcc
@pytest.mark.parametrize("fault", CHOSEN, ids=lambda fault: fault.name)
def test_fault_is_found(fault: Fault) -> None:
    row = run(fault, fault.problem)
    assert row.found_by
    print(f"{fault.name}: found by {row.found_by}")
