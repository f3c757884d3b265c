"""Bad input: one ValueError or TypeError that names the argument, what was expected, what came."""

import re

import pytest
import torch

from conftest import BACKENDS, Backend
from setformer_ext.cli.selftest.problems import Arguments, call, random_problem
from setformer_ext.functional import DEFAULTS

# B = 2, H = 6, N = 9, Nq = 4, M = 5, D = 32, Dv = 3
SHAPES = {"B": 2, "H": 6, "N": 9, "Nq": 4, "M": 5, "D": 32, "Dv": 3}


def problem(backend: Backend, **options: object) -> Arguments:
    return random_problem(
        0,
        **SHAPES,
        masked=True,
        token_mass=True,
        reference_mass="learned",
        P=2,
        dtype=torch.float32,
        device=backend.device,
        **options,
    )


def few(backend: Backend) -> Arguments:
    """Without options: what the compiled module checks alone."""
    left_out = ("mask", "query_mask", "position_bandwidth")
    return {
        name: x
        for name, x in problem(backend).items()
        if name not in left_out and not name.endswith(("mass", "positions"))
    }


def ones(*shape: int, **options: object) -> torch.Tensor:
    return torch.ones(shape, **options)


F64, F16, INT, META = torch.float64, torch.float16, torch.int64, {"device": "meta"}
REFERENCE_SHAPE = "[H=6, M, D=32] or [B=2, H=6, M, D=32]"
MASS_SHAPE = "[H=6, M=5] or [B=2, H=6, M=5]"

# Of what the other functions take.
TAKEN = {
    "set_pooling": {"key", "value", "reference", *DEFAULTS},
    "transport_plan": {"key", "reference", *DEFAULTS},
}

