"""Calls that go to the kernels directly: only those that nobody else wants to see."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

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


class FunctionWatcher(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


class Wrapped(Tensor):
    """A subclass that may do what it likes with calls."""


@contextmanager
def dual() -> Iterator[None]:
    with forward_ad.dual_level():
        yield


CONTEXTS: dict[str, Callable[[], Any]] = {
    "a dispatch mode": Watcher,
    "a function mode": FunctionWatcher,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "the profiler": torch.profiler.profile,
    "forward mode": dual,
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
