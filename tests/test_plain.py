"""Calls that go to the kernels directly: only those that nobody else wants to see."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fresh import fresh
from problems import random_problem
from setformer_ext import set_attention
from setformer_ext.plain import is_plain

OPERATION = torch.ops.setformer_ext.set_attention.default


def problem(**options: Any) -> dict[str, Any]:
    return random_problem(N=9, M=3, D=4, dtype=torch.float32, **options)


class Watcher(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


class Wrapped(Tensor):
    """A subclass that may do what it likes with calls."""


CONTEXTS: dict[str, Callable[[], Any]] = {
    "a dispatch mode": Watcher,
    "a function mode": BaseTorchFunctionMode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "the profiler": torch.profiler.profile,
    "forward mode": forward_ad.dual_level,
}


def test_plain_calls_are_plain() -> None:
    tensors = [x for x in problem().values() if isinstance(x, Tensor)]
    assert is_plain(tensors)
    with torch.inference_mode():
        assert is_plain(tensors)
        assert is_plain([x.clone() for x in tensors])
    parameters = [torch.nn.Parameter(x) for x in tensors]
    assert not is_plain(parameters)
    with torch.no_grad():
        assert is_plain(parameters)


@pytest.mark.parametrize("name", CONTEXTS)
def test_who_wants_to_see_calls_sees_them(name: str) -> None:
    with CONTEXTS[name]():
        assert not is_plain([torch.ones(3)])


@pytest.mark.parametrize(
    "x",
    [
        torch.ones(3).as_subclass(Wrapped),
        torch.ones(3, dtype=torch.complex64).conj().imag,
        torch.ones(3, device="meta"),
        torch._efficientzerotensor((3,)),
    ],
    ids=["subclass", "negative bit", "meta", "zero tensor"],
)
def test_tensors_with_something_to_them_are_not_plain(x: Tensor) -> None:
    assert not is_plain([torch.ones(3), x])


def test_modes_and_the_profiler_see_the_operation() -> None:
    arguments = problem()
    with Watcher() as watcher:
        set_attention(**arguments)
    assert OPERATION in watcher.seen
    with torch.profiler.profile() as profile:
        set_attention(**arguments)
    assert "setformer_ext::set_attention" in {event.name for event in profile.events()}


def test_the_answers_are_the_operation_s() -> None:
    arguments = problem(masked=True, token_mass=True, reference_mass="learned")
    with torch.inference_mode():
        plain = set_attention(**arguments)
    watched = Watcher()
    with watched:
        assert torch.equal(set_attention(**arguments), plain)
    assert OPERATION in watched.seen


ONES = torch.ones(2, 9, dtype=torch.bool)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "position_bandwidth": ({"position_bandwidth": -1.0}, "position_bandwidth must be > 0"),
    "masked token": (
        {"mask": ONES & (torch.arange(9) < 8), "token_mass": 7.5 - torch.arange(9).expand(2, 3, 9)},
        "token_mass must be >= 0",
    ),
    "kernel": ({"kernel": b"gaussian"}, "kernel must be"),
    "epsilon": ({"epsilon": 0}, "epsilon must be > 0"),
    "iterations": ({"iterations": True}, "iterations must be an int"),
    "value": ({"value": torch.ones(2, 3, 8, 5)}, r"value must be .*N=9"),
    "type": ({"value": torch.zeros(2, 3, 9, 5, dtype=torch.int64)}, "value must be float32"),
    "query_mask": ({"query_mask": ONES}, "query_mask must be None in self attention"),
}


@pytest.mark.parametrize("name", BAD)
def test_faults_are_named_as_elsewhere(name: str) -> None:
    options, message = BAD[name]
    arguments = problem() | options
    with torch.no_grad(), pytest.raises((TypeError, ValueError), match=f"set_attention: {message}"):
        set_attention(**arguments)


def test_nothing_to_attend_to_is_checked_as_well() -> None:
    arguments = problem(reference_mass="learned")
    empty = {"key": arguments["key"][:0], "value": arguments["value"][:0]}
    with pytest.raises(ValueError, match="reference_mass must be > 0"):
        set_attention(**arguments | empty | {"reference_mass": torch.zeros(3, 3)})


@pytest.mark.slow
@pytest.mark.parametrize("context", ['torch.device("meta")', "FlopCounterMode(display=False)"])
def test_imported_within_a_mode(context: str) -> None:
    code = f"""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    with {context}:
        import setformer_ext
    from setformer_ext.plain import is_plain
    key, reference = torch.ones(1, 1, 5, 4), torch.ones(1, 2, 4)
    with FlopCounterMode(display=False) as counter:
        setformer_ext.set_attention(None, key, key, reference)
    result = [is_plain([key, reference]), counter.get_total_flops() > 0]
    """
    assert fresh(code) == [True, True]
