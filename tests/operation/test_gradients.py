"""First and second derivatives in float64 against finite differences."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from conftest import Backend
from setformer_ext import reference as definition
from setformer_ext import set_attention
from setformer_ext.cli.selftest.problems import (
    call,
    differentiable,
    generator,
    move,
    random_problem,
    used,
)

SMALL = {"B": 2, "H": 2, "N": 5, "M": 3, "D": 2, "Dv": 2, "epsilon": 0.5, "iterations": 2}

OPTIONS = [
    {},
    {"iterations": 0},
    {"iterations": 1, "kernel": "linear"},
    {"iterations": 20, "B": 1, "H": 1},
    {"masked": True, "token_mass": True, "reference_mass": "learned"},
    {"Nq": 4, "masked": True, "token_mass": True, "reference_mass": "per-sample"},
    {"Nq": 1, "kernel": "linear", "P": 1},
    {"per_sample": True, "P": 2},
    {"bandwidth": "learned", "epsilon": "learned"},
    {"Nq": 3, "per_sample": True, "bandwidth": "learned", "epsilon": "learned", "P": 3},
    {"kernel": "linear", "epsilon": "learned", "reference_mass": "learned"},
    {"N": 1, "M": 1},
    {"N": 1, "M": 4, "token_mass": True},
    {"N": 6, "M": 1, "reference_mass": "learned"},
]


def function_of_tensors(
    backend: Backend, function: str, options: dict
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    arguments = random_problem(4, **(SMALL | options), device=backend.device)
    if "token_mass" in arguments:
        # finite differences step below 0: test_derivative_by_a_mass_of_zero is for that
        arguments["token_mass"] = arguments["token_mass"] + 0.1
    f = getattr(backend, function)
    names = [name for name in differentiable(arguments) if used(f, name)]

    def of_tensors(*tensors: Tensor) -> Tensor:
        return call(f, arguments | dict(zip(names, tensors, strict=True)))

    return of_tensors, [arguments[name].clone().requires_grad_() for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("function", ["set_attention", "set_pooling", "transport_plan"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_first(backend: Backend, function: str, options: dict) -> None:
    """Of all entries; along random directions where every launch takes its time."""
    of_tensors, tensors = function_of_tensors(backend, function, options)
    assert torch.autograd.gradcheck(of_tensors, tensors, fast_mode=backend.emulated)


@pytest.mark.slow
@pytest.mark.parametrize("function", ["set_attention", "set_pooling", "transport_plan"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_second(backend: Backend, function: str, options: dict) -> None:
    """Along random directions: the full second derivative of every option takes minutes."""
    if backend.emulated and function != "set_attention":
        pytest.skip("second derivatives are plain torch on every device")
    smaller = {"B": 1, "H": 2, "N": 4, "Dv": 1}
    of_tensors, tensors = function_of_tensors(backend, function, smaller | options)
    assert torch.autograd.gradgradcheck(of_tensors, tensors, fast_mode=True)


def test_second_in_full(backend: Backend) -> None:
    options = {
        "B": 1, "H": 1, "N": 3, "Nq": 2, "M": 2, "Dv": 1, "iterations": 2, "token_mass": True,
        "reference_mass": "learned", "bandwidth": "learned", "epsilon": "learned",
    }  # fmt: skip
    of_tensors, tensors = function_of_tensors(backend, "set_attention", options)
    assert torch.autograd.gradgradcheck(of_tensors, tensors)


@pytest.mark.parametrize("function", ["set_attention", "set_pooling", "transport_plan"])
@pytest.mark.parametrize(
    "options", [{}, {"Nq": 3, "token_mass": True, "epsilon": "learned"}], ids=str
)
def test_second_of_a_nonlinear_loss(backend: Backend, function: str, options: dict) -> None:
    """As in a gradient penalty: the gradient handed down depends on the inputs as well."""
    ours, tensors = function_of_tensors(backend, function, options)
    plain = replace(backend, **{function: getattr(definition, function)})
    of_definition, _ = function_of_tensors(plain, function, options)

    def penalty(f: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(f(*tensors).square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), tensors)

    for x, y in zip(penalty(ours), penalty(of_definition), strict=True):
        # some thousand float64 operations
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11 * y.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("query", [False, True], ids=["self", "cross"])
def test_second_of_half_types_is_computed_in_float32(dtype: torch.dtype, query: bool) -> None:
    """And rounded once: off by no more than the definition in float32, but for that rounding."""
    half = random_problem(
        4, **SMALL | {"N": 9}, Nq=4 if query else None, token_mass=True, dtype=dtype
    )
    names = differentiable(half)

    def second(function: Callable[..., Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """The derivative of <first derivative, direction>, everything given in half precision."""
        arguments, rng = move(half, dtype=dtype), generator(1)

        def direction(x: Tensor) -> Tensor:
            return torch.randn(x.shape, generator=rng).to(half["key"].dtype).to(x.dtype)

        inputs = [arguments[name].requires_grad_() for name in names]
        output = call(function, arguments)
        upstream = direction(output).requires_grad_()
        first = torch.autograd.grad(output, inputs, upstream, create_graph=True)
        leaves = [*inputs, upstream]
        gradients = torch.autograd.grad(first, leaves, [direction(x) for x in first])
        return dict(zip([*names, "upstream"], gradients, strict=True))

    exact = second(definition.set_attention, torch.float64)
    single = second(definition.set_attention, torch.float32)
    for name, found in second(set_attention, dtype).items():
        error, in_single = (found - exact[name]).abs(), (single[name] - exact[name]).abs()
        assert found.dtype == dtype, name
        rounding = torch.finfo(dtype).eps / 2 * exact[name].abs()
        assert (error <= rounding + 4 * in_single.max()).all(), name


def test_only_what_is_asked_for(backend: Backend) -> None:
    """Each gradient alone is that among all, bit by bit."""
    options = {
        "N": 33, "Nq": 17, "M": 7, "masked": True, "token_mass": True, "reference_mass": "learned",
        "bandwidth": "learned", "epsilon": "learned",
    }  # fmt: skip
    of_tensors, tensors = function_of_tensors(backend, "set_attention", options)
    together = torch.autograd.grad(of_tensors(*tensors).square().sum(), tensors)
    for i, expected in enumerate(together):
        alone = [x.detach().requires_grad_(i == j) for j, x in enumerate(tensors)]
        (gradient,) = torch.autograd.grad(of_tensors(*alone).square().sum(), alone[i])
        assert torch.equal(gradient, expected), i


def test_no_gradient_where_none_is_asked_for(backend: Backend) -> None:
    of_tensors, tensors = function_of_tensors(backend, "set_attention", {})
    assert not of_tensors(*(x.detach() for x in tensors)).requires_grad
    with torch.no_grad():
        assert not of_tensors(*tensors).requires_grad


def test_shared_tensors_add_their_gradients(backend: Backend) -> None:
    """Key and value, or key and reference, may be one tensor."""
    x = torch.randn(1, 2, 5, 3, dtype=torch.float64, device=backend.device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: backend.set_attention(x, x, x, x, epsilon=0.5), x)
    assert torch.autograd.gradcheck(
        lambda x: backend.set_attention(x[:, :, :2], x, x, x, epsilon=0.5), x
    )
