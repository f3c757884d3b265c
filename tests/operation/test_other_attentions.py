"""What people bring from other attentions is understood, or answered in this one's words."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import setformer_ext
import setformer_ext.numpy
from fresh import fresh
from setformer_ext import set_attention
from setformer_ext.cli.selftest.problems import random_problem
from setformer_ext.foreign import FOREIGN_NAMES

KEY, REFERENCE = torch.randn(2, 4, 9, 8), torch.randn(4, 3, 8)
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "set_attention": lambda **names: set_attention(None, KEY, KEY, REFERENCE, **names),
    "set_pooling": lambda **names: setformer_ext.set_pooling(KEY, KEY, REFERENCE, **names),
    "transport_plan": lambda **names: setformer_ext.transport_plan(KEY, REFERENCE, **names),
    "set_attention_varlen": lambda **names: setformer_ext.set_attention_varlen(
        None, KEY[0], KEY[0], REFERENCE, torch.tensor([0, 4]), **names
    ),
    "distributed.set_attention": lambda **names: setformer_ext.distributed.set_attention(
        None, KEY, KEY, REFERENCE, **names
    ),
    "numpy.set_attention": lambda **names: setformer_ext.numpy.set_attention(
        None, KEY.numpy(), KEY.numpy(), REFERENCE.numpy(), **names
    ),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", FOREIGN_NAMES)
def test_names_are_answered(name: str, function: str) -> None:
    with pytest.raises(TypeError, match=f"has no argument {name}: .{{20,}}"):
        FUNCTIONS[function](**{name: None})


@pytest.mark.parametrize("function", FUNCTIONS)
def test_other_unknown_names_are_python_s(function: str) -> None:
    with pytest.raises(TypeError, match=r"unexpected .*argument 'epsilno'"):
        FUNCTIONS[function](epsilno=0.1)


@pytest.mark.parametrize("per_sample", [False, True])
def test_tokens_before_heads_are_recognised(per_sample: bool) -> None:
    """[B, N, H, D], as flash-attention has it, by what does not fit."""
    key, reference = KEY.transpose(1, 2), REFERENCE
    if per_sample:
        reference = reference.expand(2, 4, 3, 8)
    with pytest.raises(ValueError, match=r"key looks like \[B, N, H, D\].* key\.transpose\(1, 2\)"):
        set_attention(None, key, key, reference)
    for value in (key, KEY):
        with pytest.raises(ValueError, match=r"value or key looks like \[B, N, H, D\]"):
            set_attention(None, value.transpose(1, 2), value, reference)
    for query, other in ((torch.randn(2, 7, 4, 8), KEY), (torch.randn(2, 7, 4, 8), key)):
        with pytest.raises(ValueError, match=r"query or key looks like \[B, N, H, D\]"):
            set_attention(query, other, other, reference)


def test_packed_sequences_have_tokens_first() -> None:
    with pytest.raises(ValueError, match=r"reference must be \[H=9, M, D=8\].*got \[4, 3, 8\]$"):
        setformer_ext.set_attention_varlen(None, KEY[0], KEY[0], REFERENCE, torch.tensor([0, 4]))


@pytest.mark.parametrize("tokens", [4, 5])
def test_no_layout_is_guessed_where_another_size_is_wrong(tokens: int) -> None:
    key = torch.randn(2, 4, tokens, 8)
    with pytest.raises(ValueError, match=r"reference must be .*got \[3, 3, 8\]$"):
        set_attention(None, key, key, torch.randn(3, 3, 8))
    with pytest.raises(ValueError, match=r"value must be .*got \[2, 3, 6, 8\]$"):
        set_attention(None, key, torch.randn(2, 3, 6, 8), REFERENCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8, torch.bfloat16])
def test_masks_of_numbers_are_refused_with_what_to_do(dtype: torch.dtype) -> None:
    """0 is padding in one kind and valid in the other: none is guessed."""
    for name in ("mask", "query_mask"):
        mask = {name: torch.zeros(2, 9, dtype=dtype)}
        with pytest.raises(TypeError, match=rf"{name} must be a bool tensor.*\.bool\(\).*x == 0"):
            set_attention(KEY.clone(), KEY, KEY, REFERENCE, **mask)


def attend(key: Tensor) -> Tensor:
    return set_attention(None, key, key, REFERENCE.double(), iterations=2)


FORWARD_MODE: dict[str, Callable[[Tensor], object]] = {
    "jvp": lambda key: torch.func.jvp(attend, (key,), (key,)),
    "jacfwd": lambda key: torch.func.jacfwd(attend)(key),
    "hessian": lambda key: torch.func.hessian(lambda x: attend(x).sum())(key),
    "a backward's": lambda key: torch.func.jvp(
        torch.func.grad(lambda x: attend(x).sum()), (key,), (key,)
    ),
    "pooling": lambda key: torch.func.jvp(
        lambda x: setformer_ext.set_pooling(x, x, REFERENCE.double()), (key,), (key,)
    ),
}


def test_forward_mode_of_a_plan_is_there() -> None:
    """By torch.func and by dual numbers, against a difference."""
    key, tangent = torch.randn(2, 1, 4, 7, 8, dtype=torch.float64)

    def plan(x: Tensor) -> Tensor:
        return setformer_ext.transport_plan(x, REFERENCE.double())

    step = 1e-6 * tangent
    known = (plan(key + step) - plan(key - step)) / 2e-6
    torch.testing.assert_close(
        torch.func.jvp(plan, (key,), (tangent,))[1], known, rtol=0, atol=1e-8
    )
    with forward_ad.dual_level():
        dual = plan(forward_ad.make_dual(key, tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, known, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", FORWARD_MODE)
def test_forward_mode_says_that_it_is_not_there(name: str) -> None:
    with pytest.raises(NotImplementedError, match=r"no forward-mode derivatives.*jacrev"):
        FORWARD_MODE[name](KEY.double())


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_dual_numbers_are_not_dropped(normalize: bool, requires_grad: bool) -> None:
    key = KEY.double().requires_grad_(requires_grad)
    with forward_ad.dual_level():
        set_attention(None, key, key, REFERENCE.double(), normalize=normalize)  # none is one
        dual = forward_ad.make_dual(key, torch.ones_like(key))
        with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
            set_attention(None, dual, dual, REFERENCE.double(), normalize=normalize)


def test_what_the_message_advises_works() -> None:
    key = KEY[:1, :, :2].double()

    def of(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: function(None, x, x, REFERENCE.double(), iterations=2).square().sum()

    hessian = torch.func.jacrev(torch.func.jacrev(of(set_attention)))(key)
    expected = torch.func.hessian(of(setformer_ext.reference.set_attention))(key)
    torch.testing.assert_close(hessian, expected)


def test_numbers_of_numpy() -> None:
    problem = random_problem(N=9, M=3, P=2)
    numbers = {
        "iterations": np.int64(2),
        "epsilon": np.float32(0.25),
        "bandwidth": np.float64(1.5),
        "position_bandwidth": np.float32(2),
    }
    plain = {name: x.item() for name, x in numbers.items()}
    assert torch.equal(set_attention(**problem | numbers), set_attention(**problem | plain))
    for name in numbers:
        with pytest.raises(TypeError, match=f"{name} must be an? "):
            set_attention(**problem | {name: np.bool_(True)})


@pytest.mark.slow
def test_imported_again_after_removal() -> None:
    """As notebooks and test runners do; what was made before goes on working."""
    code = """
    import sys
    import torch
    key, reference = torch.randn(2, 2, 5, 4), torch.randn(2, 3, 4)

    def use():
        import setformer_ext.distributed, setformer_ext.vision, setformer_ext.language
        from torch.utils.flop_counter import FlopCounterMode
        setformer_ext.language.register()
        attend = lambda key: setformer_ext.set_attention(None, key, key, reference)
        x = key.clone().requires_grad_()
        attend(x).square().sum().backward()
        mapped = torch.func.vmap(attend)(key.unsqueeze(0))
        with torch.autocast("cpu", torch.bfloat16):
            cast = attend(key)
        with FlopCounterMode(display=False) as counter:
            attend(key)
        plan = setformer_ext.transport_plan(key, reference)
        return attend, [x.grad, mapped, cast.float(), plan, torch.tensor(counter.get_total_flops())]

    before, expected = use()
    for name in [name for name in sys.modules if name.partition(".")[0] == "setformer_ext"]:
        del sys.modules[name]
    after, found = use()
    result = [torch.equal(x, y) for x, y in zip(expected, found)]
    result.append(torch.equal(before(key), after(key)))
    """
    assert fresh(code) == [True] * 6
