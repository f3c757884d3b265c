"""Random problems with outliers and odd sizes, and the tolerance results are judged by."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from setformer_ext import reference as definition

Arguments = dict[str, Any]  # by parameter name, what set_attention takes

# What set_pooling and transport_plan have no use for.
QUERY_SIDE = {"query", "query_mask", "query_positions"}

# The type that a backend accumulates in, by storage type.
ACCUMULATION = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


# The derivative by a mass of 0 is the exponential of a difference that nothing bounds: beyond this
# it is only held to be a number.
UNBOUNDED = 1e25


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_problem(
    seed: int = 0,
    *,
    B: int = 2,
    H: int = 3,
    N: int = 97,
    M: int = 7,
    D: int = 8,
    Dv: int = 5,
    Nq: int | None = None,  # None: the tokens attend to themselves
    per_sample: bool = False,  # reference [B, H, M, D] rather than [H, M, D]
    masked: bool = False,
    token_mass: bool = False,
    reference_mass: str | None = None,  # "learned" [H, M] or "per-sample" [B, H, M]
    kernel: str = "gaussian",
    bandwidth: float | str = 1.0,  # or "learned": a tensor [H]
    epsilon: float | str = 0.1,  # or "learned": a tensor [H]
    iterations: int = 5,
    P: int = 0,  # dimensions of the positions; 0: none
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> Arguments:
    """Points of length about 1, a few coordinates ten times as large, masks with holes."""
    rng = generator(seed)

    def points(*shape: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(shape, generator=rng, dtype=torch.float64) * scale
        outlier = torch.rand(shape, generator=rng) < 0.01
        return torch.where(outlier, 10 * x, x).to(dtype)

    def uniform(*shape: int, low: float, high: float) -> Tensor:
        x = torch.rand(shape, generator=rng, dtype=torch.float64)
        return (low + (high - low) * x).to(dtype)

    def holes(*shape: int) -> Tensor:
        return torch.rand(shape, generator=rng) < 0.7

    arguments: Arguments = {
        "query": None,
        "key": points(B, H, N, D, scale=D**-0.5),
        "value": points(B, H, N, Dv),
        "reference": points(*((B, H, M, D) if per_sample else (H, M, D)), scale=D**-0.5),
        "kernel": kernel,
        "bandwidth": uniform(H, low=0.5, high=2) if bandwidth == "learned" else bandwidth,
        "epsilon": uniform(H, low=0.1, high=0.5) if epsilon == "learned" else epsilon,
        "iterations": iterations,
    }
    if Nq is not None:
        arguments["query"] = points(B, H, Nq, D, scale=D**-0.5)
    if masked:
        arguments["mask"] = holes(B, N)
        if Nq is not None:
            arguments["query_mask"] = holes(B, Nq)
    if token_mass:
        mass = uniform(B, H, N, low=0.1, high=2)
        arguments["token_mass"] = torch.where(holes(B, H, N), mass, 0)
    if reference_mass is not None:
        shape = (B, H, M) if reference_mass == "per-sample" else (H, M)
        arguments["reference_mass"] = uniform(*shape, low=0.1, high=2)
    if P:
        arguments["token_positions"] = uniform(N, P, low=0, high=4)
        arguments["reference_positions"] = uniform(M, P, low=0, high=4)
        arguments["position_bandwidth"] = 2.5
        if Nq is not None:
            arguments["query_positions"] = uniform(Nq, P, low=0, high=4)
    return move(arguments, device=device)


def move(
    arguments: Arguments, *, dtype: torch.dtype | None = None, device: str | None = None
) -> Arguments:
    """The problem in another type (masks stay bool) or on another device."""
    return {
        name: x.to(device or x.device, dtype if dtype and x.is_floating_point() else x.dtype)
        if isinstance(x, Tensor)
        else x
        for name, x in arguments.items()
    }


def differentiable(arguments: Arguments) -> list[str]:
    """Names of the tensors that take a gradient."""
    return [
        name
        for name, x in arguments.items()
        if isinstance(x, Tensor) and x.is_floating_point() and not name.endswith("positions")
    ]


def call(function: Callable[..., Tensor], arguments: Arguments) -> Tensor:
    """Hand set_attention, set_pooling or transport_plan what it takes of a problem."""
    unused: set[str] = set()
    if function.__name__ != "set_attention":
        unused = unused | QUERY_SIDE
    if function.__name__ == "transport_plan":
        unused = unused | {"value"}
    return function(**{name: x for name, x in arguments.items() if name not in unused})


def run(
    function: Callable[..., Tensor], arguments: Arguments, grad_output: Tensor | None = None
) -> dict[str, Tensor]:
    """The output and, given its gradient, the gradient of every input: {name: tensor}."""
    names = differentiable(arguments)
    arguments = {
        name: x.detach().requires_grad_(grad_output is not None) if name in names else x
        for name, x in arguments.items()
    }
    output = call(function, arguments)
    results = {"output": output.detach()}
    if grad_output is not None:
        names = [name for name in names if used(function, name)]
        inputs = [arguments[name] for name in names]
        gradients = torch.autograd.grad(
            output, inputs, grad_output, allow_unused=True, materialize_grads=True
        )
        results |= dict(zip(names, gradients, strict=True))
    return results


def used(function: Callable[..., Tensor], name: str) -> bool:
    if function.__name__ == "set_attention":
        return True
    return name not in QUERY_SIDE and (function.__name__ == "set_pooling" or name != "value")


def output_gradient(function: Callable[..., Tensor], arguments: Arguments, seed: int) -> Tensor:
    """A random gradient of the output, in the problem's type."""
    key, value, query = arguments["key"], arguments["value"], arguments["query"]
    tokens = key if query is None else query
    M = arguments["reference"].shape[-2]
    shape = {
        "set_attention": (*tokens.shape[:3], value.shape[-1]),
        "set_pooling": (*key.shape[:2], M, value.shape[-1]),
        "transport_plan": (*key.shape[:3], M),
    }[function.__name__]
    return torch.randn(shape, generator=generator(seed)).to(key)


