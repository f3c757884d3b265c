"""setformer_ext.distributed.set_attention in processes of a gloo group, against one process."""

import os
import re
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import setformer_ext
from problems import random_problem
from ranks import PATIENCE, run_on_ranks, values
from setformer_ext.distributed import set_attention
from setformer_ext.distributed.ranks import Ranks

LENGTHS = (20, 0, 77)  # tokens of each rank
OWN = {"key": 2, "value": 2, "token_mass": 2, "mask": 1, "token_positions": 0}
SHARED = ("reference", "reference_mass", "bandwidth", "epsilon")

# In float64: sums of a few hundred numbers of up to a thousand, in another order.
CLOSE = {"rtol": 0, "atol": 1e-11}


def shard(problem: dict[str, Any], lengths: tuple[int, ...], rank: int) -> dict[str, Any]:
    """The rank's part of a problem, whose tensors then are leaves."""
    begin = sum(lengths[:rank])
    own = {
        name: x.narrow(OWN[name], begin, lengths[rank]) if name in OWN else x
        for name, x in problem.items()
        if isinstance(x, Tensor)
    }
    return problem | {
        name: x.detach().clone().requires_grad_(x.is_floating_point() and "positions" not in name)
        for name, x in own.items()
    }


def whole_problem() -> dict[str, Any]:
    return random_problem(
        N=sum(LENGTHS),
        masked=True,
        token_mass=True,
        reference_mass="learned",
        bandwidth="learned",
        epsilon="learned",
        P=2,
    )


def loss_of(output: Tensor) -> Tensor:
    return output.square().sum()


def gradients(problem: dict[str, Any]) -> dict[str, Tensor]:
    return {
        name: x.grad for name, x in problem.items() if isinstance(x, Tensor) and x.grad is not None
    }


def in_one_process() -> tuple[Tensor, dict[str, Tensor]]:
    whole = shard(whole_problem(), (sum(LENGTHS),), 0)
    output = setformer_ext.set_attention(**whole)
    loss_of(output).backward()
    return output.detach(), gradients(whole)


# ---- results ------------------------------------------------------------------------------------


def attend(compiled: bool) -> tuple[Tensor, dict[str, Tensor]]:
    own = shard(whole_problem(), LENGTHS, dist.get_rank())
    function = torch.compile(set_attention, fullgraph=True) if compiled else set_attention
    output = function(**own)
    loss_of(output).backward()
    return output.detach(), gradients(own)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_ranks_together_give_what_one_process_gives(compiled: bool) -> None:
    expected, expected_gradients = in_one_process()
    results = values(run_on_ranks(len(LENGTHS), attend, compiled))
    torch.testing.assert_close(torch.cat([output for output, _ in results], 2), expected, **CLOSE)
    for name, gradient in expected_gradients.items():
        parts = [own[name] for _, own in results]
        found = torch.cat(parts, OWN[name]) if name in OWN else torch.stack(parts).sum(0)
        torch.testing.assert_close(
            found, gradient, **CLOSE, msg=lambda text, n=name: f"{n}: {text}"
        )
    assert set(SHARED) <= set(expected_gradients)


def attend_in_bfloat16(autocast: bool) -> tuple[Tensor, Tensor]:
    own = shard(random_problem(N=sum(LENGTHS), dtype=torch.float32), LENGTHS, dist.get_rank())
    if not autocast:
        for name in ("key", "value", "reference"):
            own[name] = own[name].detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = set_attention(**own)
    loss_of(output.float()).backward()
    return output.detach(), own["key"].grad


def test_autocast_computes_in_its_type() -> None:
    cast = values(run_on_ranks(len(LENGTHS), attend_in_bfloat16, False))
    autocast = values(run_on_ranks(len(LENGTHS), attend_in_bfloat16, True))
    for (output, gradient), (expected, expected_gradient) in zip(autocast, cast, strict=True):
        assert output.dtype == torch.bfloat16
        assert torch.equal(output, expected)
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, expected_gradient.float())


def attend_without_gradient() -> Tensor:
    own = shard(whole_problem(), LENGTHS, dist.get_rank())
    with torch.inference_mode():
        return set_attention(**own).clone()


def test_runs_are_bitwise_the_same() -> None:
    first = values(run_on_ranks(len(LENGTHS), attend_without_gradient))
    again = values(run_on_ranks(len(LENGTHS), attend_without_gradient))
    for x, y in zip(first, again, strict=True):
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


