"""Scaling to unit length, which is the default: what it computes and what follows from it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import setformer_ext
from conftest import Backend
from exactness import assert_as_exact_as_definition
from lengths import SCALED, what_depends_on_lengths
from setformer_ext import set_attention, set_attention_varlen
from setformer_ext.cli.selftest.problems import call, random_problem, run
from setformer_ext.reference import unit


def problem(**options: Any) -> dict[str, Any]:
    return random_problem(**{"N": 19, "iterations": 2, "normalize": True, **options})


def scaled_by_hand(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same for those who take vectors as they are."""
    by_hand = {
        name: F.normalize(x.double(), dim=-1).to(x.dtype) if name in SCALED and x is not None else x
        for name, x in arguments.items()
    }
    return by_hand | {"normalize": False}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("queries", [None, 11], ids=["self", "cross"])
@pytest.mark.parametrize("kernel", ["gaussian", "linear"])
def test_as_exact_as_the_definition(
    backend: Backend, kernel: str, queries: int | None, dtype: torch.dtype
) -> None:
    arguments = problem(
        Nq=queries, kernel=kernel, masked=True, token_mass=True, dtype=dtype, device=backend.device
    )
    assert_as_exact_as_definition(backend.set_attention, arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "options",
    [
        {"D": 40, "Nq": 11, "per_sample": True},
        {"D": 129, "M": 70, "N": 5, "iterations": 0},
        {"N": 300, "D": 72, "H": 1, "B": 1},
        {"B": 1, "per_sample": True, "kernel": "linear", "D": 33},
        {"bandwidth": "learned", "epsilon": "learned", "reference_mass": "learned", "P": 2},
    ],
    ids=str,
)
def test_of_any_size(backend: Backend, options: dict[str, Any], dtype: torch.dtype) -> None:
    arguments = problem(masked=True, dtype=dtype, device=backend.device, **options)
    assert_as_exact_as_definition(backend.set_attention, arguments)


# Heads of half types that scale their rows on the chip: a warp's room has rows of 32 or of 64
# columns; longer rows are scaled before.
ON_CHIP: dict[str, dict[str, Any]] = {
    "rows of 32 columns": {"N": 150, "D": 32, "M": 33},
    "rows of 64 columns": {"N": 70, "D": 57, "M": 57},
    "wide values": {"N": 33, "D": 24, "Dv": 60, "reference_mass": "learned"},
    "queries": {"N": 33, "D": 40, "Nq": 70, "per_sample": True},
    "in logarithms": {"N": 70, "D": 32, "epsilon": 0.03},
    "linear kernel": {"N": 70, "D": 32, "kernel": "linear"},
    "rows of 72 columns": {"N": 70, "D": 72, "Nq": 20},
    "backward alone": {"N": 1500, "D": 33, "B": 1, "H": 1},
    "some heads on the chip": {"N": 70, "D": 33, "epsilon": "learned", "bandwidth": "learned"},
    "more references than on the chip": {"N": 70, "D": 33, "M": 140},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ON_CHIP)
def test_on_the_chip(backend: Backend, name: str, dtype: torch.dtype) -> None:
    options = {"masked": True, "token_mass": True, "P": 2} | ON_CHIP[name]
    arguments = problem(dtype=dtype, device=backend.device, **options)
    if options.get("epsilon") == "learned":
        with torch.no_grad():
            arguments["epsilon"].copy_(torch.tensor([0.1, 0.03, 0.2]))
    assert_as_exact_as_definition(backend.set_attention, arguments)


def test_of_any_strides(backend: Backend) -> None:
    arguments = problem(Nq=11, D=40, dtype=torch.float32, device=backend.device)
    upstream = torch.ones(2, 3, 11, 5, device=backend.device).cumsum(-1)
    expected = run(backend.set_attention, arguments, upstream)
    for name in SCALED:
        arguments[name] = arguments[name].mT.contiguous().mT
    for name, found in run(backend.set_attention, arguments, upstream).items():
        torch.testing.assert_close(found, expected[name], msg=name)


@pytest.mark.parametrize("sizes", [{"N": 0}, {"B": 0}])
def test_nothing_to_scale(backend: Backend, sizes: dict[str, int]) -> None:
    arguments = problem(device=backend.device, **sizes)
    output = backend.set_attention(**arguments)
    assert output.shape[2] == sizes.get("N", 19)


@pytest.mark.parametrize("function", ["set_attention", "set_pooling", "transport_plan"])
@pytest.mark.parametrize("module", [setformer_ext, setformer_ext.reference])
def test_as_scaled_by_hand(module: Any, function: str) -> None:
    arguments = problem(Nq=11, masked=True, P=2, per_sample=True)
    expected = call(getattr(module, function), scaled_by_hand(arguments))
    torch.testing.assert_close(call(getattr(module, function), arguments), expected)


