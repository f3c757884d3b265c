"""setformer_ext.distributed.set_attention in processes of a gloo group, against one process."""

import os
import re
import time
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import setformer_ext
from ranks import CLOSE, PATIENCE, gradients, loss_of, run_on_ranks, shard, values
from setformer_ext.cli.selftest.problems import random_problem
from setformer_ext.distributed import set_attention
from setformer_ext.distributed.ranks import Ranks, checksum
from setformer_ext.problem import OF_KEYS, OF_QUERIES

LENGTHS = (20, 0, 77)  # tokens of each rank
QUERIES = (3, 30, 0)  # in cross attention

PROBLEMS: dict[str, dict[str, Any]] = {
    "everything": {
        "masked": True,
        "token_mass": True,
        "reference_mass": "learned",
        "bandwidth": "learned",
        "epsilon": "learned",
        "P": 2,
    },
    "cross": {"Nq": sum(QUERIES), "masked": True, "iterations": 2},
    "log domain": {"epsilon": 0.003, "per_sample": True},
    "linear": {"kernel": "linear", "iterations": 2},
    "no step": {"iterations": 0},
}


def whole_problem(name: str = "everything", **options: Any) -> dict[str, Any]:
    return random_problem(N=sum(LENGTHS), **PROBLEMS[name] | options)


# ---- results ------------------------------------------------------------------------------------


def in_one_process(name: str) -> tuple[Tensor, dict[str, Tensor]]:
    whole = shard(whole_problem(name), (sum(LENGTHS),), 0, (sum(QUERIES),))
    output = setformer_ext.set_attention(**whole)
    loss_of(output).backward()
    return output.detach(), gradients(whole)


def attend(name: str, way: str) -> tuple[Tensor, dict[str, Tensor]]:
    own = shard(whole_problem(name), LENGTHS, dist.get_rank(), QUERIES)
    function: Any = set_attention
    if way == "compiled":
        function = torch.compile(set_attention, fullgraph=True)
    elif way == "checkpointed":
        function = partial(checkpoint, set_attention, use_reentrant=False)
    elif way == "unchecked":
        function = partial(set_attention, check=False, group=init_device_mesh("cpu", (3,)))
    output = function(**own)
    loss_of(output).backward()
    return output.detach(), gradients(own)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "way"),
    [(name, "eager") for name in PROBLEMS]
    + [("everything", way) for way in ("compiled", "checkpointed", "unchecked")],
)
def test_ranks_together_give_what_one_process_gives(name: str, way: str) -> None:
    expected, expected_gradients = in_one_process(name)
    results = values(run_on_ranks(len(LENGTHS), attend, name, way))
    torch.testing.assert_close(torch.cat([output for output, _ in results], 2), expected, **CLOSE)
    tokens = OF_KEYS | OF_QUERIES
    for of, gradient in expected_gradients.items():
        parts = [own[of] for _, own in results]
        found = torch.cat(parts, tokens[of]) if of in tokens else torch.stack(parts).sum(0)
        torch.testing.assert_close(found, gradient, **CLOSE, msg=lambda text, n=of: f"{n}: {text}")
    assert expected_gradients.keys() >= {"key", "value", "reference"}