def assert_as_exact_as_definition(
    function: Callable[..., Tensor],
    arguments: Arguments,
    *,
    backward: bool = True,
    seed: int = 0,
    more_noise: dict[str, float] | None = None,
) -> None:
    """max|out - exact| <= 2 max|low - exact| + atol for the output and every gradient.

    exact is the definition in float64, low is the definition in the type that the backend
    accumulates in, rounded to the storage type: it calibrates itself to shape, options and
    type. atol is for where low is exact by luck; see `rounding`, to which `more_noise` adds.
    """
    dtype = arguments["key"].dtype
    plain = getattr(definition, function.__name__)
    grad_output = output_gradient(function, arguments, seed) if backward else None

    def in_type(dtype: torch.dtype) -> dict[str, Tensor]:
        upstream = None if grad_output is None else grad_output.to(dtype)
        return run(plain, move(arguments, dtype=dtype), upstream)

    out = run(function, arguments, grad_output)
    exact = in_type(torch.float64)
    # A float64 result has nothing wider to be compared with: its error is what the definition
    # shows in float32, times the ratio of the two roundings.
    low = in_type(torch.float32)
    narrow = torch.finfo(ACCUMULATION[dtype]).eps / torch.finfo(torch.float32).eps
    noise = rounding(function, arguments, exact, grad_output)
    assert out.keys() == exact.keys()
    for name, expected in exact.items():
        assert out[name].dtype == dtype, f"{name} is {out[name].dtype}"
        assert out[name].shape == expected.shape, f"{name} is {list(out[name].shape)}"
        if expected.numel() == 0:
            continue
        if largest(expected) > min(torch.finfo(dtype).max, UNBOUNDED):
            assert not out[name].isnan().any(), f"{name} is not a number"
            continue
        assert out[name].isfinite().all(), f"{name} is not finite"
        error = largest(out[name].double() - expected)
        calibration = largest(low[name].double() - expected) * narrow
        assert math.isfinite(calibration), f"{name} of the definition is not finite"
        noise[name] += (more_noise or {}).get(name, 0.0)
        allowed = 2 * calibration + noise[name]
        assert error <= allowed, (
            f"{name}: error {error:.3g} > {allowed:.3g}"
            f" = 2 * {calibration:.3g} + {noise[name]:.3g}, largest entry"
            f" {largest(expected):.3g}"
        )


def rounding(
    function: Callable[..., Tensor],
    arguments: Arguments,
    exact: dict[str, Tensor],
    grad_output: Tensor | None,
) -> dict[str, float]:
    """What rounding alone may change, by name: atol of the calibrated comparison.

    Storing a result costs a unit of the storage type at its largest entry. Inside, s is off by
    eps (1 + |s|) and by that of the terms it is formed of, and so are the logarithms of the
    weights of the averages. The gradient of s is a difference of terms dO.v, so it is off by
    that times such a term; terms that are summed add like random signs, of which the largest of
    many sums is some three standard deviations.
    """
    dtype = arguments["key"].dtype
    wide = move(arguments, dtype=torch.float64)
    key, value, reference = wide["key"], wide["value"], wide["reference"]
    epsilon, bandwidth = (torch.as_tensor(wide[x]).min().item() for x in ("epsilon", "bandwidth"))
    tokens = key if wide["query"] is None else torch.cat([key, wide["query"]], dim=-2)
    norm_x, norm_y = tokens.norm(dim=-1).unsqueeze(-1), reference.norm(dim=-1).unsqueeze(-2)
    if wide["kernel"] == "gaussian":
        formed_of = (norm_x**2 + norm_y**2) / (2 * bandwidth**2)
        s = definition.similarity(tokens, reference, bandwidth=bandwidth) * (1 + formed_of)
        slope = 1 / bandwidth
    else:
        s = norm_x * norm_y
        slope = max(typical(norm_x), typical(norm_y))
    s = s / epsilon
    inner = torch.finfo(ACCUMULATION[dtype]).eps * (1 + largest(s))
    storage = torch.finfo(dtype).eps

    noise = {name: (storage + inner) * largest(x) for name, x in exact.items()}
    if grad_output is None:
        return noise
    term = 3 * typical(grad_output.double())
    if function.__name__ != "transport_plan":
        term *= typical(value) * value.shape[-1] ** 0.5
    # the difference may be taken with the stored output, and every iteration forms s again
    iterations = (1 + wide["iterations"]) ** 0.5
    term *= storage + torch.finfo(ACCUMULATION[dtype]).eps * (1 + typical(s)) * iterations
    by_tokens, by_references = tokens.shape[-2] ** 0.5, reference.shape[-2] ** 0.5
    derivative_of_s = {  # and what the terms add up to; masses are at least 0.1
        "query": slope / epsilon * by_references,
        "key": slope / epsilon * by_references,
        "reference": slope / epsilon * by_tokens,
        "bandwidth": slope / epsilon * by_tokens,
        "epsilon": typical(s) / epsilon * by_tokens,
        "reference_mass": 10 * by_tokens,
        "token_mass": 10 * by_references,
    }
    for name in exact.keys() & derivative_of_s.keys():
        noise[name] += term * derivative_of_s[name]
    return noise


def largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def typical(x: Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0
