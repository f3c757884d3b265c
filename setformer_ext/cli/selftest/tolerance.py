"""The tolerance of results, from the error of the definition in the backend's own type."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import reference as definition
from ...problem import accumulate_dtype
from .noise import gradient_noise
from .problems import Arguments, move, output_gradient, run

# The derivative by a mass of 0 is the exponential of an unbounded difference: above this it only
# must not be NaN.
UNBOUNDED = 1e25


@dataclass(frozen=True)
class Comparison:
    """One result against what it should be; an error that is not a number fails."""

    name: str
    error: float
    allowed: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed

    @property
    def share(self) -> float:
        """The error in units of what is allowed: a number above 1 fails, infinity for NaN."""
        if self.error == 0:
            return 0.0
        if self.allowed == 0 or math.isnan(self.error):
            return math.inf
        return self.error / self.allowed

    def __str__(self) -> str:
        note = f" ({self.note})" if self.note else ""
        return f"{self.name}: error {self.error:.3g}, allowed {self.allowed:.3g}{note}"


def compare_with_definition(
    function: Callable[..., Tensor],
    arguments: Arguments,
    *,
    backward: bool = True,
    more_noise: dict[str, float] | None = None,
    approximate: bool | None = None,
) -> list[Comparison]:
    """max|out - exact| <= 2 max|low - exact| + atol for the output and every gradient.

    exact is the definition in float64. low is the definition in the type that the backend
    accumulates in, rounded to the storage type: so the tolerance adapts to shape, options and type.
    atol covers cases where low is exact by luck; it is that of `rounding` plus `more_noise`. exact
    and low are computed on the CPU, wherever the problem is. `approximate` says whether the
    backend's float32 functions have the errors of a GPU's; None: if the problem is on a GPU.
    """
    dtype = arguments["key"].dtype
    if approximate is None:
        approximate = arguments["key"].is_cuda
    plain = getattr(definition, function.__name__)
    grad_output = output_gradient(function, arguments) if backward else None

    def in_type(dtype: torch.dtype) -> dict[str, Tensor]:
        upstream = None if grad_output is None else grad_output.to("cpu", dtype)
        return run(plain, move(arguments, dtype=dtype, device="cpu"), upstream)

    out = run(function, arguments, grad_output)
    exact = in_type(torch.float64)
    # A float64 result has nothing wider to be compared with: its error is what the definition
    # shows in float32, times the ratio of the two roundings.
    low = in_type(torch.float32)
    narrow = torch.finfo(accumulate_dtype(dtype)).eps / torch.finfo(torch.float32).eps
    noise = rounding(function, arguments, exact, grad_output, approximate)
    if out.keys() != exact.keys():
        return [Comparison("gradients", math.inf, 0, f"{sorted(out)}, not {sorted(exact)}")]
    comparisons = []
    for name, expected in exact.items():
        result = out[name].cpu()
        if result.dtype != dtype or result.shape != expected.shape:
            note = f"{result.dtype} {list(result.shape)}, not {dtype} {list(expected.shape)}"
            comparisons.append(Comparison(name, math.inf, 0, note))
            continue
        if expected.numel() == 0:
            continue
        if largest(expected) > min(torch.finfo(dtype).max, UNBOUNDED):
            missing = result.isnan().sum().item()
            comparisons.append(Comparison(name, missing, 0, "entries that are not a number"))
            continue
        error = largest(result.double() - expected)
        calibration = largest(low[name].double() - expected) * narrow
        atol = noise[name] + (more_noise or {}).get(name, 0.0)
        allowed = 2 * calibration + atol
        # if the definition is not finite, no error is allowed
        allowed = allowed if math.isfinite(allowed) else 0.0
        note = f"2 * {calibration:.3g} + {atol:.3g}, largest entry {largest(expected):.3g}"
        comparisons.append(Comparison(name, error, allowed, note))
    return comparisons


def rounding(
    function: Callable[..., Tensor],
    arguments: Arguments,
    exact: dict[str, Tensor],
    grad_output: Tensor | None,
    approximate: bool,
) -> dict[str, float]:
    """The error that rounding alone may cause, by name: atol of the calibrated comparison.

    1. Storing a result costs one unit of the storage type at its largest entry, and at least the
       distance of the type's smallest numbers.
    2. A score s is off by eps (1 + |s|), plus the error of the terms that it is formed of. So are
       the logarithms of the weights of the averages.
    3. So are the numbers from which the gradient of s follows: see `gradient_noise`.

    If float32's functions are approximate, an exponential and a quotient are off by 2 units each,
    and a logarithm by 2^-22, which is 1.4 units of e^x. A weight is the quotient of an exponential
    (4 units); its exponent contains two logarithms (3 units), and s three times: itself, and in
    the sums under both logarithms. And s is an exponential divided by epsilon (4 |s|).
    """
    dtype = arguments["key"].dtype
    wide = move(arguments, dtype=torch.float64, device="cpu")
    key, reference = wide["key"], wide["reference"]
    epsilon, bandwidth = (torch.as_tensor(wide[x]).min().item() for x in ("epsilon", "bandwidth"))
    tokens = key if wide["query"] is None else torch.cat([key, wide["query"]], dim=-2)
    norm_x, norm_y = tokens.norm(dim=-1).unsqueeze(-1), reference.norm(dim=-1).unsqueeze(-2)
    if wide["kernel"] == "gaussian":
        formed_of = (norm_x**2 + norm_y**2) / (2 * bandwidth**2)
        s = definition.similarity(tokens, reference, bandwidth=bandwidth) * (1 + formed_of)
    else:
        s = norm_x * norm_y
    s = s / epsilon
    approximate = approximate and accumulate_dtype(dtype) == torch.float32

    def errors(s: float) -> float:
        """The relative error of a weight whose exponent contains s."""
        units = 1 + s + (7 + 12 * s if approximate else 0)
        return torch.finfo(accumulate_dtype(dtype)).eps * units

    inner = errors(largest(s))
    storage = torch.finfo(dtype).eps
    smallest = torch.finfo(dtype).smallest_normal * storage

    noise = {name: (storage + inner) * largest(x) + smallest for name, x in exact.items()}
    if grad_output is None:
        return noise
    # products may use the stored, rounded output, and every iteration computes s again
    relative = storage + errors(typical(s)) * (1 + wide["iterations"]) ** 0.5
    upstream = grad_output.to("cpu", torch.float64)
    of_gradients = gradient_noise(function, wide, upstream, relative, exact.keys() - {"output"})
    return noise | {name: noise[name] + x for name, x in of_gradients.items()}


def largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def typical(x: Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0