def attend_twice(reorder: bool) -> Any:
    """Two calls of which neither needs the other, which Inductor orders by the sizes of a rank."""
    torch._inductor.config.reorder_for_peak_memory = reorder
    rank = dist.get_rank()
    few, many = (torch.randn(1, 2, n, 4) for n in ((4, 4096) if rank == 0 else (4096, 4)))
    few, many = few.requires_grad_(), many.requires_grad_()
    references = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0))

    def loss(x: Tensor, y: Tensor) -> Tensor:
        first = set_attention(None, x.sin(), x.sin(), references[0], normalize=False)
        second = set_attention(None, y.sin(), y.sin(), references[1], normalize=False)
        return loss_of(first) + loss_of(second)

    expected = torch.autograd.grad(loss(few, many), (few, many))
    try:
        found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(few, many), (few, many))
    except ValueError as error:
        return str(error)
    return [
        ((x - y).abs().max() / y.abs().max()).item() for x, y in zip(found, expected, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("reorder", [False, True])
def test_compiled_calls_are_in_one_order_or_raise(reorder: bool) -> None:
    for found in values(run_on_ranks(2, attend_twice, reorder)):
        if isinstance(found, str):
            assert reorder
            assert "the call that backward is of must be the same on all ranks" in found
        else:
            assert max(found) < 1e-5


def attend_for_nothing() -> float:
    """The output of one rank is of no use to it."""
    own = shard(whole_problem(), LENGTHS, dist.get_rank())

    def sum_of_output(key: Tensor, value: Tensor) -> Tensor:
        output = set_attention(**own | {"key": key, "value": value})
        return output.sum() if dist.get_rank() == 0 else value.sum()

    with torch.no_grad():
        compiled = torch.compile(sum_of_output, fullgraph=True)
        return abs(compiled(own["key"], own["value"]) - sum_of_output(own["key"], own["value"]))


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < (2, 10), reason="torch 2.9 leaves them out")
def test_compiled_calls_are_not_left_out() -> None:
    assert max(values(run_on_ranks(len(LENGTHS), attend_for_nothing))) < 1e-9


def attend_in_bfloat16(autocast: bool) -> tuple[Tensor, Tensor]:
    own = shard(random_problem(N=sum(LENGTHS), dtype=torch.float32), LENGTHS, dist.get_rank())
    if not autocast:
        for name in ("key", "value", "reference"):
            own[name] = own[name].detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = set_attention(**own)
    loss_of(output.float()).backward()
    return output.detach(), own["key"].grad


@pytest.mark.slow
def test_autocast_computes_in_its_type() -> None:
    cast = values(run_on_ranks(len(LENGTHS), attend_in_bfloat16, False))
    autocast = values(run_on_ranks(len(LENGTHS), attend_in_bfloat16, True))
    for (output, gradient), (expected, expected_gradient) in zip(autocast, cast, strict=True):
        assert output.dtype == torch.bfloat16
        assert torch.equal(output, expected)
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, expected_gradient.float())


def attend_in_float32(name: str) -> list[Tensor]:
    own = shard(whole_problem(name, dtype=torch.float32), LENGTHS, dist.get_rank(), QUERIES)
    with torch.inference_mode():
        alone = set_attention(**own).clone()
    output = set_attention(**own)
    loss_of(output).backward()
    return [alone, output.detach(), *gradients(own).values()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["everything", "cross", "log domain"])
def test_runs_are_bitwise_the_same(name: str) -> None:
    first = values(run_on_ranks(len(LENGTHS), attend_in_float32, name))
    again = values(run_on_ranks(len(LENGTHS), attend_in_float32, name))
    for found, expected in zip(first, again, strict=True):
        assert len(found) > 4
        assert torch.equal(found[0], found[1])
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x, y)


