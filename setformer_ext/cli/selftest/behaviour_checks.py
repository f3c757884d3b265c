"""What holds beside the values: layouts, determinism, edge cases, extremes, errors."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import SetAttention, set_attention, set_pooling, transport_plan
from ...errors import first_line
from .definition_checks import DTYPES
from .outcome import Result, Task, short
from .problems import (
    Arguments,
    call,
    differentiable,
    move,
    output_gradient,
    random_problem,
    run,
    used,
)
from .tolerance import Comparison, largest

SIZES: dict[str, Any] = {"B": 2, "H": 2, "N": 37, "M": 9, "D": 8, "Dv": 8, "iterations": 2}
OPTIONS: dict[str, Any] = {"masked": True, "token_mass": True, "reference_mass": "learned", "P": 2}


def tasks(quick: bool) -> list[Task]:
    """One task a behaviour, or a behaviour and type."""
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


def identical(name: str, x: Tensor, y: Tensor) -> Comparison:
    """Bit by bit but for the sign of 0; what is not a number must be so on both sides."""
    differing = (x != y) & ~(x.isnan() & y.isnan())
    return Comparison(name, differing.sum().item(), 0, "entries that differ")


def all_identical(name: str, x: dict[str, Tensor], y: dict[str, Tensor]) -> list[Comparison]:
    return [identical(f"{name}, {each}", x[each], y[each]) for each in x]


def forward_and_backward(arguments: Arguments) -> dict[str, Tensor]:
    """Output and gradients of set_attention."""
    return run(set_attention, arguments, output_gradient(set_attention, arguments, 0))


def layouts(quick: bool, dtype: torch.dtype, device: torch.device) -> Result:
    """Strided, transposed, interleaved and misaligned tensors give the contiguous copy's bits."""

    def strided(x: Tensor) -> Tensor:
        larger = x.new_zeros([2 * size + 1 for size in x.shape])
        if larger.is_floating_point():
            larger.fill_(torch.nan)  # what is between must not be read
        return larger[tuple(slice(1, None, 2) for _ in x.shape)].copy_(x)

    def misaligned(x: Tensor) -> Tensor:
        return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)

    def transposed(x: Tensor) -> Tensor:
        order = tuple(reversed(range(x.ndim)))
        return x.permute(order).contiguous().permute(order)

    def heads_last(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2) if x.ndim == 4 else x

    comparisons = []
    # rows of D = 8 and 32 entries are whole 16-byte pieces in every type, those of 7 are not
    for depth in (8,) if quick else (7, 8, 32):
        sizes = SIZES | {"D": depth, "Dv": depth}
        arguments = random_problem(3, **sizes, **OPTIONS, dtype=dtype, device=str(device))
        grad_output = output_gradient(set_attention, arguments, 0)
        expected = run(set_attention, arguments, grad_output)
        for layout in (strided, misaligned, transposed, heads_last):
            changed = {n: layout(x) if isinstance(x, Tensor) else x for n, x in arguments.items()}
            results = run(set_attention, changed, layout(grad_output))
            comparisons += all_identical(f"{layout.__name__} D={depth}", results, expected)
        broadcast = arguments | {
            "value": arguments["value"][:, :, :1].expand_as(arguments["value"])
        }
        contiguous = broadcast | {"value": broadcast["value"].contiguous()}
        comparisons += all_identical(
            f"expanded D={depth}",
            forward_and_backward(broadcast),
            forward_and_backward(contiguous),
        )
    return Result(comparisons)


def two_runs(quick: bool, dtype: torch.dtype, device: torch.device) -> Result:
    """Bit by bit the same, whatever the memory that results are written to held before."""
    comparisons = []
    for tokens in (37,) if quick else (37, 300, 3137):
        arguments = random_problem(
            4, **SIZES | {"N": tokens, "M": 17}, **OPTIONS, dtype=dtype, device=str(device)
        )
        first = forward_and_backward(arguments)
        for _ in range(1 if quick else 4):
            stale = [torch.full((n,), torch.nan, device=device) for n in (1000, 30_000, 1_000_000)]
            del stale
            comparisons += all_identical(f"N={tokens}", forward_and_backward(arguments), first)
    return Result(comparisons)


