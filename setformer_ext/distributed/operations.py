"""torch.ops.setformer_ext.distributed_set_attention: the kernels, with the ranks of a group.

The counterpart of `ops.py` and `autograd.py`: the operations, their shapes and the first
derivative. The group travels by its name, as in torch's own functional collectives.
"""

from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.effects import _EffectType, _register_effectful_op
from torch.distributed import distributed_c10d
from torch.utils.flop_counter import register_flop_formula

from .. import autograd, ops, transforms
from ..problem import Backward, Gradients, Problem, Solution
from .ranks import FUNCTION, Ranks

OPERATION = "setformer_ext::distributed_set_attention"
BACKWARD = "setformer_ext::distributed_set_attention_backward"
_FIELDS = len(Problem._fields)

ops.LIBRARY.define(
    f"{OPERATION}({ops.PROBLEM}, str group, bool check, bool differentiated) -> ({ops.SOLUTION})"
)
ops.LIBRARY.define(f"{BACKWARD}({ops.BACKWARD}, str group, bool check) -> ({ops.GRADIENTS})")


def _ranks(group: str) -> Ranks:
    return Ranks(distributed_c10d._resolve_process_group(group))  # type: ignore[attr-defined, arg-type]


@torch.library.impl(OPERATION, ops.DISPATCH_KEYS, lib=ops.LIBRARY)
def _set_attention(*arguments: Any) -> Solution:
    problem = Problem(*arguments[:_FIELDS])
    group, check, differentiated = arguments[_FIELDS:]
    ranks = _ranks(group)
    if not check:
        return ops.solve(problem, ranks.merge)
    try:  # before the ranks agree to go on: memory may run out here
        solution = ops.empty_solution(problem)
    except RuntimeError:
        ranks.refuse(problem.key)
        raise
    ranks.agree(problem, differentiated)
    return ops.solve(problem, ranks.merge, solution)


@torch.library.impl(BACKWARD, ops.DISPATCH_KEYS, lib=ops.LIBRARY)
def _set_attention_backward(*arguments: Any) -> Gradients:
    *before, group, check = arguments
    given, ranks = Backward.read(*before), _ranks(group)
    if check:
        ranks.agree_on_call(given.solution)
    gradients = ops.differentiate(given, ranks.merge)
    if given.problem.reference_mass is None:
        return gradients
    # Each rank has the whole gradient; divided by their number, the shares add up to it.
    return gradients._replace(reference_mass=gradients.reference_mass / ranks.count)


@torch.library.register_fake(OPERATION, lib=ops.LIBRARY)
def _fake_set_attention(*arguments: Any) -> Solution:
    return ops.empty_solution(Problem(*arguments[:_FIELDS]))


@torch.library.register_fake(BACKWARD, lib=ops.LIBRARY)
def _fake_backward(*arguments: Any) -> Gradients:
    return ops.empty_gradients(Backward.read(*arguments[:-2]).problem)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    autograd.save_solved(ctx, Problem(*inputs[:_FIELDS]), Solution(*output))
    ctx.ranks = inputs[_FIELDS : _FIELDS + 2]


def _backward(ctx: Any, grad_output: Tensor | None, *_: None) -> Any:
    solution, problem = autograd.saved_solved(ctx)
    if grad_output is None:  # the other ranks still need this one's backward
        grad_output = torch.zeros_like(solution.output)
    given = Backward(grad_output, None, solution, problem)
    gradients = torch.ops.setformer_ext.distributed_set_attention_backward(
        *given.arguments(), *ctx.ranks
    )
    of_problem = autograd.gradients_of_inputs(problem, Gradients(*gradients)._asdict())
    return *of_problem, None, None, None  # of group, check and differentiated


def _no_second_backward(ctx: Any, *_: Any) -> Any:
    raise NotImplementedError(
        f"{FUNCTION}: there is no second derivative over the ranks of a group; "
        "setformer_ext.set_attention has one"
    )


torch.library.register_autograd(OPERATION, _backward, setup_context=_setup_context, lib=ops.LIBRARY)
torch.library.register_autograd(BACKWARD, _no_second_backward, lib=ops.LIBRARY)


@register_flop_formula(torch.ops.setformer_ext.distributed_set_attention)
def _flops(*shapes: Any, **_: Any) -> int:
    """Of this rank's tokens."""
    return transforms.set_attention_flops(*shapes[:_FIELDS])


@register_flop_formula(torch.ops.setformer_ext.distributed_set_attention_backward)
def _backward_flops(*shapes: Any, **_: Any) -> int:
    return transforms.set_attention_backward_flops(*shapes[:-2])


# All ranks must make the same calls: a compiler must not drop one whose result a rank does not use.
for _operation in (
    torch.ops.setformer_ext.distributed_set_attention,
    torch.ops.setformer_ext.distributed_set_attention_backward,
):
    _register_effectful_op(_operation.default, _EffectType.ORDERED)
