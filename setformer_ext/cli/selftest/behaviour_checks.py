"""Checks other than of values: layouts, determinism, edge cases, extremes, errors."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import SetAttention, set_attention, set_pooling, transport_plan
from ...errors import first_line
from .definition_checks import DTYPES
from .outcome import Task, short
from .problems import (
    Arguments,
    call,
    differentiable,
    generator,
    move,
    output_gradient,
    random_mask,
    random_problem,
    run,
    used,
)
from .tolerance import Comparison, largest

SIZES: dict[str, Any] = {"B": 2, "H": 2, "N": 37, "M": 9, "D": 8, "Dv": 8, "iterations": 2}
OPTIONS: dict[str, Any] = {"masked": True, "token_mass": True, "reference_mass": "learned", "P": 2}


def tasks(quick: bool) -> list[Task]:
    """One task for each behaviour, or for each behaviour and type."""
    dtypes = (torch.float32, torch.bfloat16) if quick else DTYPES
    by_type = {"any layout": layouts, "two runs alike": two_runs, "extreme similarities": extremes}
    return [
        *(
            Task(f"{name}, {short(dtype)}", partial(check, quick, dtype), needs=(dtype,))
            for name, check in by_type.items()
            for dtype in dtypes
        ),
        Task("sizes of 0 and no valid token", empty, needs=(torch.float32,)),
        Task("not a number stays in its batch item", not_a_number, needs=(torch.float32,)),
        Task("finite differences", partial(finite_differences, quick), needs=(torch.float64,)),
        Task("the module", module, needs=(torch.float32, torch.bfloat16)),
        Task("wrong arguments are refused", wrong_arguments),
    ]


def count(name: str, wrong: Tensor, note: str) -> Comparison:
    """A comparison that fails if any entry is wrong."""
    return Comparison(name, wrong.sum().item(), 0, note)


def identical(name: str, x: Tensor, y: Tensor) -> Comparison:
    """Bitwise equality, except for the sign of 0; NaNs must be at the same places."""
    return count(name, (x != y) & ~(x.isnan() & y.isnan()), "entries that differ")


def all_identical(name: str, x: dict[str, Tensor], y: dict[str, Tensor]) -> list[Comparison]:
    return [identical(f"{name}, {each}", x[each], y[each]) for each in x]


def forward_and_backward(
    arguments: Arguments, function: Callable[..., Tensor] = set_attention
) -> dict[str, Tensor]:
    """Output and gradients."""
    return run(function, arguments, output_gradient(function, arguments))


def layouts(quick: bool, dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    """Strided, transposed, interleaved and misaligned tensors give the contiguous copy's bits."""

    def strided(x: Tensor) -> Tensor:
        larger = x.new_zeros([2 * size + 1 for size in x.shape])
        if larger.is_floating_point():
            larger.fill_(torch.nan)  # elements in between must not be read
        return larger[tuple(slice(1, None, 2) for _ in x.shape)].copy_(x)

    def misaligned(x: Tensor) -> Tensor:
        return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)

    def transposed(x: Tensor) -> Tensor:
        order = tuple(reversed(range(x.ndim)))
        return x.permute(order).contiguous().permute(order)

    def heads_last(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2) if x.ndim == 4 else x

    # rows of D = 8 or 32 entries are whole 16-byte pieces in every type, rows of 7 are not
    for depth in (8,) if quick else (7, 8, 32):
        sizes = SIZES | {"D": depth, "Dv": depth}
        arguments = random_problem(3, **sizes, **OPTIONS, dtype=dtype, device=device)
        grad_output = output_gradient(set_attention, arguments)
        expected = run(set_attention, arguments, grad_output)
        for layout in (strided, misaligned, transposed, heads_last):
            changed = {n: layout(x) if isinstance(x, Tensor) else x for n, x in arguments.items()}
            results = run(set_attention, changed, layout(grad_output))
            yield from all_identical(f"{layout.__name__} D={depth}", results, expected)
        value = arguments["value"][:, :, :1].expand_as(arguments["value"])
        results = forward_and_backward(arguments | {"value": value})
        expected = forward_and_backward(arguments | {"value": value.contiguous()})
        yield from all_identical(f"expanded D={depth}", results, expected)


