"""Every instruction set that the processor has gives the same, and can be asked for."""

import pytest

from fresh import fresh
from setformer_ext import _C

CHECK = """
import torch
import setformer_ext
from exactness import assert_as_exact_as_definition
from setformer_ext.cli.selftest.problems import random_problem

torch.set_num_threads(2)
problems = [
    {},
    {"N": 1, "M": 1, "D": 1, "Dv": 1},
    {"N": 257, "M": 49, "D": 33, "Dv": 65, "masked": True},
    {"Nq": 129, "masked": True, "token_mass": True, "reference_mass": "learned", "P": 2},
    {"N": 196, "M": 64, "D": 64, "Dv": 64, "kernel": "linear"},
    {"epsilon": 0.01, "per_sample": True, "iterations": 20},
    {"iterations": 0, "token_mass": True, "N": 31},
]
for options in problems:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        arguments = random_problem(1, dtype=dtype, **options)
        for name in ("set_attention", "set_pooling", "transport_plan"):
            assert_as_exact_as_definition(getattr(setformer_ext, name), arguments)
result = setformer_ext._C.cpu_isa()
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", _C.cpu_isas_supported())
def test_as_exact_as_the_definition(name: str) -> None:
    assert fresh(CHECK, SETFORMER_CPU_ISA=name) == name


def test_the_best_is_the_default() -> None:
    supported = _C.cpu_isas_supported()
    assert supported[0] == "baseline"
    code = "import setformer_ext; result = setformer_ext._C.cpu_isa()"
    assert fresh(code, SETFORMER_CPU_ISA="") == supported[-1]


@pytest.mark.slow
def test_a_name_that_is_none() -> None:
    code = """
    import torch, setformer_ext
    x = torch.ones(1, 1, 3, 2)
    try:
        setformer_ext.set_attention(None, x, x, x)
    except ValueError as error:
        result = str(error)
    """
    message = fresh(code, SETFORMER_CPU_ISA="avx9000")
    assert "SETFORMER_CPU_ISA must be one of: " + " ".join(_C.cpu_isas_supported()) in message
    assert "'avx9000'" in message