# argument: bad value, error, what the message must say was expected, and what came
CASES = [
    # rank and size
    ("key", ones(9, 32), ValueError, "[B, H, N, D]", "[9, 32]"),
    ("key", ones(2, 6, 9, 0), ValueError, "D >= 1", "[2, 6, 9, 0]"),
    ("query", ones(2, 6, 4), ValueError, "[B=2, H=6, Nq, D=32]", "[2, 6, 4]"),
    ("query", ones(2, 6, 4, 31), ValueError, "[B=2, H=6, Nq, D=32]", "[2, 6, 4, 31]"),
    ("query", ones(3, 6, 4, 32), ValueError, "[B=2, H=6, Nq, D=32]", "[3, 6, 4, 32]"),
    ("value", ones(2, 6, 9), ValueError, "[B=2, H=6, N=9, Dv]", "[2, 6, 9]"),
    ("value", ones(2, 6, 8, 3), ValueError, "[B=2, H=6, N=9, Dv]", "[2, 6, 8, 3]"),
    ("value", ones(2, 1, 9, 3), ValueError, "[B=2, H=6, N=9, Dv]", "[2, 1, 9, 3]"),
    ("value", ones(2, 6, 9, 0), ValueError, "Dv >= 1", "[2, 6, 9, 0]"),
    ("reference", ones(6, 49, 64), ValueError, REFERENCE_SHAPE, "[6, 49, 64]"),
    ("reference", ones(5, 5, 32), ValueError, REFERENCE_SHAPE, "[5, 5, 32]"),
    ("reference", ones(1, 6, 5, 32), ValueError, REFERENCE_SHAPE, "[1, 6, 5, 32]"),
    ("reference", ones(5, 32), ValueError, REFERENCE_SHAPE, "[5, 32]"),
    ("reference", ones(6, 0, 32), ValueError, "M >= 1", "[6, 0, 32]"),
    ("mask", ones(9, dtype=torch.bool), ValueError, "[B=2, N=9]", "[9]"),
    ("mask", ones(2, 8, dtype=torch.bool), ValueError, "[B=2, N=9]", "[2, 8]"),
    ("mask", ones(2, 6, 9, dtype=torch.bool), ValueError, "[B=2, N=9]", "[2, 6, 9]"),
    ("query_mask", ones(2, 9, dtype=torch.bool), ValueError, "[B=2, Nq=4]", "[2, 9]"),
    ("token_mass", ones(2, 9), ValueError, "[B=2, H=6, N=9]", "[2, 9]"),
    ("token_mass", ones(2, 6, 4), ValueError, "[B=2, H=6, N=9]", "[2, 6, 4]"),
    ("reference_mass", ones(5), ValueError, MASS_SHAPE, "[5]"),
    ("reference_mass", ones(6, 9), ValueError, MASS_SHAPE, "[6, 9]"),
    ("reference_mass", ones(1, 6, 5), ValueError, MASS_SHAPE, "[1, 6, 5]"),
    ("bandwidth", ones(5), ValueError, "[H=6]", "[5]"),
    ("bandwidth", ones(6, 1, 1), ValueError, "[H=6]", "[6, 1, 1]"),
    ("epsilon", ones(2), ValueError, "[H=6]", "[2]"),
    ("epsilon", ones(2, 6), ValueError, "[H=6]", "[2, 6]"),
    ("token_positions", ones(9), ValueError, "[N=9, P]", "[9]"),
    ("token_positions", ones(8, 2), ValueError, "[N=9, P]", "[8, 2]"),
    ("token_positions", ones(9, 4), ValueError, "1, 2 or 3", "[9, 4]"),
    ("token_positions", ones(9, 0), ValueError, "1, 2 or 3", "[9, 0]"),
    ("reference_positions", ones(4, 2), ValueError, "[M=5, P=2]", "[4, 2]"),
    ("reference_positions", ones(5, 3), ValueError, "[M=5, P=2]", "[5, 3]"),
    ("query_positions", ones(9, 2), ValueError, "[Nq=4, P=2]", "[9, 2]"),
    ("query_positions", ones(4, 1), ValueError, "[Nq=4, P=2]", "[4, 1]"),
    # type
    ("key", ones(2, 6, 9, 32, dtype=INT), TypeError, "float", "int64"),
    ("key", ones(2, 6, 9, 32, dtype=torch.complex64), TypeError, "float", "complex64"),
    ("key", [[1.0]], TypeError, "a tensor", "list"),
    ("key", None, TypeError, "a tensor", "NoneType"),
    ("query", ones(2, 6, 4, 32, dtype=F64), TypeError, "float32", "float64"),
    ("query", "key", TypeError, "a tensor", "str"),
    ("value", None, TypeError, "a tensor", "NoneType"),
    ("value", ones(2, 6, 9, 3, dtype=F16), TypeError, "float32", "float16"),
    ("value", ones(2, 6, 9, 3, dtype=INT), TypeError, "float32", "int64"),
    ("reference", ones(6, 5, 32, dtype=torch.bfloat16), TypeError, "float32", "bfloat16"),
    ("reference", ones(6, 5, 32, dtype=INT), TypeError, "float32", "int64"),
    ("mask", ones(2, 9), TypeError, "bool", "float32"),
    ("mask", ones(2, 9, dtype=INT), TypeError, "bool", "int64"),
    ("mask", ones(2, 9, dtype=torch.uint8), TypeError, "bool", "uint8"),
    ("query_mask", ones(2, 4, dtype=INT), TypeError, "bool", "int64"),
    ("token_mass", ones(2, 6, 9, dtype=INT), TypeError, "float", "int64"),
    ("reference_mass", ones(6, 5, dtype=INT), TypeError, "float", "int64"),
    ("bandwidth", "wide", TypeError, "a number or a tensor", "str"),
    ("bandwidth", ones(6, dtype=INT), TypeError, "float", "int64"),
    ("epsilon", None, TypeError, "a number or a tensor", "NoneType"),
    ("epsilon", ones(6, dtype=torch.bool), TypeError, "float", "bool"),
    ("iterations", 5.0, TypeError, "an int", "float"),
    ("iterations", True, TypeError, "an int", "bool"),
    ("iterations", torch.tensor(5), TypeError, "an int", "Tensor"),
    ("iterations", "5", TypeError, "an int", "str"),
    ("token_positions", ones(9, 2, dtype=INT), TypeError, "float", "int64"),
    ("position_bandwidth", "1", TypeError, "a number", "str"),
    # layout
    ("key", ones(2, 6, 9, 32).to_sparse(), ValueError, "a dense tensor", "torch.sparse_coo"),
    ("token_mass", ones(2, 6, 9).to_sparse(), ValueError, "a dense tensor", "torch.sparse_coo"),
    # range
    ("bandwidth", 0.0, ValueError, "> 0", "0.0"),
    ("bandwidth", -1.0, ValueError, "> 0", "-1.0"),
    ("bandwidth", float("nan"), ValueError, "> 0", "nan"),
    ("bandwidth", float("inf"), ValueError, "finite", "inf"),
    ("epsilon", 0.0, ValueError, "> 0", "0.0"),
    ("epsilon", -0.1, ValueError, "> 0", "-0.1"),
    ("epsilon", float("nan"), ValueError, "> 0", "nan"),
    ("epsilon", float("inf"), ValueError, "finite", "inf"),
    ("epsilon", 1e-300, ValueError, "> 0 and finite as float32", "1e-300"),
    ("bandwidth", 1e300, ValueError, "> 0 and finite as float32", "1e+300"),
    ("iterations", -1, ValueError, ">= 0", "-1"),
    ("iterations", 2**62, ValueError, "< 2^31", str(2**62)),
    ("kernel", "cosine", ValueError, "'gaussian' or 'linear'", "'cosine'"),
    ("position_bandwidth", 0.0, ValueError, "> 0", "0.0"),
    ("position_bandwidth", -2.0, ValueError, "> 0", "-2.0"),
    ("position_bandwidth", float("nan"), ValueError, "> 0", "nan"),
    # positions: gradients, and all or nothing
    ("token_positions", ones(9, 2, requires_grad=True), ValueError, "detach", "requires_grad"),
    ("reference_positions", ones(5, 2, requires_grad=True), ValueError, "detach", "requires_grad"),
    ("query_positions", ones(4, 2, requires_grad=True), ValueError, "detach", "requires_grad"),
    ("token_positions", None, ValueError, "reference_positions", "None"),
    ("reference_positions", None, ValueError, "token_positions", "None"),
    ("position_bandwidth", None, ValueError, "positions", "None"),
    # device
    ("query", ones(2, 6, 4, 32, **META), ValueError, "on the key's device", "meta"),
    ("value", ones(2, 6, 9, 3, **META), ValueError, "on the key's device", "meta"),
    ("reference", ones(6, 5, 32, **META), ValueError, "on the key's device", "meta"),
    ("mask", ones(2, 9, dtype=torch.bool, **META), ValueError, "on the key's device", "meta"),
    ("query_mask", ones(2, 4, dtype=torch.bool, **META), ValueError, "on the key's device", "meta"),
    ("token_mass", ones(2, 6, 9, **META), ValueError, "on the key's device", "meta"),
    ("reference_mass", ones(6, 5, **META), ValueError, "on the key's device", "meta"),
    ("bandwidth", ones(6, **META), ValueError, "on the key's device", "meta"),
    ("epsilon", ones(6, **META), ValueError, "on the key's device", "meta"),
    ("token_positions", ones(9, 2, **META), ValueError, "on the key's device", "meta"),
    ("query_positions", ones(4, 2, **META), ValueError, "on the key's device", "meta"),
    ("reference_positions", ones(5, 2, **META), ValueError, "on the key's device", "meta"),
]

