"""Random problems with outliers and odd sizes, and calling the operation on them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Any]  # by parameter name, what set_attention takes

# normalize=False, so that the lengths of vectors, and outliers, make a difference.
DEFAULTS = {"kernel": "gaussian", "iterations": 5, "normalize": False}
# Arguments that set_pooling and transport_plan do not take.
QUERY_SIDE = {"query", "query_mask", "query_positions"}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_mask(rng: torch.Generator, *shape: int) -> Tensor:  # [..., N] bool
    """A mask that keeps and hides at least one entry of each row of two or more."""
    mask = torch.rand(shape, generator=rng) < 0.7
    mask[..., :1] |= ~mask.any(-1, keepdim=True)
    if shape[-1] > 1:
        mask[..., -1:] &= ~mask.all(-1, keepdim=True)
    return mask


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
    bandwidth: float | str = 1.0,  # or "learned": a tensor [H]
    epsilon: float | str = 0.1,  # or "learned": a tensor [H]
    P: int = 0,  # dimensions of the positions; 0: none
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    **options: Any,  # of set_attention, in place of DEFAULTS
) -> Arguments:
    """Points of length about 1, a few coordinates ten times as large, masks with holes. Valid
    tokens of every head hold some mass."""
    rng = generator(seed)

    def points(*shape: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(shape, generator=rng, dtype=torch.float64) * scale
        outlier = torch.rand(shape, generator=rng) < 0.01
        return torch.where(outlier, 10 * x, x).to(dtype)

    def uniform(*shape: int, low: float, high: float) -> Tensor:
        x = torch.rand(shape, generator=rng, dtype=torch.float64)
        return (low + (high - low) * x).to(dtype)

    arguments: Arguments = (
        {
            "query": None,
            "key": points(B, H, N, D, scale=D**-0.5),
            "value": points(B, H, N, Dv),
            "reference": points(*((B, H, M, D) if per_sample else (H, M, D)), scale=D**-0.5),
        }
        | DEFAULTS
        | options
    )
    learned = (("bandwidth", bandwidth, 0.5, 2), ("epsilon", epsilon, 0.1, 0.5))
    for name, given, low, high in learned:
        arguments[name] = uniform(H, low=low, high=high) if given == "learned" else given
    if Nq is not None:
        arguments["query"] = points(B, H, Nq, D, scale=D**-0.5)
    if masked:
        arguments["mask"] = random_mask(rng, B, N)
        if Nq is not None:
            arguments["query_mask"] = random_mask(rng, B, Nq)
    if token_mass:
        mass = uniform(B, H, N, low=0.1, high=2)
        holds = random_mask(rng, B, H, N)
        if masked:  # where the valid tokens of a head have none of the mass, they get all of it
            holds ^= ~(holds & arguments["mask"].unsqueeze(1)).any(-1, keepdim=True)
        arguments["token_mass"] = torch.where(holds, mass, 0)
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
    arguments: Arguments,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
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


def used(function: Callable[..., Tensor], name: str) -> bool:
    """Whether set_attention, set_pooling or transport_plan takes this argument of a problem."""
    if function.__name__ == "set_attention":
        return True
    return name not in QUERY_SIDE and (function.__name__ == "set_pooling" or name != "value")


def call(function: Callable[..., Tensor], arguments: Arguments) -> Tensor:
    """Call the function with those arguments of a problem that it takes."""
    return function(**{name: x for name, x in arguments.items() if used(function, name)})


def run(
    function: Callable[..., Tensor], arguments: Arguments, grad_output: Tensor | None = None
) -> dict[str, Tensor]:
    """The output and, given its gradient, the gradient of every input: {name: tensor}."""
    leaves = {
        name: arguments[name].detach().requires_grad_(grad_output is not None)
        for name in differentiable(arguments)
        if used(function, name)
    }
    output = call(function, arguments | leaves)
    results = {"output": output.detach()}
    if grad_output is not None:
        gradients = torch.autograd.grad(
            output, list(leaves.values()), grad_output, allow_unused=True, materialize_grads=True
        )
        # torch 2.9 has materialized zeros require gradients themselves.
        results |= {name: x.detach() for name, x in zip(leaves, gradients, strict=True)}
    return results


def output_gradient(function: Callable[..., Tensor], arguments: Arguments) -> Tensor:
    """A random gradient of the output, in the problem's type."""
    key, value, query = arguments["key"], arguments["value"], arguments["query"]
    tokens = key if query is None else query
    M = arguments["reference"].shape[-2]
    shape = {
        "set_attention": (*tokens.shape[:3], value.shape[-1]),
        "set_pooling": (*key.shape[:2], M, value.shape[-1]),
        "transport_plan": (*key.shape[:3], M),
    }[function.__name__]
    return torch.randn(shape, generator=generator(0)).to(key)
