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
from .ops import Gradients, Problem, Solution, accumulate_dtype

# Positions of the differentiable tensors in Problem, which name those of Gradients too.
DIFFERENTIABLE = tuple(Problem._fields.index(name) for name in Gradients._fields)
TENSORS = Problem._fields.index("kernel")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *inputs[:TENSORS])
    ctx.options = inputs[TENSORS:]


def _backward(ctx: Any, grad_output: Tensor | None, grad_pooled: Tensor | None, *_: None) -> Any:
    tensors = ctx.saved_tensors
    solution, problem = tensors[: len(Solution._fields)], tensors[len(Solution._fields) :]
    problem += ctx.options
    if not Problem(*problem).distribute:
        grad_output = None  # of the empty output
    if grad_output is None and grad_pooled is None:
        return (None,) * len(problem)
    gradients = differentiable_call(
        "set_attention_backward", grad_output, grad_pooled, *solution, *problem
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
        inputs: dict[str, Any] = {name: _per_sample(problem, name) for name in Gradients._fields}
        grads = [_differentiable(grad_output), _differentiable(grad_pooled)]
        results = _define(problem._replace(**inputs))
        first = _gradients(results, list(inputs.values()), grads, create_graph=True)
        second = _gradients(
            first, grads + list(inputs.values()), grad_gradients, create_graph=create_graph
        )
    of_grads = [
        None if g is None or x is None else g.to(x.dtype)
        for g, x in zip(second, (grad_output, grad_pooled), strict=False)
    ]
    of_problem = _gradients_of_inputs(tuple(problem), tuple(second[2:]))
    return *of_grads, *(None,) * len(Solution._fields), *of_problem


# Rank of each tensor where it is given per sample.
_RANKS = {"bandwidth": 2, "epsilon": 2, "token_mass": 3, "reference_mass": 3}


def _per_sample(problem: Problem, name: str) -> Tensor | None:
    """The tensor as set_attention_backward answers for it: one per sample also where shared."""
    tensor = _differentiable(getattr(problem, name))
    if tensor is None or tensor.dim() == _RANKS.get(name, 4):
        return tensor
    return tensor.expand(problem.key.shape[0], *tensor.shape)


def _differentiable(x: Tensor | None) -> Tensor | None:
    """x where derivatives end: its own history, if it has one, is the caller's to follow.

    In accumulate type, for the definition would lose half precision's few digits at every step.
    """
    if x is None:
        return None
    x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
    return x.to(accumulate_dtype(x.dtype))


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


_PLAN_ARGUMENTS = (
    "key",
    "reference",
    "bandwidth",
    "epsilon",
    "mask",
    "token_mass",
    "reference_mass",
    "token_positions",
    "reference_positions",
    "kernel",
    "position_bandwidth",
    "iterations",
)
_PLAN_TENSORS = _PLAN_ARGUMENTS.index("kernel")


def _setup_plan_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:_PLAN_TENSORS])
    ctx.options = inputs[_PLAN_TENSORS:]


def _plan_backward(ctx: Any, grad_plan: Tensor) -> Any:
    saved = ctx.saved_tensors
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Contiguous, so that torch's products round alike whatever the strides.
        tensors = [
            _differentiable(x.contiguous()) if x is not None and x.is_floating_point() else x
            for x in saved
        ]
        arguments = dict(zip(_PLAN_ARGUMENTS, (*tensors, *ctx.options), strict=True))
        plan = reference.transport_plan(**arguments)
        gradients = _gradients([plan], tensors, [grad_plan.contiguous()], create_graph)
    given = [None if g is None else g.to(x.dtype) for g, x in zip(gradients, saved, strict=True)]
    return *given, *(None,) * len(ctx.options)


torch.library.register_autograd(
    "setformer_ext::transport_plan", _plan_backward, setup_context=_setup_plan_context
)


class SetAttentionFunction(torch.autograd.Function):
    """``set_attention`` as a ``torch.autograd.Function``, for code that composes such functions.

    ``SetAttentionFunction.apply(*Problem(...))`` returns the fields of ``Solution``. Its backward
    is the operation ``torch.ops.setformer_ext.set_attention_backward``, as it is for the operation.
    """

    generate_vmap_rule = True
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)

    @staticmethod
    def forward(*problem: Any) -> tuple[Tensor, ...]:
        return tuple(torch.ops.setformer_ext.set_attention(*problem))


class _SetAttentionBackwardFunction(torch.autograd.Function):
    generate_vmap_rule = True
    setup_context = staticmethod(_setup_second_context)
    backward = staticmethod(_second_backward)

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(torch.ops.setformer_ext.set_attention_backward(*arguments))


class _TransportPlanFunction(torch.autograd.Function):
    generate_vmap_rule = True
    setup_context = staticmethod(_setup_plan_context)
    backward = staticmethod(_plan_backward)

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        plan: Tensor = torch.ops.setformer_ext.transport_plan(*arguments)
        return plan


_FUNCTIONS: dict[str, type[torch.autograd.Function]] = {
    "set_attention": SetAttentionFunction,
    "set_attention_backward": _SetAttentionBackwardFunction,
    "transport_plan": _TransportPlanFunction,
}


def differentiable_call(name: str, *arguments: Any) -> Any:
    """The operation, in a form that torch.func can differentiate where that is at work.

    Formulas registered with an operation are unknown to torch.func (grad, jacrev, vmap of them);
    those of an autograd.Function it knows.
    """
    if torch._C._are_functorch_transforms_active():
        return _FUNCTIONS[name].apply(*arguments)
    return getattr(torch.ops.setformer_ext, name)(*arguments)
