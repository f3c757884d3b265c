"""Derivatives of the operations.

The first derivative of ``set_attention`` is the operation ``set_attention_backward``: the exact
gradient of the unrolled Sinkhorn steps. Higher derivatives, and those of ``transport_plan``, go
through the differentiable definition (``reference.py``), whose N x M matrices they then store.
"""

from typing import Any

import torch
from torch import Tensor

from . import reference
from .ops import Gradients, Problem, Solution

# Positions of the differentiable tensors in Problem, which name those of Gradients too.
DIFFERENTIABLE = tuple(Problem._fields.index(name) for name in Gradients._fields)
TENSORS = Problem._fields.index("kernel")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *inputs[:TENSORS])
    ctx.options = inputs[TENSORS:]


def _backward(ctx: Any, grad_output: Tensor | None, grad_pooled: Tensor | None, *_: None) -> Any:
    solution, problem = Solution(*ctx.saved_tensors[:6]), ctx.saved_tensors[6:] + ctx.options
    if grad_output is None and grad_pooled is None:
        return (None,) * len(problem)
    gradients = torch.ops.setformer_ext.set_attention_backward(
        grad_output, grad_pooled, *solution, *problem
    )
    return _gradients_of_inputs(problem, gradients)


def _gradients_of_inputs(
    problem: tuple[Any, ...], gradients: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """One gradient for each argument: per-sample ones summed where the tensor was shared."""
    result: list[Tensor | None] = [None] * len(problem)
    for index, gradient in zip(DIFFERENTIABLE, gradients, strict=True):
        tensor = problem[index]
        if tensor is not None and gradient is not None:
            result[index] = gradient.sum_to_size(tensor.shape).to(tensor.dtype)
    return tuple(result)


torch.library.register_autograd(
    "setformer_ext::set_attention", _backward, setup_context=_setup_context
)


def _define(problem: Problem) -> tuple[Tensor | None, Tensor]:
    """Output (where distributed) and pooled output by the definition."""
    options = problem._asdict()
    distribute = options.pop("distribute")
    query = options.pop("query")
    cross = {name: options.pop(name) for name in ("query_mask", "query_positions")}
    pooled = reference.set_pooling(**options)
    if not distribute:
        return None, pooled
    return reference.set_attention(query, **options, **cross), pooled


def _setup_second_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:2], *inputs[8 : 8 + TENSORS])
    ctx.options = inputs[8 + TENSORS :]


def _second_backward(ctx: Any, *grad_gradients: Tensor | None) -> Any:
    """The derivative of <set_attention_backward(...), grad_gradients>."""
    grad_output, grad_pooled, *tensors = ctx.saved_tensors
    problem = Problem(*tensors, *ctx.options)
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # set_attention_backward answers per sample, so the definition gets a copy per sample.
        batch = problem.key.shape[0]
        per_sample = list(problem)
        for index in DIFFERENTIABLE:
            tensor = problem[index]
            if tensor is not None:
                leaf = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
                name, rank = Problem._fields[index], tensor.dim()
                shared = rank < {"epsilon": 2, "reference_mass": 3}.get(name, 4)
                shared = shared and name != "token_mass"
                per_sample[index] = leaf.expand(batch, *leaf.shape) if shared else leaf
        inputs = [per_sample[index] for index in DIFFERENTIABLE]
        present = [x for x in inputs if x is not None]
        grads = [
            g if g is None or g.requires_grad else g.detach().requires_grad_()
            for g in (grad_output, grad_pooled)
        ]
        results = [
            (result, grad)
            for result, grad in zip(_define(Problem(*per_sample)), grads, strict=True)
            if result is not None and grad is not None
        ]
        first = torch.autograd.grad(
            [result for result, _ in results],
            present,
            [grad.to(result.dtype) for result, grad in results],
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        given = [g for g, x in zip(grad_gradients, inputs, strict=True) if x is not None]
        product = sum((f * g).sum() for f, g in zip(first, given, strict=True) if g is not None)
        wanted = [g for g in grads if g is not None] + present
        second = iter(
            torch.autograd.grad(
                product,
                wanted,
                create_graph=create_graph,
                allow_unused=True,
            )
            if isinstance(product, Tensor)
            else (None,) * len(wanted)
        )
        of_grads = [None if g is None else next(second) for g in grads]
        of_inputs = [None if x is None else next(second) for x in inputs]
    of_problem = _gradients_of_inputs(tuple(problem), tuple(of_inputs))
    return *of_grads, *(None,) * len(Solution._fields), *of_problem


torch.library.register_autograd(
    "setformer_ext::set_attention_backward", _second_backward, setup_context=_setup_second_context
)


def _setup_plan_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.options = inputs[8:]


def _plan_backward(ctx: Any, grad_plan: Tensor) -> Any:
    names = ("mask", "token_mass", "reference_mass", "token_positions", "reference_positions")
    options = ("kernel", "bandwidth", "position_bandwidth", "iterations")
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        tensors = [
            x
            if x is None or x.requires_grad or not x.is_floating_point()
            else x.detach().requires_grad_()
            for x in ctx.saved_tensors
        ]
        key, references, epsilon, *rest = tensors
        plan = reference.transport_plan(
            key,
            references,
            epsilon=epsilon,
            **dict(zip(names, rest, strict=True)),
            **dict(zip(options, ctx.options, strict=True)),
        )
        wanted = [x for x in tensors if x is not None and x.requires_grad]
        grads = iter(
            torch.autograd.grad(
                plan, wanted, grad_plan, create_graph=create_graph, allow_unused=True
            )
        )
    given = [next(grads) if x is not None and x.requires_grad else None for x in tensors]
    return *given, *(None,) * len(ctx.options)


torch.library.register_autograd(
    "setformer_ext::transport_plan", _plan_backward, setup_context=_setup_plan_context
)


class SetAttentionFunction(torch.autograd.Function):
    """``set_attention`` as a ``torch.autograd.Function``, for code that composes such functions.

    ``SetAttentionFunction.apply(*Problem(...))`` returns output and pooled; its backward is the
    operation ``torch.ops.setformer_ext.set_attention_backward``, as it is for the operation.
    """

    @staticmethod
    def forward(*problem: Any) -> tuple[Tensor, ...]:
        return tuple(torch.ops.setformer_ext.set_attention(*problem))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _setup_context(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return _backward(ctx, *grads)