def sent(problem: dict[str, Any]) -> tuple[int, int]:
    """Numbers that this rank sends forward and backward."""
    count = 0
    exchange = Ranks.exchange

    def counted(self: Ranks, numbers: Tensor) -> Tensor:
        nonlocal count
        count += numbers.numel() - numbers.numel() // self.count  # its own part stays
        return exchange(self, numbers)

    Ranks.exchange = counted  # type: ignore[method-assign]
    own = shard(problem, LENGTHS[: dist.get_world_size()], dist.get_rank())
    output = set_attention(**own, check=False)
    forward, count = count, 0
    output.sum().backward()
    return forward, count


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("log_domain", [False, True], ids=["scaling", "log domain"])
def test_ranks_send_what_the_docstring_says(ranks: int, cross: bool, log_domain: bool) -> None:
    B, H, M, Dv, T = 2, 3, 30, 16, 4
    epsilon = 0.01 if log_domain else 0.1
    sizes: dict[str, Any] = {"B": B, "H": H, "N": sum(LENGTHS[:ranks]), "M": M, "Dv": Dv}
    problem = random_problem(**sizes, iterations=T, epsilon=epsilon, dtype=torch.float32)
    if cross:
        problem["query"] = problem["key"][:, :, :5]
    forward = B * H * (T * M + M * Dv + 3 + M * (T * cross + log_domain))
    backward = B * H * ((T - 1) * M + M * (Dv + 1) + 3 + M * ((T - 1) * cross + log_domain))
    for found in values(run_on_ranks(ranks, sent, problem)):
        # Every message is cut into as many parts as there are ranks, the last filled up.
        messages = 2 * (1 + T * (1 + cross) + 2)
        for count, numbers in zip(found, (forward, backward), strict=True):
            assert 0 <= count - 2 * (ranks - 1) * numbers / ranks <= messages * (ranks - 1)


# ---- errors -------------------------------------------------------------------------------------


def attend_to_what_disagrees(changes: dict[int, dict[str, Any]]) -> str:
    own = shard(whole_problem(), LENGTHS, dist.get_rank()) | changes.get(dist.get_rank(), {})
    if "detach" in own:
        own = {n: x.detach() if isinstance(x, Tensor) else x for n, x in own.items()}
        del own["detach"]
    try:
        set_attention(**own)
    except (ValueError, TypeError, RuntimeError) as error:
        set_attention(**shard(whole_problem(), LENGTHS, dist.get_rank()))  # the group still works
        return f"{type(error).__name__}: {error}"
    return "no error"


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
        ({"kernel": "linear"}, r"ValueError: .*kernel must be the same", ""),
        ({"detach": True}, r"ValueError: .*requires_grad of the inputs must be the same", ""),
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
        ({"token_mass": torch.full((2, 3, 77), torch.inf)}, r"ValueError: .*finite sum", "failed"),
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
        others = {"": error, "failed": "another rank of the group failed"}
        expected = others.get(of_others, r"RuntimeError: .*rank 2 of the group refused")
        assert re.search(expected, text), text


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


# ---- together with torch's ways to spread a model -----------------------------------------------


