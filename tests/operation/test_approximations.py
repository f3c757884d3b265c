"""The emulator's exponential, logarithm, reciprocal and their like, which err on a GPU: perturbed,
they err by as much as the PTX manual allows, and the kernels' results only by what follows."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import Backend
from emulator.build import build_ptx
from emulator.device import Emulator
from exactness import assert_as_exact_as_definition
from setformer_ext.cli.selftest.problems import random_problem

# The exact function, and how far the manual allows a result to be from it.
EXACT = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda x: 1 / x,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "div": lambda x: 3 / x,
}


def bound(name: str, x: np.ndarray, exact: np.ndarray) -> np.ndarray:
    unit = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    relative = {"lg2": 2.0**-22, "sqrt": 2.0**-23, "rsqrt": 2.0**-22.9}
    if name == "lg2":
        return np.where((x > 0.5) & (x < 2), 2.0**-22, np.abs(exact) * relative[name])
    if name in relative:
        return np.abs(exact) * relative[name]
    # of ex2 from the correctly rounded result, which is half a unit from the exact one
    return {"ex2": 2.5, "rcp": 1, "div": 2}[name] * unit


def kernels() -> str:
    """out[i] = f(in[i]), 64 threads a block."""
    text = ".version 8.0\n.target sm_80\n.address_size 64\n"
    for name in EXACT:
        operands = "%y, 3.0, %x" if name == "div" else "%y, %x"
        operands = operands.replace("3.0", "0f40400000")
        text += (
            f".visible .entry {name}(.param .u64 in, .param .u64 out) {{\n"
            ".reg .b64 %in, %out; .reg .b32 %i, %b; .reg .f32 %x, %y;\n"
            "ld.param.u64 %in, [in]; ld.param.u64 %out, [out];\n"
            "mov.u32 %i, %tid.x; mov.u32 %b, %ctaid.x; mad.lo.u32 %i, %b, 64, %i;\n"
            "mad.wide.u32 %in, %i, 4, %in; mad.wide.u32 %out, %i, 4, %out;\n"
            f"ld.global.f32 %x, [%in]; {name}.approx.f32 {operands}; st.global.f32 [%out], %y;\n"
            "ret; }\n"
        )
    return text


@pytest.fixture(scope="module")
def library() -> Path:
    return build_ptx(kernels())


def computed(library: Path, name: str, x: np.ndarray, seed: int = 1) -> np.ndarray:
    emulator, out = Emulator(library), np.empty_like(x)
    places = [ctypes.c_uint64(array.ctypes.data) for array in (x, out)]
    with emulator.configured(seed=seed, arithmetic="perturbed"):
        assert emulator.run(name, *places, grid=len(x) // 64, block=64) == 0
    return out


@pytest.mark.parametrize("name", EXACT)
def test_errors_are_as_large_as_allowed(library: Path, name: str) -> None:
    rng = np.random.default_rng(0)
    x = np.exp(rng.uniform(-4, 4, 2048)).astype(np.float32)
    if name == "ex2":
        x *= rng.choice([-1, 1], len(x)).astype(np.float32)
    found = computed(library, name, x)
    exact = EXACT[name](x.astype(np.float64))
    share = (found - exact) / bound(name, x, exact)
    assert np.abs(share).max() <= 1
    # the numbers next to the bound are a unit apart: on average half a unit is left
    assert np.abs(share).mean() > 0.45
    assert 0.4 < (share > 0).mean() < 0.6
    assert (computed(library, name, x) == found).all()
    assert 0.4 < (computed(library, name, x, seed=2) != found).mean() < 0.6


SPECIAL = {
    "ex2": [(-np.inf, 0), (0, 1), (-0.0, 1), (np.inf, np.inf), (np.nan, np.nan)],
    "lg2": [(0, -np.inf), (np.inf, np.inf), (-1, np.nan), (np.nan, np.nan)],
    "rcp": [(0, np.inf), (-0.0, -np.inf), (np.inf, 0), (np.nan, np.nan)],
    "sqrt": [(0, 0), (np.inf, np.inf), (-1, np.nan), (np.nan, np.nan)],
    "rsqrt": [(0, np.inf), (np.inf, 0), (-1, np.nan), (np.nan, np.nan)],
    "div": [(2.0**127, 0), (np.inf, 0), (np.nan, np.nan)],
}


@pytest.mark.parametrize("name", EXACT)
def test_special_inputs_have_the_results_of_the_manual(library: Path, name: str) -> None:
    x = np.ones(64, np.float32)
    given, expected = zip(*SPECIAL[name], strict=True)
    x[: len(given)] = given
    for seed in range(4):
        found = computed(library, name, x, seed)
        np.testing.assert_array_equal(found[: len(given)], np.float32(expected))
    # and what it does not fix is not exact
    if name != "ex2":
        assert found[-1] != EXACT[name](np.float32(1))


# Small, with a tail in every dimension.
SMALL = {"B": 1, "H": 1, "M": 19, "D": 24, "Dv": 21, "iterations": 3}
LEARNED = {"epsilon": "learned", "bandwidth": "learned", "reference_mass": "learned"}
PROBLEMS = {
    "small": SMALL | LEARNED | {"N": 45, "Nq": 41, "token_mass": True, "masked": True},
    "sharp": SMALL | {"N": 45, "epsilon": 0.01},  # in the log domain
    "linear": SMALL | {"N": 45, "kernel": "linear", "P": 2},
    "streamed": SMALL | LEARNED | {"N": 100, "D": 200},
}


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_results_are_as_exact_as_their_functions_allow(
    backend: Backend, name: str, dtype: torch.dtype
) -> None:
    if not backend.emulated:
        pytest.skip("only the emulated device can be told how to err")
    emulator = Emulator(backend.module.__file__)
    arguments = random_problem(dtype=dtype, **PROBLEMS[name])
    for seed in (1, 2):
        with emulator.configured(seed=seed, arithmetic="perturbed"):
            assert_as_exact_as_definition(backend.set_attention, arguments, approximate=True)