EXTREMES: dict[str, dict[str, Any]] = {
    "similarities of 1e4 / 0.001": {"kernel": "linear", "epsilon": 1e-3, "size": 1e2},
    "epsilon of 0.001": {"kernel": "gaussian", "epsilon": 1e-3, "size": 1.0},
    "underflow": {"kernel": "gaussian", "epsilon": 1e-3, "size": 1e2},
}


def extremes(quick: bool, dtype: torch.dtype, device: torch.device) -> Result:
    """Finite outputs and gradients, and outputs that are averages of the values, always."""
    comparisons = []
    for name, options in EXTREMES.items():
        for iterations in (1,) if quick else (0, 1, 5, 20):
            arguments = _extreme_problem(iterations, **options)
            arguments = move(arguments, dtype=dtype, device=str(device))
            for function in (set_attention, set_pooling):
                label = f"{name}, T={iterations}, {function.__name__}"
                results = run(function, arguments, output_gradient(function, arguments, 0))
                for each, x in results.items():
                    # a half gradient may be beyond the type's range, which is no fault of ours
                    in_range = dtype != torch.float16 or each == "output"
                    bad = (~x.isfinite() if in_range else x.isnan()).sum().item()
                    comparisons.append(Comparison(f"{label}, {each}", bad, 0, "entries not finite"))
                bound = largest(arguments["value"]) * (1 + 100 * torch.finfo(dtype).eps)
                error = largest(results["output"])
                note = "largest output; allowed is the largest value"
                comparisons.append(Comparison(f"{label}, output", error, bound, note))
    return Result(comparisons)


def _extreme_problem(iterations: int, *, kernel: str, epsilon: float, size: float) -> Arguments:
    """Keys and references of one length, with one token on one reference."""
    arguments = random_problem(
        11, **SIZES | {"iterations": iterations}, **OPTIONS, kernel=kernel, epsilon=epsilon
    )
    for name in ("key", "reference"):
        arguments[name] = size * torch.nn.functional.normalize(arguments[name], dim=-1)
    arguments["key"][:, :, 0] = arguments["reference"][:, 0]
    return arguments


def empty(device: torch.device) -> Result:
    """No batch items, heads, tokens or queries; and no valid token gives zeros everywhere."""
    comparisons = []
    for options in ({"B": 0}, {"H": 0}, {"N": 0}, {"Nq": 0}, {"N": 0, "Nq": 5}):
        arguments = random_problem(
            0, **SIZES | options, token_mass=True, dtype=torch.float32, device=str(device)
        )
        for function in (set_attention, set_pooling, transport_plan):
            results = run(function, arguments, output_gradient(function, arguments, 0))
            for each, x in results.items():
                # without tokens the references pool nothing
                wrong = x.isnan().sum().item() if "N" not in options else (x != 0).sum().item()
                name = f"{options}, {function.__name__}, {each}"
                comparisons.append(Comparison(name, wrong, 0, "wrong entries"))
    arguments = random_problem(0, **SIZES, **OPTIONS, dtype=torch.float32, device=str(device))
    arguments["mask"] = torch.zeros_like(arguments["mask"])
    arguments["key"] = torch.full_like(arguments["key"], torch.nan)  # padding may hold anything
    for each, x in forward_and_backward(arguments).items():
        wrong = (x != 0).sum().item()
        comparisons.append(Comparison(f"no valid token, {each}", wrong, 0, "entries not 0"))
    return Result(comparisons)


