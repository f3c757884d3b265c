"""Whole problems in a random order of threads, under the race detector, and with allocations of
exact size, on sm_80 and on sm_75: devices before sm_80 have 64 KiB of shared memory a block, no
copies in the background and no tensor cores for bfloat16, hence another layout and product."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from emulator.build import SOURCES, emulated_library, find_nvcc
from mutations.build import build_module
from mutations.checks import PROBLEMS
from mutations.run import Check, checker

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="the emulator needs nvcc")

OLDER = "bfloat16 on-chip forward, of an older architecture"
ON_SM_75 = ["bfloat16 resident backward, small", "bfloat16 streaming backward, two tiles", OLDER]
ORDERS = ["random"]  # the rest of the suite runs them forward, test_threads.py in reverse as well
BACKWARD = [name for name, problem in PROBLEMS.items() if problem.backward]
ON_CHIP = ["float16 on-chip forward", "bfloat16 on-chip forward, in logarithms"]
ON_CHIP += ["bfloat16 forward on shares, in parts, in logarithms"]
ON_CHIP += [name for name, problem in PROBLEMS.items() if problem.regime == "cluster"]
ON_CHIP += [name for name in PROBLEMS if re.match("float32 (on-chip|forward on shares)", name)]


@pytest.fixture(scope="module")
def check() -> Iterator[Check]:
    with checker() as check:
        yield check


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*BACKWARD, *ON_CHIP} - {*ON_SM_75}))
def test_no_objection_on_sm_80(name: str, check: Check) -> None:
    found, words = check(emulated_library(), name, ORDERS)
    assert not found, words


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_SM_75)
def test_no_objection_on_sm_75(name: str, check: Check, tmp_path: Path) -> None:
    sources = tmp_path / "csrc"
    shutil.copytree(SOURCES, sources)
    problem = PROBLEMS[name]
    library = build_module(sources, problem.storage, problem.regime, problem.backward, 75)
    found, words = check(library, name, ORDERS)
    assert not found, words