def second_derivative() -> str:
    own = shard(random_problem(N=sum(LENGTHS)), LENGTHS, dist.get_rank())
    output = set_attention(**own)
    (gradient,) = torch.autograd.grad(loss_of(output), own["value"], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative") as caught:
        gradient.sum().backward()
    return str(caught.value)


def test_there_are_no_second_derivatives() -> None:
    assert all("set_attention" in text for text in values(run_on_ranks(2, second_derivative)))


@pytest.mark.parametrize("transform", [torch.func.grad, torch.vmap])
def test_there_are_no_transforms(transform: Any) -> None:
    own = random_problem(N=5)
    key = own.pop("key")
    loss = transform(lambda key: set_attention(key=key, **own).sum())
    with pytest.raises(NotImplementedError, match=r"transforms of torch\.func"):
        loss(key)


def operations_of_all() -> int:
    own = shard(random_problem(N=sum(LENGTHS)), LENGTHS, dist.get_rank())
    with FlopCounterMode(display=False) as counter:
        set_attention(**own).sum().backward()
    return counter.get_total_flops()


def test_floating_point_operations_are_those_of_the_rank() -> None:
    whole = random_problem(N=sum(LENGTHS))
    inputs = [whole[name].requires_grad_() for name in ("key", "value")]
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(setformer_ext.set_attention(**whole).sum(), inputs)
    assert sum(values(run_on_ranks(3, operations_of_all))) == counter.get_total_flops()


# ---- what is sent -------------------------------------------------------------------------------


def sent(problem: dict[str, Any]) -> tuple[float, float]:
    """Numbers that this rank sends forward and backward."""
    own = shard(problem, LENGTHS[: dist.get_world_size()], dist.get_rank(), (2, 3, 0))
    before = Ranks.bytes_sent
    output = set_attention(**own, check=False)
    forward = Ranks.bytes_sent
    output.sum().backward()
    size = output.element_size()
    return (forward - before) / size, (Ranks.bytes_sent - forward) / size


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "cross", "T", "epsilon", "dtype"),
    [
        (1, False, 4, 0.1, torch.float32),
        (2, False, 4, 0.1, torch.float32),
        (3, False, 4, 0.01, torch.float32),
        (3, True, 4, 0.1, torch.float32),
        (3, True, 2, 0.01, torch.float32),
        (3, False, 0, 0.1, torch.float32),
        (2, False, 2, 0.01, torch.float64),
        (2, False, 2, 0.003, torch.float64),
    ],
)
def test_ranks_send_what_the_docstring_says(
    ranks: int, cross: bool, T: int, epsilon: float, dtype: torch.dtype
) -> None:
    B, H, M, Dv, S = 2, 3, 30, 16, max(T, 1)
    log_domain = epsilon < (1 / 32 if dtype == torch.float32 else 1 / 256)
    sizes: dict[str, Any] = {"B": B, "H": H, "N": sum(LENGTHS[:ranks]), "M": M, "Dv": Dv}
    problem = random_problem(**sizes, iterations=T, epsilon=epsilon, dtype=dtype)
    if cross:
        problem["query"] = problem["key"][:, :, :5]
    forward = B * H * (S * M + M * Dv + 3 + M * (S * cross + log_domain))
    backward = B * H * ((S - 1) * M + M * (Dv + 1) + 3 + M * ((S - 1) * cross + log_domain))
    for found in values(run_on_ranks(ranks, sent, problem)):
        # Every message is cut into as many parts as there are ranks, the last filled up.
        messages = 2 * (1 + S * (1 + cross) + 2)
        for count, numbers in zip(found, (forward, backward), strict=True):
            assert 0 <= count - 2 * (ranks - 1) * numbers / ranks <= messages * (ranks - 1)


# ---- errors -------------------------------------------------------------------------------------