class Block(nn.Module):
    """Projections around attention over a group."""

    def __init__(self, mesh: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.group = mesh
        self.projection = nn.Linear(8, 32)
        self.output = nn.Linear(16, 8)
        self.reference = nn.Parameter(torch.randn(2, 5, 8) / 3)
        self.epsilon = nn.Parameter(torch.full((2,), 0.2))
        self.double()

    def forward(self, x: Tensor) -> Tensor:  # [B, N, 8]
        key, value = self.projection(x).unflatten(-1, (2, 2, 8)).permute(2, 0, 3, 1, 4)
        options: dict[str, Any] = {"epsilon": self.epsilon, "iterations": 3}
        if self.group is None:
            attended = setformer_ext.set_attention(None, key, value, self.reference, **options)
        else:
            attended = set_attention(None, key, value, self.reference, group=self.group, **options)
        result: Tensor = self.output(attended.transpose(1, 2).flatten(2))
        return result


def tokens_of_all() -> Tensor:  # [B, N, 8]
    return torch.randn(2, 10, 8, generator=torch.Generator().manual_seed(1)).double()


def train_on_a_mesh(way: str) -> dict[str, Tensor]:
    """Two ranks for the batch times two for the sequence: the gradient of the mean loss."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("batch", "sequence"))
    batch, sequence = mesh.get_coordinate()
    x = tokens_of_all()[batch : batch + 1, (0, 3)[sequence] : (3, 10)[sequence]]
    block = Block(mesh["sequence"])
    # The gradients of all four are averaged: times four they are the gradient of the sum.
    model: Any = block
    if way == "DDP":
        model = DistributedDataParallel(block)
    elif way == "FSDP2":
        model = fully_shard(block, mesh=mesh["batch", "sequence"]._flatten())
    elif way == "HSDP":
        model = fully_shard(block, mesh=mesh["batch", "sequence"])
    (4 * model(x).square().sum()).backward()
    found = {}
    for name, parameter in block.named_parameters():
        gradient = parameter.grad
        assert gradient is not None
        found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return found


@pytest.mark.parametrize("way", ["DDP", "FSDP2", "HSDP"])
def test_training_on_a_mesh_of_batch_and_sequence(way: str) -> None:
    whole = Block()
    whole(tokens_of_all()).square().sum().backward()
    for found in values(run_on_ranks(4, train_on_a_mesh, way)):
        for name, parameter in whole.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, **CLOSE)


def attend_to_dtensors(batch: bool) -> tuple[Tensor, dict[str, Tensor]]:
    names = ("batch", "sequence") if batch else ("heads", "sequence")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
    problem = dtensor_problem()
    own: dict[str, Any] = dict(problem)
    for name, x in problem.items():
        if not isinstance(x, Tensor):
            continue
        first: Any = Shard(0) if name in OWN and name != "token_positions" else Replicate()
        if not batch:
            first = Shard(1) if name in ("key", "value", "token_mass") else Replicate()
            if name in ("reference", "reference_mass", "epsilon"):
                first = Shard(0)
        second = Shard(OWN[name]) if name in OWN else Replicate()
        own[name] = distribute_tensor(x, mesh, [first, second]).requires_grad_(
            x.is_floating_point() and "positions" not in name
        )
    output = set_attention(**own)
    assert output.placements == own["key"].placements
    loss_of(output).sum().backward()
    return output.full_tensor().detach(), {
        name: x.grad.full_tensor()
        for name, x in own.items()
        if isinstance(x, DTensor) and x.grad is not None
    }


def dtensor_problem() -> dict[str, Any]:
    """13 tokens are no multiple of 2."""
    return random_problem(
        N=13,
        H=2,
        masked=True,
        token_mass=True,
        reference_mass="learned",
        epsilon="learned",
        P=2,
    )


@pytest.mark.parametrize("batch", [True, False], ids=["batch", "heads"])
def test_dtensors(batch: bool) -> None:
    whole = shard(dtensor_problem(), (13,), 0)
    expected = setformer_ext.set_attention(**whole)
    loss_of(expected).backward()
    for output, found in values(run_on_ranks(4, attend_to_dtensors, batch)):
        torch.testing.assert_close(output, expected.detach(), **CLOSE)
        for name, gradient in gradients(whole).items():
            torch.testing.assert_close(found[name], gradient, **CLOSE)


def wrong_dtensors() -> list[str]:
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("sequence",))
    problem = random_problem(N=5)

    def spread(name: str, placement: Any) -> DTensor:
        return distribute_tensor(problem[name], mesh, [placement])

    fitting = {
        "key": spread("key", Shard(2)),
        "value": spread("value", Shard(2)),
        "reference": spread("reference", Replicate()),
    }
    errors = []
    for change in (
        {"key": spread("key", Replicate())},
        {"value": problem["value"]},
        {"value": spread("value", Shard(1))},
        {"reference": spread("reference", Shard(0))},
        {"group": mesh},
    ):
        with pytest.raises((TypeError, ValueError)) as caught:
            set_attention(**problem | fitting | change)
        errors.append(str(caught.value))
    return errors


def test_errors_of_dtensors() -> None:
    (errors,) = values(run_on_ranks(1, wrong_dtensors))
    for error, expected in zip(
        errors,
        (
            "key must be sharded on its tokens",
            "value must be a DTensor where others are, got a plain tensor",
            "value must be .*2.* over dimension 0 of the mesh",
            "reference must be R.* over dimension 0",
            "group must be None for DTensors",
        ),
        strict=True,
    ):
        assert re.search(expected, error), error