# values that are read only where that needs no waiting for a GPU
VALUES = [
    ("bandwidth", torch.tensor([1.0, 1, 1, 1, 1, -2]), ValueError, "> 0", "-2"),
    ("epsilon", torch.tensor(0.0), ValueError, "> 0", "0"),
    ("epsilon", torch.tensor([1.0, 1, 0, 1, 1, 1]), ValueError, "> 0", "0"),
    ("token_mass", -ones(2, 6, 9), ValueError, ">= 0", "-1"),
    ("reference_mass", -ones(6, 5), ValueError, "> 0", "-1"),
    ("reference_mass", 0 * ones(6, 5), ValueError, "> 0", "0"),
    ("bandwidth", torch.tensor(float("inf")), ValueError, "finite", "inf"),
    ("epsilon", torch.full((6,), float("inf")), ValueError, "finite", "inf"),
    ("epsilon", torch.tensor(1e-60, dtype=F64), ValueError, "> 0", "1e-60"),
    ("reference_mass", ones(6, 5, dtype=F64) * 1e-60, ValueError, "> 0", "0"),
]


def assert_refused(
    function: object, arguments: Arguments, error: type, name: str, expected: str, came: str
) -> None:
    """`set_attention: key must ... EXPECTED ..., got ... CAME ...`, of exactly that class."""
    message = rf"^{function.__name__}: {name} must .*{re.escape(expected)}.*got .*{re.escape(came)}"
    with pytest.raises(error, match=message) as caught:
        call(function, arguments)
    assert caught.type is error