def not_a_number(device: torch.device) -> Result:
    """NaN and infinity in one batch item change no bit of the others."""
    arguments = random_problem(
        2,
        **SIZES | {"B": 3, "H": 1, "Nq": 17},
        per_sample=True,
        token_mass=True,
        dtype=torch.float32,
        device=str(device),
    )
    grad_output = output_gradient(set_attention, arguments, 0)
    clean = run(set_attention, arguments, grad_output)
    comparisons = []
    for name in ("query", "key", "value", "reference"):
        for poison in (torch.nan, torch.inf):
            poisoned = arguments | {name: arguments[name].clone()}
            poisoned[name][1, 0].view(-1)[3] = poison
            for each, x in run(set_attention, poisoned, grad_output).items():
                label = f"{poison} in {name}, {each}"
                comparisons.append(identical(label, x[[0, 2]], clean[each][[0, 2]]))
    return Result(comparisons)


def finite_differences(quick: bool, device: torch.device) -> Result:
    """torch.autograd.gradcheck in float64; the second derivative along random directions."""
    options = OPTIONS | {"bandwidth": "learned", "P": 0, "epsilon": "learned"}
    arguments = random_problem(
        4, **SIZES | {"B": 1, "N": 4, "M": 3, "D": 2, "Dv": 1}, **options, device=str(device)
    )
    arguments["token_mass"] = arguments["token_mass"] + 0.1  # differences step below 0
    comparisons = []
    functions: tuple[Callable[..., Tensor], ...] = (set_attention, set_pooling)
    for function in functions:
        names = [name for name in differentiable(arguments) if used(function, name)]
        tensors = [arguments[name].requires_grad_() for name in names]

        def of_tensors(
            *tensors: Tensor,
            function: Callable[..., Tensor] = function,
            names: list[str] = names,
        ) -> Tensor:
            return call(function, arguments | dict(zip(names, tensors, strict=True)))

        # they raise, with both Jacobians, where they fail; second derivatives are torch's own
        first = torch.autograd.gradcheck(of_tensors, tensors, fast_mode=quick)
        second = torch.autograd.gradgradcheck(of_tensors, tensors, fast_mode=True, nondet_tol=1e-12)
        for order, held in (("first", first), ("second", second)):
            name = f"{function.__name__}, {order} derivative"
            comparisons.append(Comparison(name, float(not held), 0))
    return Result(comparisons)


def module(device: torch.device) -> Result:
    """SetAttention, plain and under autocast: finite, and a gradient for every parameter."""
    torch.manual_seed(0)
    attention = SetAttention(16, num_heads=2, num_references=4, position_bandwidth=0.5).to(device)
    tokens = torch.randn(2, 15, 16, device=device)
    mask = torch.rand(2, 15, device=device) < 0.7
    comparisons = []
    for autocast in (False, True):
        attention.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            output = attention(tokens, mask)
        output.float().square().mean().backward()
        results = {"output": output}
        results |= {name: x.grad for name, x in attention.named_parameters()}
        for each, x in results.items():
            name = f"{'autocast, ' if autocast else ''}{each}"
            wrong = 1 if x is None else (~x.isfinite()).sum().item()
            comparisons.append(Comparison(name, wrong, 0, "entries missing or not finite"))
    return Result(comparisons)


def wrong_arguments(device: torch.device) -> Result:
    """A ValueError or TypeError that names the argument, before anything is launched."""
    arguments = random_problem(0, **SIZES, **OPTIONS, dtype=torch.float32, device=str(device))
    wrong: dict[str, object] = {
        "value": arguments["value"][:, :, 1:],
        "reference": arguments["reference"].double(),
        "mask": arguments["mask"].float(),
        "epsilon": 0.0,
        "iterations": -1,
    }
    if device.type != "cpu":
        wrong["token_mass"] = arguments["token_mass"].cpu()
    comparisons = []
    for name, x in wrong.items():
        message = "no error"
        try:
            call(set_attention, arguments | {name: x})
        except (ValueError, TypeError) as error:
            message = first_line(error)
        comparisons.append(Comparison(name, float(f" {name} must be" not in message), 0, message))
    return Result(comparisons)