def two_runs(quick: bool, dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    """Runs are bitwise the same, whatever the memory of the results held before."""
    for tokens in (37,) if quick else (37, 300, 3137):
        sizes = SIZES | {"N": tokens, "M": 17}
        arguments = random_problem(4, **sizes, **OPTIONS, dtype=dtype, device=device)
        first = forward_and_backward(arguments)
        for _ in range(1 if quick else 4):
            stale = [torch.full((n,), torch.nan, device=device) for n in (1000, 30_000, 1_000_000)]
            del stale
            yield from all_identical(f"N={tokens}", forward_and_backward(arguments), first)


EXTREMES: dict[str, dict[str, Any]] = {
    "similarities of 1e4 / 0.001": {"kernel": "linear", "epsilon": 1e-3, "size": 1e2},
    "epsilon of 0.001": {"kernel": "gaussian", "epsilon": 1e-3, "size": 1.0},
    "underflow": {"kernel": "gaussian", "epsilon": 1e-3, "size": 1e2},
}


def extremes(quick: bool, dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    """Extreme problems give finite outputs and gradients; outputs are averages of the values."""
    for name, options in EXTREMES.items():
        for iterations in (1,) if quick else (0, 1, 5, 20):
            arguments = _extreme_problem(iterations, **options)
            arguments = move(arguments, dtype=dtype, device=device)
            for function in (set_attention, set_pooling):
                label = f"{name}, T={iterations}, {function.__name__}"
                results = forward_and_backward(arguments, function)
                for each, x in results.items():
                    # a float16 gradient may be beyond the type's range, which is no fault of the
                    # kernels
                    in_range = dtype != torch.float16 or each == "output"
                    bad = ~x.isfinite() if in_range else x.isnan()
                    yield count(f"{label}, {each}", bad, "entries not finite")
                bound = largest(arguments["value"]) * (1 + 100 * torch.finfo(dtype).eps)
                error = largest(results["output"])
                note = "largest output; allowed is the largest value"
                yield Comparison(f"{label}, output", error, bound, note)


def _extreme_problem(iterations: int, *, kernel: str, epsilon: float, size: float) -> Arguments:
    """Keys and references of one length, with one token on one reference."""
    arguments = random_problem(
        11, **SIZES | {"iterations": iterations}, **OPTIONS, kernel=kernel, epsilon=epsilon
    )
    for name in ("key", "reference"):
        arguments[name] = size * torch.nn.functional.normalize(arguments[name], dim=-1)
    arguments["key"][:, :, 0] = arguments["reference"][:, 0]
    return arguments


def empty(device: torch.device) -> Iterator[Comparison]:
    """No batch items, heads, tokens or queries; and no valid token gives zeros everywhere."""
    given: dict[str, Any] = {"dtype": torch.float32, "device": device}
    for options in ({"B": 0}, {"H": 0}, {"N": 0}, {"Nq": 0}, {"N": 0, "Nq": 5}):
        arguments = random_problem(0, **SIZES | options, token_mass=True, **given)
        for function in (set_attention, set_pooling, transport_plan):
            for each, x in forward_and_backward(arguments, function).items():
                # without tokens the references pool nothing
                wrong = x.isnan() if "N" not in options else x != 0
                yield count(f"{options}, {function.__name__}, {each}", wrong, "wrong entries")
    arguments = random_problem(0, **SIZES, **OPTIONS, **given)
    arguments["mask"] = torch.zeros_like(arguments["mask"])
    arguments["key"] = torch.full_like(arguments["key"], torch.nan)  # padding may hold anything
    for each, x in forward_and_backward(arguments).items():
        yield count(f"no valid token, {each}", x != 0, "entries not 0")


def not_a_number(device: torch.device) -> Iterator[Comparison]:
    """NaN and infinity in one batch item change no bit of the others."""
    sizes = SIZES | {"B": 3, "H": 1, "Nq": 17}
    arguments = random_problem(
        2, **sizes, per_sample=True, token_mass=True, dtype=torch.float32, device=device
    )
    clean = forward_and_backward(arguments)
    for name in ("query", "key", "value", "reference"):
        for poison in (torch.nan, torch.inf):
            poisoned = arguments | {name: arguments[name].clone()}
            poisoned[name][1, 0].view(-1)[3] = poison
            for each, x in forward_and_backward(poisoned).items():
                label = f"{poison} in {name}, {each}"
                yield identical(label, x[[0, 2]], clean[each][[0, 2]])


def finite_differences(quick: bool, device: torch.device) -> Iterator[Comparison]:
    """torch.autograd.gradcheck in float64; the second derivative along random directions."""
    options = OPTIONS | {"bandwidth": "learned", "P": 0, "epsilon": "learned"}
    sizes = SIZES | {"B": 1, "N": 4, "M": 3, "D": 2, "Dv": 1}
    arguments = random_problem(4, **sizes, **options, device=device)
    arguments["token_mass"] = arguments["token_mass"] + 0.1  # finite differences may go below 0

    def of_tensors(function: Callable[..., Tensor], names: list[str], *tensors: Tensor) -> Tensor:
        return call(function, arguments | dict(zip(names, tensors, strict=True)))

    for function in (set_attention, set_pooling):
        names = [name for name in differentiable(arguments) if used(function, name)]
        tensors = [arguments[name].requires_grad_() for name in names]
        checked = partial(of_tensors, function, names)
        # they raise with both Jacobians if they fail; second derivatives are computed by torch
        first = torch.autograd.gradcheck(checked, tensors, fast_mode=quick)
        second = torch.autograd.gradgradcheck(checked, tensors, fast_mode=True, nondet_tol=1e-12)
        yield Comparison(f"{function.__name__}, first derivative", float(not first), 0)
        yield Comparison(f"{function.__name__}, second derivative", float(not second), 0)


def module(device: torch.device) -> Iterator[Comparison]:
    """SetAttention, plain and under autocast: finite, and a gradient for every parameter."""
    torch.manual_seed(0)
    attention = SetAttention(16, num_heads=2, num_references=4, position_bandwidth=0.5).to(device)
    tokens = torch.randn(2, 15, 16, device=device)
    mask = random_mask(generator(0), 2, 15).to(device)
    for autocast in (False, True):
        attention.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            output = attention(tokens, mask)
        output.float().square().mean().backward()
        gradients = {name: x.grad for name, x in attention.named_parameters()}
        for each, x in {"output": output, **gradients}.items():
            name = f"{'autocast, ' if autocast else ''}{each}"
            wrong = 1 if x is None else (~x.isfinite()).sum().item()
            yield Comparison(name, wrong, 0, "entries missing or not finite")


def wrong_arguments(device: torch.device) -> Iterator[Comparison]:
    """A ValueError or TypeError that names the argument, before anything is launched."""
    arguments = random_problem(0, **SIZES, **OPTIONS, dtype=torch.float32, device=device)
    wrong: dict[str, object] = {
        "value": arguments["value"][:, :, 1:],
        "reference": arguments["reference"].double(),
        "mask": arguments["mask"].float(),
        "epsilon": 0.0,
        "iterations": -1,
    }
    if device.type != "cpu":
        wrong["token_mass"] = arguments["token_mass"].cpu()
    for name, x in wrong.items():
        message = "no error"
        try:
            call(set_attention, arguments | {name: x})
        except (ValueError, TypeError) as error:
            message = first_line(error)
        yield Comparison(name, float(f" {name} must be" not in message), 0, message)
