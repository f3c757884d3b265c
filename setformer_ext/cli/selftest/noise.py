"""The errors of gradients, if products are off by random errors of a given size."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from ... import reference as definition
from .problems import Arguments

TRIES = 3

# A tensor of the definition, and errors of its gradient.
Errors = list[tuple[Tensor, Tensor]]


def gradient_noise(
    function: Callable[..., Tensor],  # of setformer_ext
    arguments: Arguments,  # in float64
    grad_output: Tensor,  # the gradient of the output
    relative: float,
    names: Collection[str],
) -> dict[str, float]:
    """The largest error of the gradient by each of `names`.

    The gradients of both averages, O = R A and A = C^T v, are plans times differences of products,
    R (dO.A - dO.O) and C (v.dA - dA.A). Each term of a product is off by `relative` times a random
    number. The errors go on as gradients do, through the scores, the potentials and the masses. The
    largest of a few tries is taken three times. Masses are taken as they are: kernels do not divide
    them by their sum, which would take away what their errors have in common.
    """
    leaves = {name: arguments[name].detach().requires_grad_() for name in names}
    rng = torch.Generator().manual_seed(0)

    def random_like(size: Tensor) -> Tensor:
        return relative * size * torch.randn(size.shape, generator=rng, dtype=size.dtype)

    solves = _Solves(function, arguments | leaves, grad_output)
    inputs = solves.inputs(leaves)
    largest = dict.fromkeys(leaves, 0.0)
    for _ in range(TRIES):
        errors = [(x, e) for x, e in solves.errors(random_like) if x.requires_grad]
        gradients = torch.autograd.grad(
            *([x for x, _ in errors], [x for _, x, _ in inputs], [e for _, e in errors]),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        found = dict.fromkeys(leaves, 0.0)
        for (name, _, divisor), x in zip(inputs, gradients, strict=True):
            found[name] += 3 * (x / divisor).abs().max().item() if x.numel() else 0.0
        largest = {name: max(largest[name], x) for name, x in found.items()}
    return largest


class _Solves:
    """The solve of the keys, that of the queries if they distribute, and the sizes of errors."""

    def __init__(
        self, function: Callable[..., Tensor], arguments: Arguments, grad_output: Tensor
    ) -> None:
        options = dict(arguments)
        query, key, value, reference = (
            options.pop(name, None) for name in ("query", "key", "value", "reference")
        )
        of_queries = {name: options.pop(name, None) for name in ("query_mask", "query_positions")}
        mask = options.get("mask")
        self.keys = definition.transport(key, reference, **options)
        if options.get("token_mass") is not None:
            mass = definition.zero_invalid(options["token_mass"].detach().unsqueeze(-1), mask)
            total = mass.sum(-2)
            self.total_mass = torch.where(total == 0, 1, total)  # [B, H, 1]
        self.receivers: definition.Transport | None = None
        plan = self.keys.collect().detach()  # [B, H, N, M]
        if function.__name__ == "transport_plan":
            terms = grad_output * self.keys.log_b.exp().unsqueeze(-2).detach()
            self.of_plan = terms.abs() + (plan * terms).norm(dim=-2, keepdim=True)
            return
        value = definition.zero_invalid(value, mask).detach()
        pooled = plan.mT @ value
        of_pooled = grad_output  # dA
        if function.__name__ == "set_attention":
            self.receivers = self.keys
            if query is not None:
                mask = of_queries["query_mask"]
                self.receivers = definition.transport_of_queries(
                    query, reference, **options | of_queries
                )
            of_output = definition.zero_invalid(grad_output, mask)
            self.distribution = self.receivers.distribution().detach()
            output = self.distribution @ pooled
            of_pooled = self.distribution.mT @ of_output
            self.of_distribution = _size(of_output, pooled) + _size_of_rows(of_output, output)
        self.of_plan = _size(value, of_pooled) + _size_of_rows(of_pooled, pooled).mT

    def inputs(self, leaves: dict[str, Tensor]) -> list[tuple[str, Tensor, Tensor | float]]:
        """By what to derive for each name, and what to divide that gradient by."""
        found: list[tuple[str, Tensor, Tensor | float]] = []
        for name, leaf in leaves.items():
            if name == "token_mass":
                found.append((name, self.keys.a, self.total_mass))
            elif name == "reference_mass":
                found.append((name, self.keys.log_b, leaf.detach()))
                if self.receivers is not None and self.receivers is not self.keys:
                    found.append((name, self.receivers.log_b, leaf.detach()))
            else:
                found.append((name, leaf, 1.0))
        return found

    def errors(self, random_like: Callable[[Tensor], Tensor]) -> Errors:
        """Of the gradients of scores, potentials and masses, new ones at each call.

        Each is of its own: what all of them share cancels where a gradient is 0, what rounding
        does to them does not.
        """
        keys = self.keys
        by_mass = keys._replace(a=torch.ones_like(keys.a)).collect().detach()  # C_ij / a_i
        plan = keys.a.detach().unsqueeze(-1) * by_mass
        found = [
            (keys.s, plan * random_like(self.of_plan)),
            (keys.rows, (plan * random_like(self.of_plan)).sum(-1)),
            (keys.columns, (plan * random_like(self.of_plan)).sum(-2)),
            (keys.a, (by_mass * random_like(self.of_plan)).sum(-1)),
        ]
        if self.receivers is not None:
            found += [
                (self.receivers.s, self.distribution * random_like(self.of_distribution)),
                (
                    self.receivers.g,
                    (self.distribution * random_like(self.of_distribution)).sum(-2),
                ),
            ]
        return found


def _size(x: Tensor, y: Tensor) -> Tensor:  # [..., N, D], [..., M, D] -> [..., N, M]
    """What independent errors of the terms make of each product x_i.y_j, in units of them."""
    return (x.square() @ y.square().mT).sqrt()


def _size_of_rows(x: Tensor, y: Tensor) -> Tensor:  # [..., N, D] -> [..., N, 1]
    """The same of x_i.y_i."""
    return (x * y).norm(dim=-1, keepdim=True)
