"""Derivatives of the operations.

The first derivative of ``set_attention`` is the operation ``set_attention_backward``: the exact
gradient of the unrolled Sinkhorn steps. Higher derivatives, and those of ``transport_plan``, go
through the differentiable definition (``reference.py``), whose N x M matrices they then store.
"""

from collections.abc import Sequence
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
    """The derivative of sum_k <gradient_k, grad_gradient_k>."""
    grad_output, grad_pooled, *tensors = ctx.saved_tensors
    problem = Problem(*tensors, *ctx.options)
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = {name: _per_sample(problem, name) for name in Gradients._fields}
        grads = [_differentiable(grad_output), _differentiable(grad_pooled)]
        results = _define(problem._replace(**inputs))
        first = _gradients(results, list(inputs.values()), grads, create_graph=True)
        second = _gradients(
            first, grads + list(inputs.values()), grad_gradients, create_graph=create_graph
        )
    of_problem = _gradients_of_inputs(tuple(problem), tuple(second[2:]))
    return *second[:2], *(None,) * len(Solution._fields), *of_problem


def _per_sample(problem: Problem, name: str) -> Tensor | None:
    """The tensor as set_attention_backward answers for it: one per sample also where shared."""
    tensor = _differentiable(getattr(problem, name))
    if tensor is None or tensor.dim() == {"epsilon": 2, "token_mass": 3, "reference_mass": 3}.get(
        name, 4
    ):
        return tensor
    return tensor.expand(problem.key.shape[0], *tensor.shape)


def _differentiable(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.requires_grad else x.detach().requires_grad_()


def _gradients(
    results: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    create_graph: bool,
) -> list[Tensor | None]:
    """torch.autograd.grad that passes over what is absent, on either side."""
    pairs = [
        (result, grad.to(result.dtype))
        for result, grad in zip(results, grads, strict=True)
        if result is not None and grad is not None and result.requires_grad
    ]
    if not pairs:
        return [None] * len(inputs)
    present = [x for x in inputs if x is not None and x.requires_grad]
    found = iter(
        torch.autograd.grad(
            [result for result, _ in pairs],
            present,
            [grad for _, grad in pairs],
            create_graph=create_graph,
            allow_unused=True,
        )
    )
    return [next(found) if x is not None and x.requires_grad else None for x in inputs]


torch.library.register_autograd(
    "setformer_ext::set_attention_backward", _second_backward, setup_context=_setup_second_context
)


def _setup_plan_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.options = inputs[8:]


def _plan_backward(ctx: Any, grad_plan: Tensor) -> Any:
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Contiguous, so that torch's products round alike whatever the strides.
        tensors = [
            _differentiable(x.contiguous()) if x is not None and x.is_floating_point() else x
            for x in ctx.saved_tensors
        ]
        arguments = dict(zip(_PLAN_ARGUMENTS, (*tensors, *ctx.options), strict=True))
        plan = reference.transport_plan(**arguments)
        gradients = _gradients([plan], tensors, [grad_plan.contiguous()], create_graph)
    return *gradients, *(None,) * len(ctx.options)


_PLAN_ARGUMENTS = (
    "key",
    "reference",
    "epsilon",
    "mask",
    "token_mass",
    "reference_mass",
    "token_positions",
    "reference_positions",
    "kernel",
    "bandwidth",
    "position_bandwidth",
    "iterations",
)


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
