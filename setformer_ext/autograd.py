"""Derivatives of the operations.

The first derivative of ``set_attention`` is the operation ``set_attention_backward``: the exact
gradient of the unrolled Sinkhorn steps. Higher derivatives go through the differentiable
definition (``reference.py``), whose N x M matrices they then store.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import reference
from .ops import LIBRARY
from .problem import (
    TENSORS,
    Backward,
    Gradients,
    Problem,
    Solution,
    accumulate_dtype,
    is_per_sample,
)

OPERATIONS = torch.ops.setformer_ext
_vjp: Any = torch.func.vjp  # annotated with a third result, which only has_aux gives


def refuse_forward_mode(ctx: Any = None, *_: Any) -> Any:
    """What torch calls for a derivative in forward mode.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(
        "setformer_ext: has no forward-mode derivatives (jvp, jacfwd, hessian): take reverse mode, "
        "as grad, vjp or jacrev (of a Hessian: jacrev(jacrev(f))); or the definition in plain "
        "torch, setformer_ext.reference, which has both"
    )


def refuse_tangents(arguments: Iterable[object]) -> None:
    """Refuse tangents, which the operations would drop silently if no gradient is wanted.

    Raises:
        NotImplementedError: if an argument has one.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    for x in arguments:
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            refuse_forward_mode()


class SetAttentionFunction(torch.autograd.Function):
    """``set_attention`` as a ``torch.autograd.Function``, for code that composes such functions.

    ``SetAttentionFunction.apply(*Problem(...))`` returns the fields of ``Solution``. Its backward
    is the operation ``torch.ops.setformer_ext.set_attention_backward``.
    """

    generate_vmap_rule = True
    jvp = staticmethod(refuse_forward_mode)

    @staticmethod
    def forward(*problem: Any) -> tuple[Tensor, ...]:
        return tuple(OPERATIONS.set_attention(*problem))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        save_solved(ctx, Problem(*inputs), Solution(*output))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, grad_pooled: Tensor | None, *_: None) -> Any:
        solution, problem = saved_solved(ctx)
        if not problem.distribute:
            grad_output = None  # it belongs to the empty output
        if grad_output is None and grad_pooled is None:
            return (None,) * len(problem)
        problem_as_computed = problem.in_storage_type(solution.output.dtype)
        given = Backward(grad_output, grad_pooled, solution, problem_as_computed)
        gradients = differentiable_call("set_attention_backward", *given.arguments())
        wanted = dict(zip(Problem._fields, ctx.needs_input_grad, strict=True))
        named = Gradients(*gradients)._asdict()
        return gradients_of_inputs(problem, {n: x for n, x in named.items() if wanted[n]})


def save_solved(ctx: Any, problem: Problem, solution: Solution) -> None:
    """Keep for backward what it needs of a problem and its solution."""
    others = solution._asdict()
    del others["output"], others["pooled"]
    ctx.mark_non_differentiable(*others.values())
    _save(ctx, problem, solution)


def saved_solved(ctx: Any) -> tuple[Solution, Problem]:
    """What `save_solved` kept."""
    solution, problem = _saved(ctx)
    return Solution(*solution), problem


def _save(ctx: Any, problem: Problem, others: Iterable[Tensor | None]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*others, *(getattr(problem, name) for name in TENSORS))
    ctx.problem = problem.with_tensors(dict.fromkeys(TENSORS))


def _saved(ctx: Any) -> tuple[Sequence[Any], Problem]:
    """What `_save` kept: the others, and the problem."""
    kept = ctx.saved_tensors
    others = len(kept) - len(TENSORS)
    problem = ctx.problem.with_tensors(dict(zip(TENSORS, kept[others:], strict=True)))
    return kept[:others], problem


def gradients_of_inputs(
    problem: Problem, gradients: Mapping[str, Tensor | None]
) -> tuple[Tensor | None, ...]:
    """One gradient for each argument; summed over the samples if they shared the tensor."""
    result: dict[str, Tensor] = {}
    for name, gradient in gradients.items():
        tensor = getattr(problem, name)
        if tensor is not None and gradient is not None:
            result[name] = gradient.sum_to_size(tensor.shape).to(tensor.dtype)
    return tuple(result.get(name) for name in Problem._fields)


class _SetAttentionBackwardFunction(torch.autograd.Function):
    """The derivative of the derivative, by the definition."""

    generate_vmap_rule = True
    jvp = staticmethod(refuse_forward_mode)

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(OPERATIONS.set_attention_backward(*arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        given = Backward.read(*inputs)
        _save(ctx, given.problem, (given.grad_output, given.grad_pooled))

    @staticmethod
    def backward(ctx: Any, *grad_gradients: Tensor | None) -> Any:
        """The derivative of sum_k <gradient_k, grad_gradient_k>."""
        (grad_output, grad_pooled), problem = _saved(ctx)
        inputs = {
            name: _for_each_sample(problem, name)
            for name in Gradients._fields
            if getattr(problem, name) is not None
        }
        # In the accumulate type: in half precision the definition would lose digits at every step.
        accumulate = accumulate_dtype(problem.key.dtype)
        grads = {
            name: grad.to(accumulate)
            for name, grad in (("output", grad_output), ("pooled", grad_pooled))
            if grad is not None
        }

        def gradients(inputs: dict[str, Tensor], grads: dict[str, Tensor]) -> dict[str, Tensor]:
            def results(inputs: dict[str, Any]) -> dict[str, Tensor | None]:
                output, pooled = _define(problem._replace(**inputs))
                return {n: x for n, x in (("output", output), ("pooled", pooled)) if n in grads}

            _, pull_back = _vjp(results, inputs)
            found: dict[str, Tensor] = pull_back(grads)[0]
            return found

        first, pull_back = _vjp(gradients, inputs, grads)
        given = dict(zip(Gradients._fields, grad_gradients, strict=True))
        of_inputs, of_grads = pull_back(
            {
                name: torch.zeros_like(x) if (grad := given[name]) is None else grad.to(x.dtype)
                for name, x in first.items()
            }
        )
        of_problem = gradients_of_inputs(problem, of_inputs)
        return (
            None if grad_output is None else of_grads["output"].to(grad_output.dtype),
            None if grad_pooled is None else of_grads["pooled"].to(grad_pooled.dtype),
            *(None,) * len(Solution._fields),
            *of_problem,
        )


def _define(problem: Problem) -> tuple[Tensor | None, Tensor]:
    """Output (where distributed) and pooled output by the definition."""
    if problem.offsets is not None:
        parts = [_define(sequence) for sequence in problem.sequences()]
        outputs = [output for output, _ in parts if output is not None]
        pooled = torch.cat([pooled for _, pooled in parts])
        return torch.cat(outputs, 2) if problem.distribute else None, pooled
    pooled = reference.set_pooling(**problem.arguments(of_queries=False))
    if not problem.distribute:
        return None, pooled
    return reference.set_attention(**problem.arguments()), pooled


def _for_each_sample(problem: Problem, name: str) -> Tensor:
    """The tensor in the form of the gradient of set_attention_backward: per sample, even if
    shared."""
    tensor: Tensor = getattr(problem, name)
    tensor = tensor.to(accumulate_dtype(tensor.dtype))
    if is_per_sample(name, tensor):
        return tensor
    return tensor.expand(problem.batch, *tensor.shape)


def wants_gradient(arguments: Iterable[object]) -> bool:
    """Whether a result of these arguments would require a gradient."""
    return torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in arguments
    )


_FUNCTIONS: dict[str, type[torch.autograd.Function]] = {
    "set_attention": SetAttentionFunction,
    "set_attention_backward": _SetAttentionBackwardFunction,
}


def register(name: str, function: type[torch.autograd.Function]) -> None:
    """Differentiate an operation as this function is differentiated, however it is called."""
    operation = getattr(OPERATIONS, name).default

    def kernel(keys: Any, *arguments: Any) -> Any:
        if wants_gradient(arguments):
            return function.apply(*arguments)
        return operation.redispatch(keys & torch._C._after_autograd_keyset, *arguments)

    LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


for _name, _function in _FUNCTIONS.items():
    register(_name, _function)


def differentiable_call(name: str, *arguments: Any) -> Any:
    """Call the operation, in a form that active transforms of torch.func can differentiate.

    Its transforms (grad, jacrev, vmap of them) see an autograd.Function only where Python calls it,
    not from within the dispatcher.
    """
    if torch._C._are_functorch_transforms_active():
        return _FUNCTIONS[name].apply(*arguments)
    refuse_tangents(arguments)
    operation = getattr(OPERATIONS, name)
    if torch.compiler.is_compiling() or wants_gradient(arguments):
        return operation(*arguments)
    with torch._C._AutoDispatchBelowAutograd():  # autograd's kernel would only pass the call on
        return operation(*arguments)
