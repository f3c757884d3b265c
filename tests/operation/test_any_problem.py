"""Outputs and gradients against the float64 definition, of problems that hypothesis thinks of."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import Backend, drawn_by_seed
from exactness import assert_as_exact_as_definition, noise_of_masses_of_zero
from setformer_ext.cli.selftest.problems import Arguments, move, random_problem

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FUNCTIONS = ["set_attention", "set_pooling", "transport_plan"]
ODD = [1, 2, 3, 7, 8, 17, 33, 97, 129]


@st.composite
def problems(draw: st.DrawFn, emulated: bool) -> Arguments:
    """Any combination of shapes, options and types; emulated, of fewer heads and steps."""

    def choose(*values: object) -> st.SearchStrategy:
        return st.sampled_from(values)

    return random_problem(
        draw(st.integers(0, 9999)),
        B=draw(choose(1, 2) if emulated else choose(1, 2, 3)),
        H=draw(choose(1, 2) if emulated else choose(1, 2, 5)),
        N=draw(choose(*ODD, 196, 257)),
        M=draw(choose(*ODD)),
        D=draw(choose(*ODD)),
        Dv=draw(choose(*ODD)),
        Nq=draw(choose(None, None, *ODD, 257)),
        per_sample=draw(st.booleans()),
        masked=draw(st.booleans()),
        token_mass=draw(st.booleans()),
        reference_mass=draw(choose(None, "learned", "per-sample")),
        kernel=draw(choose("gaussian", "linear")),
        bandwidth=draw(choose(0.5, 1.0, 2.0, "learned")),
        epsilon=draw(choose(0.05, 0.1, 1.0, "learned")),
        iterations=draw(choose(0, 1, 2, 5) if emulated else choose(0, 1, 2, 5, 20)),
        P=draw(choose(0, 0, 1, 2, 3)),
        dtype=draw(choose(*DTYPES)),
    )


@pytest.mark.slow
@pytest.mark.parametrize("function", FUNCTIONS)
def test_any_problem(backend: Backend, function: str) -> None:
    @drawn_by_seed
    @settings(max_examples=backend.examples)
    @given(arguments=problems(backend.emulated))
    def as_exact_as_definition(arguments: Arguments) -> None:
        arguments = move(arguments, device=backend.device)
        called, noise = getattr(backend, function), None
        if "token_mass" in arguments and (arguments["token_mass"] == 0).any():
            noise = noise_of_masses_of_zero(called, arguments, approximate=backend.approximate)
        assert_as_exact_as_definition(called, arguments, more_noise=noise)

    as_exact_as_definition()
