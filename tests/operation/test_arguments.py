"""Which calls the compiled module checks alone, and that its refusals are named as others."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fresh import fresh
from setformer_ext import functional, set_attention, transport_plan
from setformer_ext.arguments import seen_by_kernels
from setformer_ext.cli.selftest.problems import call, random_problem

OPERATION = torch.ops.setformer_ext.set_attention.default


def problem(**options: Any) -> dict[str, Any]:
    return random_problem(N=9, M=3, D=4, dtype=torch.float32, **options)


def given(**options: Any) -> dict[str, Any]:
    return {"query": None, **functional.DEFAULTS, **problem(), **options}


class Watcher(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


class Wrapped(Tensor):
    """A subclass that may do what it likes with calls."""


def test_eager_calls_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the compiled module."""
    monkeypatch.setattr(functional, "check", pytest.fail)
    learned = {"reference_mass": "learned", "bandwidth": "learned", "epsilon": "learned"}
    for options in ({}, {"masked": True}, {"token_mass": True} | learned, {"Nq": 4}):
        arguments = problem(**options)
        set_attention(**arguments)
        with torch.inference_mode():
            set_attention(**arguments)
        arguments["key"].requires_grad_()
        set_attention(**arguments).sum().backward()


@pytest.mark.parametrize(
    "options",
    [
        {"key": torch.ones(2, 3, 9, 4).as_subclass(Wrapped)},
        {"key": torch.ones(2, 3, 9, 4, device="meta")},
        {"key": torch.ones(0, 3, 9, 4)},
        {"value": torch.ones(2, 3, 9, 5, device="meta")},
        {"token_positions": torch.ones(9, 2)},
        {"position_bandwidth": 1.0},
        {"query_mask": torch.ones(2, 9, dtype=torch.bool)},
        {"mask": torch.ones(2, 9, dtype=torch.bool), "token_mass": torch.ones(2, 3, 9)},
        {"iterations": True},
        {"normalize": 1},
        {"epsilon": torch.ones(3, dtype=torch.int64)},
        {"bandwidth": True},
        {"bandwidth": float("nan")},
        {"epsilon": float("inf")},
    ],
    ids=lambda options: ", ".join(options),
)
def test_what_the_compiled_module_would_not_see(options: dict[str, Any]) -> None:
    assert seen_by_kernels(given())
    assert not seen_by_kernels(given(**options))


def test_where_the_compiled_module_is_not_called() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert not seen_by_kernels(given())
    with FakeTensorMode() as mode:
        fake = {n: mode.from_tensor(x) if isinstance(x, Tensor) else x for n, x in given().items()}
        assert not seen_by_kernels(fake)
    seen = []
    torch.func.grad(lambda x: seen.append(seen_by_kernels(given(key=x))) or x.sum())(
        problem()["key"]
    )
    assert seen == [False]


def test_modes_and_the_profiler_see_the_operation() -> None:
    arguments = problem()
    with Watcher() as watcher:
        set_attention(**arguments)
    assert OPERATION in watcher.seen
    with torch.profiler.profile() as profile:
        set_attention(**arguments)
    assert "setformer_ext::set_attention" in {event.name for event in profile.events()}


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


@pytest.mark.parametrize("name", ["bandwidth", "epsilon", "token_mass", "reference_mass"])
def test_values_of_a_plan_that_cannot_be_read_become_nan(name: str) -> None:
    arguments = problem(
        token_mass=True, reference_mass="learned", bandwidth="learned", epsilon="learned"
    )

    def plan(x: Tensor) -> Tensor:
        return call(transport_plan, arguments | {name: x})

    bad = arguments[name].clone()
    bad.view(-1)[0] = -1
    assert torch.func.vmap(plan)(bad.unsqueeze(0)).isnan().any()
    assert not torch.func.vmap(plan)(arguments[name].unsqueeze(0)).isnan().any()


def test_plans_have_shapes_without_numbers() -> None:
    key, reference = problem()["key"].to("meta"), problem()["reference"].to("meta")
    plan = transport_plan(key, reference)
    assert (plan.device.type, plan.shape) == ("meta", (2, 3, 9, 3))


@pytest.mark.slow
@pytest.mark.parametrize("context", ['torch.device("meta")', "FlopCounterMode(display=False)"])
def test_imported_within_a_mode(context: str) -> None:
    code = f"""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    with {context}:
        import setformer_ext
    key, reference = torch.ones(1, 1, 5, 4), torch.ones(1, 2, 4)
    with FlopCounterMode(display=False) as counter:
        setformer_ext.set_attention(None, key, key, reference)
    result = counter.get_total_flops()
    """
    assert fresh(code) > 0
