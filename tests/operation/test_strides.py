"""Any layout in memory gives, bit by bit, the result of the contiguous copy."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from conftest import Backend
from setformer_ext.cli.selftest.problems import (
    Arguments,
    differentiable,
    output_gradient,
    random_problem,
    run,
)


def transposed(x: Tensor) -> Tensor:
    """Equal to x, its dimensions in memory in reverse order."""
    order = tuple(reversed(range(x.ndim)))
    return x.permute(order).contiguous().permute(order)


def sliced(x: Tensor) -> Tensor:
    """Equal to x, every other entry of a larger tensor along each dimension, off its start."""
    larger = x.new_zeros([2 * size + 1 for size in x.shape])
    if larger.is_floating_point():
        larger.fill_(torch.nan)  # what is between must not be read
    view = larger[tuple(slice(1, None, 2) for _ in x.shape)]
    return view.copy_(x)


def heads_last(x: Tensor) -> Tensor:
    """Equal to x, in memory as a linear layer leaves it: [B, N, H, D]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2) if x.ndim == 4 else transposed(x)


def offset(x: Tensor) -> Tensor:
    """Equal to x, not aligned to more than its own entries."""
    return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) if x.numel() else x


LAYOUTS = [transposed, sliced, heads_last, offset]


def problem(backend: Backend, **options: object) -> Arguments:
    return random_problem(
        3,
        H=2,
        iterations=2,
        masked=True,
        token_mass=True,
        bandwidth="learned",
        epsilon="learned",
        P=2,
        device=backend.device,
        **options,
    )


def assert_same(function: Callable[..., Tensor], arguments: Arguments, strided: Arguments) -> None:
    """To the bit, but for a plan's gradient, whose sums are torch's."""
    grad_output = output_gradient(function, arguments)
    expected = run(function, arguments, grad_output)
    results = run(function, strided, transposed(grad_output))
    for name, x in expected.items():
        if function.__name__ == "transport_plan" and name != "output":
            torch.testing.assert_close(results[name], x, msg=name)
        else:
            assert torch.equal(results[name], x), name


@pytest.mark.parametrize("function", ["set_attention", "set_pooling", "transport_plan"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [
        {"reference_mass": "learned"},
        {"per_sample": True, "reference_mass": "per-sample", "Nq": 17},
        {"kernel": "linear", "N": 1, "M": 1},
    ],
    ids=str,
)
def test_layout(
    backend: Backend,
    options: dict,
    layout: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    function: str,
) -> None:
    arguments = problem(backend, dtype=dtype, **options)
    strided = {name: layout(x) if isinstance(x, Tensor) else x for name, x in arguments.items()}
    assert_same(getattr(backend, function), arguments, strided)


@pytest.mark.parametrize("dimension", range(4))
def test_expanded_inputs(backend: Backend, dimension: int) -> None:
    """Stride 0 in every dimension that may have one, of all tensors at once: each has its own."""
    arguments = problem(backend, per_sample=True, reference_mass="per-sample", Nq=17)
    expanded = {
        name: arguments[name].narrow(dimension, 0, 1).expand_as(arguments[name])
        for name in (*differentiable(arguments), "mask", "query_mask")
        if dimension < arguments[name].ndim
    }
    contiguous = {name: x.contiguous() for name, x in expanded.items()}
    assert_same(backend.set_attention, arguments | contiguous, arguments | expanded)


def test_expanded_output_gradient(backend: Backend) -> None:
    """sum().backward() hands down a gradient of stride 0."""
    arguments = problem(backend)
    one = torch.ones((), dtype=torch.float64, device=backend.device)
    shape = output_gradient(backend.set_attention, arguments).shape
    expected = run(backend.set_attention, arguments, one.expand(shape).contiguous())
    for name, x in run(backend.set_attention, arguments, one.expand(shape)).items():
        assert torch.equal(x, expected[name]), name


def test_query_key_and_value_in_one_tensor(backend: Backend) -> None:
    """The usual fused projection [B, N, 3, H, D], each a slice of it."""
    fused = torch.randn(2, 33, 3, 3, 8, dtype=torch.float64, device=backend.device)
    query, key, value = fused.permute(2, 0, 3, 1, 4).unbind(0)
    arguments = random_problem(0, device=backend.device) | {
        "query": query, "key": key, "value": value,
    }  # fmt: skip
    contiguous = {
        name: x.contiguous() if isinstance(x, Tensor) else x for name, x in arguments.items()
    }
    assert_same(backend.set_attention, contiguous, arguments)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("cross", [False, True])
def test_results_lie_in_memory_as_their_inputs(
    backend: Backend, gradient: bool, cross: bool
) -> None:
    """Heads of a token side by side stay so: what joins them for a linear layer copies nothing."""
    arguments = random_problem(0, dtype=torch.float32, Nq=5 if cross else None)
    tokens = ("query", "key", "value") if cross else ("key", "value")
    for name in tokens:
        laid_out = heads_last(arguments[name]).to(backend.device)
        arguments[name] = laid_out.requires_grad_(gradient)
    arguments["reference"] = arguments["reference"].to(backend.device)
    output = backend.set_attention(**arguments)
    assert output.transpose(1, 2).is_contiguous()
    if gradient:
        for grad in torch.autograd.grad(output.sum(), [arguments[name] for name in tokens]):
            assert grad.transpose(1, 2).is_contiguous()