def test_it_is_the_default() -> None:
    arguments = problem(Nq=11)
    del arguments["normalize"]
    for module in (setformer_ext, setformer_ext.reference):
        for name in ("set_attention", "set_pooling", "transport_plan"):
            function = getattr(module, name)
            expected = call(function, scaled_by_hand(arguments))
            torch.testing.assert_close(call(function, arguments), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cross", [False, True])
def test_packed_sequences(backend: Backend, cross: bool, dtype: torch.dtype) -> None:
    arguments = problem(B=1, Nq=19 if cross else None, dtype=dtype, device=backend.device)
    packed = {
        name: x.squeeze(0).transpose(0, 1)
        if name in ("query", "key", "value") and x is not None
        else x
        for name, x in arguments.items()
    }
    ends = torch.tensor([0, 7, 19], device=backend.device)
    output = set_attention_varlen(
        **packed, cu_seqlens=ends, cu_seqlens_query=ends if cross else None
    )
    for part in (slice(7), slice(7, 19)):
        own = {
            name: arguments[name][:, :, part]
            for name in ("query", "key", "value")
            if arguments[name] is not None
        }
        expected = set_attention(**arguments | own)
        assert torch.equal(output[part].transpose(0, 1).unsqueeze(0), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("queries", [None, 11], ids=["self", "cross"])
@pytest.mark.parametrize("sizes", [{}, {"D": 60, "N": 90}], ids=["small", "larger"])
def test_lengths_make_no_difference(
    backend: Backend, sizes: dict[str, int], queries: int | None, dtype: torch.dtype
) -> None:
    arguments = problem(Nq=queries, dtype=dtype, device=backend.device, masked=True, **sizes)
    assert not list(what_depends_on_lengths(backend.set_attention, arguments))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zero_vectors_stay_zero(backend: Backend, dtype: torch.dtype) -> None:
    arguments = problem(dtype=dtype, device=backend.device)
    for name in ("key", "reference"):
        arguments[name][..., 1, :] = 0
    expected = set_attention(**scaled_by_hand(arguments))
    results = run(set_attention, arguments, torch.ones_like(expected))
    torch.testing.assert_close(results["output"], expected, rtol=4e-2, atol=1e-2)
    # Not divided by a length of nothing: no larger than where lengths are about 1.
    for name in ("key", "reference"):
        gradient = results[name].abs()
        assert gradient.isfinite().all()
        assert gradient[..., 1, :].max() <= 10 * gradient.max(-2).values.max()


def test_what_masked_tokens_hold_gets_no_gradient(backend: Backend) -> None:
    arguments = problem(Nq=11, masked=True, device=backend.device)
    upstream = torch.ones(2, 3, 11, 5, dtype=torch.float64, device=backend.device)
    clean = run(backend.set_attention, arguments, upstream)
    for name, mask in (("key", "mask"), ("query", "query_mask")):
        arguments[name] = arguments[name].masked_fill(~arguments[mask][:, None, :, None], torch.nan)
    holed = run(backend.set_attention, arguments, upstream)
    for name, gradient in clean.items():
        assert torch.equal(holed[name], gradient), name


def test_first_and_second_derivatives() -> None:
    key = torch.randn(1, 1, 3, 2, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(1, 2, 2, dtype=torch.float64, requires_grad=True)

    def attend(key: Tensor, reference: Tensor) -> Tensor:
        return set_attention(None, key, key, reference, epsilon=0.5, iterations=2)

    assert torch.autograd.gradcheck(attend, (key, reference))
    assert torch.autograd.gradgradcheck(attend, (key, reference))


def test_compiled_and_under_autocast() -> None:
    arguments = problem(dtype=torch.float32)
    compiled = torch.compile(set_attention, fullgraph=True)
    torch.testing.assert_close(compiled(**arguments), set_attention(**arguments))
    with torch.autocast("cpu", torch.bfloat16):
        output = set_attention(**arguments)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), set_attention(**arguments), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("size", [1e-6, 1e5])
def test_lengths_that_float16_does_not_hold(size: float) -> None:
    """Under autocast float32 keys are scaled before they are cast."""
    arguments = problem(Nq=11, masked=True, dtype=torch.float32)
    expected = set_attention(**arguments)
    for name in SCALED:
        arguments[name] = (size * arguments[name]).requires_grad_()
    arguments["key"].data[~arguments["mask"][:, None].expand(-1, 3, -1)] = torch.nan
    with torch.autocast("cpu", torch.float16):
        output = set_attention(**arguments)
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=0.01)
    for gradient in torch.autograd.grad(output.float().sum(), [arguments[x] for x in SCALED]):
        assert gradient.isfinite().all()


def test_who_comes_from_softmax_attention_gets_more_than_the_mean() -> None:
    """Of vectors of unit variance, whose gaussian kernel vanishes otherwise."""
    torch.manual_seed(0)
    key, value, reference = (torch.randn(s) for s in ((2, 4, 196, 32),) * 2 + ((4, 16, 32),))
    mean = value.mean(2, keepdim=True)
    distance = [
        (set_attention(None, key, value, reference, normalize=normalize) - mean).abs().max()
        for normalize in (True, False)
    ]
    assert distance[0] > 0.01
    assert distance[1] < 1e-6


@pytest.mark.parametrize("given", [1, "yes", None])
def test_other_types_are_refused(given: Any) -> None:
    with pytest.raises(TypeError, match="set_attention: normalize must be a bool, got"):
        set_attention(**problem() | {"normalize": given})


def test_both_derivatives_of_unit_length() -> None:
    """Finite at zero vectors too, whose gradient is as if their length were 1."""
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(unit(x), F.normalize(x, dim=-1))
    assert torch.autograd.gradcheck(unit, x)
    assert torch.autograd.gradgradcheck(unit, x)
    zero = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(1, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(unit(zero), zero, upstream, create_graph=True)
    assert torch.equal(gradient, upstream)
    second = torch.autograd.grad(gradient.square().sum(), (zero, upstream), materialize_grads=True)
    assert all(x.isfinite().all() for x in second)


def test_second_derivatives_beside_a_zero_key() -> None:
    key = torch.randn(1, 1, 4, 3, dtype=torch.float64)
    key[..., 1, :] = 0
    key.requires_grad_()
    reference = torch.randn(1, 2, 3, dtype=torch.float64)
    output = set_attention(None, key, key, reference, iterations=2)
    (gradient,) = torch.autograd.grad(output.square().sum(), key, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), key)
    assert second.isfinite().all()