def attend_to_what_disagrees(changes: dict[int, dict[str, Any]]) -> str:
    own = shard(whole_problem(), LENGTHS, dist.get_rank()) | changes.get(dist.get_rank(), {})
    if own.pop("detach", False):
        own = {name: x.detach() if isinstance(x, Tensor) else x for name, x in own.items()}
    if (dtype := own.pop("dtype", None)) is not None:
        storage = ("key", "value", "reference")
        own |= {name: own[name].detach().to(dtype).requires_grad_() for name in storage}
    try:
        set_attention(**own)
    except Exception as error:
        set_attention(**shard(whole_problem(), LENGTHS, dist.get_rank()))  # the group still works
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "error", "of_others"),
    [
        ({"iterations": 4}, r"ValueError: .*iterations must be the same .* 5 on rank 0 and 4", ""),
        ({"epsilon": 0.2}, r"ValueError: .*epsilon must be the same on all ranks", ""),
        (
            {"reference": torch.ones(3, 7, 8).double()},
            r"ValueError: .*reference must be the same",
            "",
        ),
        ({"reference_mass": None}, r"ValueError: .*whether reference_mass is given", ""),
        (
            {
                "query": torch.ones(2, 3, 4, 8).double(),
                "query_positions": torch.ones(4, 2).double(),
            },
            r"ValueError: .*whether query is given must be .* False on rank 0 and True on rank 2",
            "",
        ),
        ({"kernel": "linear"}, r"ValueError: .*kernel must be .* 'gaussian' .* 'linear'", ""),
        (
            {"position_bandwidth": 1.5},
            r"ValueError: .*position_bandwidth must .* 1.5 on rank 2",
            "",
        ),
        ({"normalize": True}, r"ValueError: .*normalize must .* False on rank 0 and True on", ""),
        ({"dtype": torch.float32}, r"ValueError: .*the type of the key .* float64 .* float32", ""),
        ({"bandwidth": 10**400}, r"OverflowError: ", "refused"),
        ({"detach": True}, r"ValueError: .*whether a gradient is wanted must .*True.*False", ""),
        (
            {"value": torch.ones(2, 3, 77, 6).double()},
            r"ValueError: .*depth Dv of the value must be",
            "",
        ),
        (
            {"value": torch.ones(2, 3, 78, 5).double()},
            r"ValueError: .*value must be \[B=2",
            "refused",
        ),
        ({"mask": "yes"}, r"TypeError: .*mask must be a bool tensor, got str", "refused"),
        ({"key": None}, r"TypeError: .*key must be a tensor", "refused"),
        ({"token_mass": -torch.ones(2, 3, 77)}, r"ValueError: .*token_mass must", "refused"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_ranks_that_do_not_fit_all_raise(
    change: dict[str, Any], error: str, of_others: str
) -> None:
    found = values(run_on_ranks(3, attend_to_what_disagrees, {2: change}))
    assert re.search(error, found[2]), found[2]
    for text in found[:2]:
        expected = r"RuntimeError: .*rank 2 of the group refused" if of_others else error
        assert re.search(expected, text), text


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_checksums_are_of_values_and_their_order(dtype: torch.dtype) -> None:
    x = torch.arange(1, 7).to(dtype).view(2, 3)
    changed = [x.flip(0), x.flip(1), x.roll(1, 1), x.roll(1, 0)]
    changed += [x.masked_fill(torch.arange(6).view(2, 3) == i, 9) for i in range(6)]
    sums = [checksum(x), *map(checksum, changed)]
    assert torch.equal(checksum(x.T.contiguous().T), sums[0])  # wherever it lies in memory
    assert all(not torch.equal(sums[0], other) for other in sums[1:])


def attend_until_one_dies(backward: bool) -> str:
    own = shard(whole_problem(), LENGTHS, dist.get_rank())
    for step in range(20):
        if dist.get_rank() == 1 and step == 10 and not backward:
            os._exit(1)
        output = set_attention(**own)
        if dist.get_rank() == 1 and step == 10:
            os._exit(1)
        output.sum().backward()
    return "no error"


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_rank_that_dies_is_missed_by_all(backward: bool) -> None:
    start = time.monotonic()
    first, dead, last = run_on_ranks(3, attend_until_one_dies, backward)
    assert isinstance(dead, ConnectionAbortedError)
    for error in (first, last):
        assert isinstance(error, RuntimeError), error
    assert time.monotonic() - start < PATIENCE / 2, "they waited for the group's timeout"


def test_a_group_is_needed() -> None:
    problem = random_problem(N=5)
    with pytest.raises(RuntimeError, match="init_process_group first"):
        set_attention(**problem)


def wrong_groups() -> list[str]:
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("batch", "sequence"))
    errors = []
    for group in (mesh, "sequence", 3):
        with pytest.raises((TypeError, ValueError)) as caught:
            set_attention(**random_problem(N=5), group=group)  # type: ignore[arg-type]
        errors.append(str(caught.value))
    assert set_attention(**random_problem(N=5), group=mesh["sequence"]).shape == (2, 3, 5, 5)
    return errors


def test_errors_of_the_group() -> None:
    (errors,) = values(run_on_ranks(1, wrong_groups))
    assert "group must be a mesh of one dimension, got 2" in errors[0]
    assert "group must be a process group" in errors[1]
    assert "got int" in errors[2]
