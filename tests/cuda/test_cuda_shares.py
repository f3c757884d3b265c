"""Forward of heads that neither a block nor a cluster holds: blocks take shares of the tokens."""

import shutil
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import setformer_ext
from conftest import BACKENDS
from emulator.build import load
from emulator.device import Emulator
from exactness import assert_as_exact_as_definition
from setformer_ext import ops
from setformer_ext.cli.selftest.problems import random_problem
from test_cuda_launch import launched

HALVES = (torch.bfloat16, torch.float16)
SHARES, MERGE = "attention_forward_on_shares_kernel", "merge_shares_kernel"
MASSES = {"token_mass": True, "masked": True, "reference_mass": "learned"}
LEARNED = {"epsilon": "learned", "bandwidth": "learned"}


@pytest.fixture
def emulator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Emulator:
    """Of compute capability 8.0, with a module that reads the environment anew."""
    for name, value in getattr(request, "param", {}).items():
        monkeypatch.setenv(name, value)
    module: ModuleType = load(
        Path(shutil.copy(BACKENDS["cuda-emulated"]().module.__file__, tmp_path))
    )
    monkeypatch.setattr(ops, "_C", module)
    emulator = Emulator(module.__file__ or "")
    emulator.set_capability(80)
    return emulator


def kernels(emulator: Emulator) -> list[str]:
    return [name for name, _ in launched(emulator)]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"N": 1900, "M": 49, "D": 32, "Dv": 32, "iterations": 3},
        {"N": 900, "M": 120, "D": 40, "Dv": 24, "iterations": 2, "P": 2, **MASSES, **LEARNED},
        {"N": 900, "M": 60, "D": 72, "Dv": 72, "Nq": 1000, "iterations": 2, **MASSES},
        {"N": 900, "M": 60, "D": 33, "Dv": 20, "iterations": 0},
        {"N": 900, "M": 30, "D": 24, "Dv": 8, "iterations": 2, "epsilon": 0.01, **MASSES},
        {"N": 900, "M": 60, "D": 32, "Dv": 16, "iterations": 2, "kernel": "linear"},
        {"N": 900, "M": 30, "D": 24, "Dv": 64, "per_sample": True, "normalize": True},
    ],
    ids=["steps", "masses", "cross", "no step", "logarithms", "linear", "scaled"],
)
def test_as_exact_as_definition(
    emulator: Emulator, options: dict[str, Any], dtype: torch.dtype
) -> None:
    arguments = random_problem(B=1, H=2, dtype=dtype, **options)
    assert_as_exact_as_definition(setformer_ext.set_attention, arguments, backward=False)
    steps = max(arguments["iterations"], 1)
    expected = [SHARES, MERGE] * steps * (2 if options.get("Nq") else 1) + [SHARES]
    assert kernels(emulator) == expected


@pytest.mark.parametrize("epsilon", [0.1, 0.01])
@pytest.mark.parametrize("emulator", [{"SETFORMER_CUDA_TILES": "16"}], indirect=True)
def test_shares_of_many_parts(emulator: Emulator, epsilon: float) -> None:
    """A and columns of the parts are added as they come; those of the first tokens have no mass."""
    sizes = {"N": 3000, "M": 120, "D": 24, "Dv": 20, "iterations": 2, "epsilon": epsilon}
    arguments = random_problem(B=1, H=2, dtype=torch.bfloat16, **sizes, **MASSES)
    arguments["mask"][:, :300] = False
    assert_as_exact_as_definition(setformer_ext.set_attention, arguments, backward=False)
    assert max(launch.grid[0] for launch in emulator.launches() if SHARES in launch.kernel) == 4


def test_backward_of_a_head_on_shares(emulator: Emulator) -> None:
    """What forward keeps is what streaming backward expects."""
    sizes = {"N": 900, "M": 70, "D": 24, "Dv": 20, "iterations": 2}
    arguments = random_problem(B=1, H=1, dtype=torch.bfloat16, **sizes, **MASSES, **LEARNED)
    assert_as_exact_as_definition(setformer_ext.set_attention, arguments)


def test_bits_do_not_depend_on_the_batch(emulator: Emulator) -> None:
    sizes = {"N": 1000, "M": 30, "D": 16, "Dv": 16, "iterations": 2}
    arguments = random_problem(B=3, H=2, dtype=torch.bfloat16, **sizes, token_mass=True)
    together = setformer_ext.set_attention(**arguments)
    alone = setformer_ext.set_attention(
        **arguments | {name: arguments[name][1:2] for name in ("key", "value", "token_mass")}
    )
    assert torch.equal(together[1:2], alone)


def test_packed_sequences(emulator: Emulator) -> None:
    """Of none, one and several shares; each as if it were alone."""
    lengths = [0, 40, 2000, 900, 0, 7]
    sizes = {"M": 20, "D": 16, "Dv": 8, "iterations": 2}
    arguments = random_problem(B=1, H=2, N=sum(lengths), dtype=torch.bfloat16, **sizes)
    rows = {name: arguments.pop(name)[0].transpose(0, 1) for name in ("key", "value")}
    ends = torch.tensor([0, *lengths]).cumsum(0)
    options = {"epsilon": arguments["epsilon"], "iterations": 2}
    output = setformer_ext.set_attention_varlen(
        None, rows["key"], rows["value"], arguments["reference"], ends, **options
    )
    assert SHARES in kernels(emulator)
    for begin, end in pairwise(ends.tolist()):
        if begin == end:
            continue
        key, value = (x[begin:end].transpose(0, 1)[None] for x in rows.values())
        right = setformer_ext.set_attention(
            None, key.double(), value.double(), arguments["reference"].double(), **options
        )[0].transpose(0, 1)
        allowed = 2**-8 * (right.abs() + right.abs().max())  # rounded plans and A, and the result
        assert ((output[begin:end] - right).abs() <= allowed).all()


@pytest.mark.parametrize(
    ("capability", "options", "shares"),
    [
        (86, {"M": 30, "D": 72, "Dv": 72}, True),  # two strips of a warp at once
        (86, {"M": 120, "D": 64, "Dv": 64}, False),
        (80, {"M": 129, "D": 8, "Dv": 8}, False),
    ],
    ids=["small parts", "no room", "more references"],
)
def test_which_heads_are_shared(
    emulator: Emulator, capability: int, options: dict[str, int], shares: bool
) -> None:
    """By the device's room and the references."""
    emulator.set_capability(capability)
    arguments = random_problem(B=1, H=1, N=1000, iterations=1, dtype=torch.float16, **options)
    assert_as_exact_as_definition(setformer_ext.set_attention, arguments, backward=False)
    assert (SHARES in kernels(emulator)) == shares