def cases(cases: list[tuple]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("function", "argument", "bad", "error", "expected", "came"),
        [
            pytest.param(function, *case, id=f"{function} {case[0]} {case[4]}")
            for function in ("set_attention", "set_pooling", "transport_plan")
            for case in cases
            if function == "set_attention" or case[0] in TAKEN[function]
        ],
    )


@cases(CASES)
def test_refused(
    backend: Backend,
    function: str,
    argument: str,
    bad: object,
    error: type,
    expected: str,
    came: str,
) -> None:
    if isinstance(bad, torch.Tensor) and bad.device.type != "meta":
        bad = bad.to(backend.device)
    arguments = problem(backend) | {argument: bad}
    assert_refused(getattr(backend, function), arguments, error, argument, expected, came)


def of_few(cases: list[tuple]) -> list[tuple]:
    return [case for case in cases if "position" not in case[0]]


@cases(of_few(CASES))
def test_refused_without_other_options(
    function: str, argument: str, bad: object, error: type, expected: str, came: str
) -> None:
    """In calls that the compiled module checks; one error, and no other behind it."""
    cpu = BACKENDS["cpu"]()
    arguments = few(cpu) | {argument: bad}
    # Sizes that a mass or a position would have told are unknown here.
    assert_refused(getattr(cpu, function), arguments, error, argument, "", "")
    with pytest.raises(error) as caught:
        call(getattr(cpu, function), arguments)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@cases(of_few(VALUES))
def test_values_refused_without_other_options(
    function: str, argument: str, bad: torch.Tensor, error: type, expected: str, came: str
) -> None:
    cpu = BACKENDS["cpu"]()
    assert_refused(
        getattr(cpu, function), few(cpu) | {argument: bad}, error, argument, expected, ""
    )


@cases(VALUES)
def test_values_refused(
    backend: Backend,
    function: str,
    argument: str,
    bad: torch.Tensor,
    error: type,
    expected: str,
    came: str,
) -> None:
    """Tensors in the host's memory are read; those of a GPU give NaN, see test_numpy.py."""
    arguments = problem(backend) | {argument: bad.to(backend.device)}
    if backend.device != "cpu":
        assert call(getattr(backend, function), arguments).isnan().any()
        return
    assert_refused(getattr(backend, function), arguments, error, argument, expected, came)


def test_query_arguments_without_a_query(backend: Backend) -> None:
    """In the self case they have no meaning: ignoring them would hide a mistake."""
    for name in ("query_mask", "query_positions"):
        arguments = problem(backend)
        arguments = {
            other: x for other, x in arguments.items() if other == name or "query" not in other
        } | {"query": None}
        assert_refused(backend.set_attention, arguments, ValueError, name, "None", "")


def test_key_decides_device_and_type(backend: Backend) -> None:
    """The others are held against the key, also when the key is the odd one."""
    odd = problem(backend) | {"key": ones(2, 6, 9, 32, dtype=F64, device=backend.device)}
    assert_refused(backend.set_attention, odd, TypeError, "query", "float64", "float32")
    odd = problem(backend) | {"key": ones(2, 6, 9, 32, **META)}
    assert_refused(backend.set_attention, odd, ValueError, "query", "meta", backend.device)


def test_what_the_errors_ask_for_is_accepted(backend: Backend) -> None:
    """Guards the tests above: the problem they spoil is a good one."""
    for function in (backend.set_attention, backend.set_pooling, backend.transport_plan):
        assert call(function, problem(backend)).isfinite().all()
    device = backend.device
    for good in (
        {"iterations": 0},
        {"epsilon": 1},
        {"bandwidth": 2},
        {"epsilon": torch.tensor(0.5, device=device)},
        {"reference": ones(2, 6, 5, 32, device=device)},
        {"reference_mass": ones(2, 6, 5, device=device)},
        {"query_positions": None},
        {"token_mass": 0 * ones(2, 6, 9, device=device)},
        {"position_bandwidth": 3},
    ):
        assert call(backend.set_attention, problem(backend) | good).isfinite().all(), good


def test_errors_come_before_work(backend: Backend) -> None:
    """A bad option is refused for empty tensors too."""
    arguments = random_problem(0, B=0, device=backend.device) | {"epsilon": -1.0}
    assert_refused(backend.set_attention, arguments, ValueError, "epsilon", "> 0", "-1.0")
