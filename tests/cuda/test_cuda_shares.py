"""Heads that neither a block nor a cluster holds: blocks take shares of the tokens."""

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
BACKWARD = "attention_backward_on_shares_kernel"
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


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("epsilon", [0.1, 0.01])
@pytest.mark.parametrize("emulator", [{"SETFORMER_CUDA_TILES": "16"}], indirect=True)
def test_shares_of_many_parts(emulator: Emulator, epsilon: float, dtype: torch.dtype) -> None:
    """A and columns of the parts are added as they come; those of the first tokens have no mass."""
    sizes = {"N": 3000, "M": 120, "D": 24, "Dv": 20, "iterations": 2, "epsilon": epsilon}
    arguments = random_problem(B=1, H=2, dtype=dtype, **sizes, **MASSES)
    arguments["mask"][:, :300] = False
    assert_as_exact_as_definition(setformer_ext.set_attention, arguments, backward=False)
    assert max(launch.grid[0] for launch in emulator.launches() if SHARES in launch.kernel) == 4


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


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"N": 4200, "M": 20, "D": 24, "Dv": 20, "iterations": 1}, 2),
        ({"N": 4200, "M": 60, "D": 40, "Dv": 40, "iterations": 2, **MASSES, **LEARNED}, 3),
        ({"N": 600, "M": 128, "D": 64, "Dv": 64, "iterations": 1}, 3),
        ({"N": 600, "M": 100, "D": 40, "Dv": 24, "iterations": 3, "P": 2, **MASSES, **LEARNED}, 5),
        ({"N": 600, "M": 70, "D": 33, "Dv": 64, "iterations": 0, **MASSES}, 3),
        ({"N": 600, "M": 70, "D": 40, "Dv": 40, "Nq": 500, "iterations": 2, **MASSES}, 7),
        ({"N": 600, "M": 90, "D": 24, "Dv": 40, "per_sample": True, "normalize": True}, 7),
        ({"N": 100, "M": 120, "D": 16, "Dv": 16, "iterations": 2}, 4),
    ],
    ids=["one range", "masses", "two ranges", "steps", "no step", "cross", "scaled", "one share"],
)
def test_backward_as_exact_as_definition(
    emulator: Emulator, options: dict[str, Any], expected: int, dtype: torch.dtype
) -> None:
    emulator.set_capability(90)  # which has more room than 8.0
    arguments = random_problem(B=1, H=2, dtype=dtype, **options)
    assert_as_exact_as_definition(setformer_ext.set_attention, arguments)
    assert kernels(emulator).count(BACKWARD) == expected


def test_backward_where_room_is_short(emulator: Emulator) -> None:
    """Four warps where eight do not fit."""
    arguments = random_problem(
        B=1, H=1, N=600, M=110, D=64, Dv=48, dtype=torch.bfloat16, iterations=2, **MASSES, **LEARNED
    )
    assert_as_exact_as_definition(setformer_ext.set_attention, arguments)
    threads = {x.block[0] for x in emulator.launches() if BACKWARD in x.kernel}
    assert threads == {128}


@pytest.mark.parametrize("emulator", [{"SETFORMER_CUDA_TILES": "16"}], indirect=True)
def test_backward_of_shares_of_many_rounds(emulator: Emulator) -> None:
    """Tokens of the first rounds have no mass."""
    sizes = {"N": 2100, "M": 70, "D": 24, "Dv": 20, "iterations": 2}
    arguments = random_problem(B=1, H=1, dtype=torch.float16, **sizes, **MASSES)
    arguments["mask"][:, :300] = False
    assert_as_exact_as_definition(setformer_ext.set_attention, arguments)
    assert {x.grid[0] for x in emulator.launches() if BACKWARD in x.kernel} == {3}


@pytest.mark.parametrize("emulator", [{"SETFORMER_CUDA_TILES": "1"}], indirect=True)
def test_shares_smaller_than_a_round(emulator: Emulator) -> None:
    """Of four strips: too few for eight warps."""
    arguments = random_problem(B=1, H=1, N=100, M=70, D=24, Dv=20, dtype=torch.float16)
    assert_as_exact_as_definition(setformer_ext.set_attention, arguments)
    assert {x.block[0] for x in emulator.launches() if BACKWARD in x.kernel} == {128}


@pytest.mark.parametrize("normalize", [False, True])
def test_backward_of_heads_of_both_kinds(emulator: Emulator, normalize: bool) -> None:
    """Heads whose masses are far apart need logarithms and stream, beside one that does not; both
    are merged."""
    sizes = {"N": 600, "M": 70, "D": 24, "Dv": 20, "iterations": 2, "normalize": normalize}
    arguments = random_problem(B=2, H=2, dtype=torch.bfloat16, **sizes, **MASSES, epsilon=0.25)
    arguments["reference_mass"][1, 3] = 2.0**-32
    assert_as_exact_as_definition(setformer_ext.set_attention, arguments)
    assert {BACKWARD, "gradient_kernel"} <= {*kernels(emulator)}


def gradients(arguments: dict[str, Any]) -> list[torch.Tensor]:
    """By key, value and reference, of a sum of outputs."""
    given = [arguments[name].detach().requires_grad_() for name in ("key", "value", "reference")]
    key, value, reference = given
    output = setformer_ext.set_attention(
        **arguments | {"key": key, "value": value, "reference": reference}
    )
    weights = torch.linspace(-1, 1, output.shape[-2], dtype=output.dtype)[:, None]
    return list(torch.autograd.grad((output * weights).sum(), given))


def test_gradients_do_not_depend_on_the_batch(emulator: Emulator) -> None:
    sizes = {"N": 900, "M": 70, "D": 16, "Dv": 16, "iterations": 2, "per_sample": True}
    arguments = random_problem(B=3, H=2, dtype=torch.bfloat16, **sizes)
    alone = {name: arguments[name][1:2] for name in ("key", "value", "reference")}
    for together, single in zip(gradients(arguments), gradients(arguments | alone), strict=True):
        assert torch.equal(together[1:2], single)
    assert BACKWARD in kernels(emulator)


def test_gradients_of_packed_sequences(emulator: Emulator) -> None:
    """Of none, one and several shares; those by tokens are as if each were alone."""
    lengths = [0, 40, 1500, 300, 0, 7]
    sizes = {"M": 70, "D": 16, "Dv": 8, "iterations": 2}
    arguments = random_problem(B=1, H=2, N=sum(lengths), dtype=torch.bfloat16, **sizes)
    options = {"epsilon": arguments["epsilon"], "iterations": 2}
    reference = arguments["reference"].detach()
    rows = [
        arguments[name].detach()[0].transpose(0, 1).contiguous().requires_grad_()
        for name in ("key", "value")
    ]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    setformer_ext.set_attention_varlen(
        None, *rows, reference, ends, **options
    ).square().sum().backward()
    assert BACKWARD in kernels(emulator)
    for begin, end in pairwise(ends.tolist()):
        if begin == end:
            continue
        own = [x.detach()[begin:end].transpose(0, 1)[None].clone().requires_grad_() for x in rows]
        setformer_ext.set_attention(None, *own, reference, **options).square().sum().backward()
        for x, y in zip(rows, own, strict=True):
            right = y.grad[0].transpose(0, 1)
            # each side rounds its output, which the loss squares, plans, A and its result
            assert (x.grad[begin:end] - right).abs().max() <= 4 * 2**-8 * right.abs().max()
