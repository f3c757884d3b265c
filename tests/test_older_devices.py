"""The kernels for devices before sm_80, which have 64 KiB of shared memory a block, and neither
copies in the background nor tensor cores for bfloat16: another layout and another product."""

import shutil
from pathlib import Path

import pytest

from emulator.build import SOURCES, find_nvcc
from mutations.build import build_module
from mutations.checks import PROBLEMS
from mutations.run import check


@pytest.mark.skipif(find_nvcc() is None, reason="the emulator needs nvcc")
@pytest.mark.parametrize(
    "name",
    ["bfloat16 resident backward", "bfloat16 streaming backward", "float32 streaming backward"],
)
def test_sm_75_in_every_order_and_without_races(name: str, tmp_path: Path) -> None:
    sources = tmp_path / "csrc"
    shutil.copytree(SOURCES, sources)
    problem = PROBLEMS[name]
    library = build_module(sources, problem.storage, problem.resident, problem.backward, 75)
    found, words = check(library, name)
    assert not found, words
