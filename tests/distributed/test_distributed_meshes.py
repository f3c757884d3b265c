"""setformer_ext.distributed.set_attention on meshes: beside DDP and FSDP2, and with DTensors."""

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.nn.parallel import DistributedDataParallel

import setformer_ext
from ranks import CLOSE, gradients, loss_of, run_on_ranks, shard, values
from setformer_ext.cli.selftest.problems import differentiable, random_problem
from setformer_ext.distributed import set_attention
from setformer_ext.problem import OF_KEYS, OF_QUERIES


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


@pytest.mark.slow
@pytest.mark.parametrize("way", ["DDP", "FSDP2", "HSDP"])
def test_training_on_a_mesh_of_batch_and_sequence(way: str) -> None:
    whole = Block()
    whole(tokens_of_all()).square().sum().backward()
    for found in values(run_on_ranks(4, train_on_a_mesh, way)):
        for name, parameter in whole.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, **CLOSE)


def attend_to_dtensors(batch: bool, compiled: bool) -> tuple[Tensor, dict[str, Tensor]]:
    names = ("batch", "sequence") if batch else ("heads", "sequence")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
    problem = dtensor_problem()
    own: dict[str, Any] = dict(problem)
    for name, x in problem.items():
        if not isinstance(x, Tensor):
            continue
        of_tokens = name in OF_KEYS | OF_QUERIES
        first: Any = Shard(0) if of_tokens and "positions" not in name else Replicate()
        if not batch:
            first = Shard(1) if name in ("query", "key", "value", "token_mass") else Replicate()
            if name in ("reference", "reference_mass", "epsilon"):
                first = Shard(0)
        second = Shard((OF_KEYS | OF_QUERIES)[name]) if of_tokens else Replicate()
        own[name] = distribute_tensor(x, mesh, [first, second]).requires_grad_(
            x.is_floating_point() and "positions" not in name
        )
    function: Any = torch.compile(set_attention, fullgraph=True) if compiled else set_attention
    output = function(**own)
    assert output.placements == own["key"].placements
    own_output = output.to_local()
    assert own_output.numel() == 0 or own_output.is_contiguous() == output.is_contiguous()
    loss_of(output).sum().backward()
    return output.full_tensor().detach(), {
        name: x.grad.full_tensor()
        for name, x in own.items()
        if isinstance(x, DTensor) and x.grad is not None
    }


def dtensor_problem(**options: Any) -> dict[str, Any]:
    """13 tokens and 7 queries are no multiples of 2; heads lie beside each other in memory."""
    everything: dict[str, Any] = {
        "N": 13,
        "Nq": 7,
        "H": 2,
        "masked": True,
        "token_mass": True,
        "reference_mass": "learned",
        "epsilon": "learned",
        "P": 2,
    }
    problem = random_problem(**everything | options)
    for name in ("query", "key", "value"):
        problem[name] = problem[name].transpose(1, 2).contiguous().transpose(1, 2)
    return problem


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "compiled"), [(True, False), (False, False), (True, True)])
def test_dtensors(batch: bool, compiled: bool) -> None:
    whole = shard(dtensor_problem(), (13,), 0, (7,))
    expected = setformer_ext.set_attention(**whole)
    loss_of(expected).backward()
    for output, found in values(run_on_ranks(4, attend_to_dtensors, batch, compiled)):
        torch.testing.assert_close(output, expected.detach(), **CLOSE)
        for name, gradient in gradients(whole).items():
            torch.testing.assert_close(found[name], gradient, **CLOSE)


def refuse_a_dtensor() -> str:
    """One rank's value is a plain tensor."""
    mesh = init_device_mesh("cpu", (2,))
    problem = random_problem(N=6)
    own = {
        name: distribute_tensor(
            problem[name], mesh, [Replicate() if name == "reference" else Shard(2)]
        )
        for name in ("key", "value", "reference")
    }
    if dist.get_rank() == 1:
        own["value"] = own["value"].to_local()
    with pytest.raises((TypeError, RuntimeError)) as caught:
        set_attention(None, **own)
    return str(caught.value)


def test_a_rank_that_refuses_a_dtensor_tells_the_others() -> None:
    first, second = values(run_on_ranks(2, refuse_a_dtensor))
    assert "rank 1 of the group refused its arguments" in first
    assert "value must be a DTensor as the key is" in second


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
        {"key": problem["key"]},
        {"key": DTensor.from_local(problem["key"], mesh, [Partial()])},
        {"value": problem["value"]},
        {"value": DTensor.from_local(problem["value"], init_device_mesh("cpu", (1, 1)))},
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
            "value must be a plain tensor as the key is, got a DTensor",
            "key must be sharded on its tokens",
            "value must be a DTensor as the key is, got a plain tensor",
            "value must be on the key's mesh",
            "value must be .*2.* over dimension 0 of the mesh",
            "reference must be R.* over dimension 0",
            "group must be None for DTensors",
        ),
        strict=True,
    ):
        assert re.search(expected, error), error


def attend_by_samples_or_heads(
    dimension: int, compiled: bool = False, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """set_attention itself, of DTensors sharded on that dimension of the key."""
    mesh = init_device_mesh("cpu", (2,))
    problem = dtensor_problem(**options) | {"normalize": True}
    own = {
        name: distribute_tensor(x, mesh, [placement_of(name, x, dimension)]).requires_grad_(
            name in differentiable(problem)
        )
        for name, x in problem.items()
        if isinstance(x, Tensor)
    }
    attend = setformer_ext.set_attention
    output = (torch.compile(attend, fullgraph=True) if compiled else attend)(**problem | own)
    samples, heads = output.shape[:2]
    assert output.transpose(1, 2).flatten(-2).shape == (samples, 7, 5 * heads)  # as it lies
    loss_of(output).backward()
    if dimension < 2:
        there_are_enough = output.shape[dimension] >= 2
        assert output.placements == (Shard(dimension) if there_are_enough else Replicate(),)
    return output.full_tensor().detach(), {
        name: x.grad.full_tensor() for name, x in own.items() if x.grad is not None
    }


def placement_of(name: str, x: Tensor, dimension: int) -> Any:
    """Spelled out here once more: rows of what is per sample, heads, tokens."""
    dimensions: dict[str, tuple[int | None, int | None, int | None]] = {
        "query": (0, 1, 2),
        "key": (0, 1, 2),
        "value": (0, 1, 2),
        "token_mass": (0, 1, 2),
        "mask": (0, None, 1),
        "query_mask": (0, None, 1),
        "reference": (None, 0, None),
        "reference_mass": (None, 0, None),
        "epsilon": (None, 0, None),
        "token_positions": (None, None, 0),
        "query_positions": (None, None, 0),
        "reference_positions": (None, None, None),
    }
    per_sample = name.startswith("reference") and x.dim() == (4 if name == "reference" else 3)
    found = (0, 1, None)[dimension] if per_sample else dimensions[name][dimension]
    return Replicate() if found is None else Shard(found)


@pytest.mark.slow
@pytest.mark.parametrize(("dimension", "compiled"), [(0, False), (1, False), (2, False), (0, True)])
def test_set_attention_itself_takes_dtensors(dimension: int, compiled: bool) -> None:
    """Over the samples, over the heads, and over tokens, which are gathered."""
    whole = shard(dtensor_problem() | {"normalize": True}, (13,), 0, (7,))
    expected = setformer_ext.set_attention(**whole)
    loss_of(expected).backward()
    for output, found in values(run_on_ranks(2, attend_by_samples_or_heads, dimension, compiled)):
        torch.testing.assert_close(output, expected.detach(), **CLOSE)
        for name, gradient in gradients(whole).items():
            torch.testing.assert_close(found[name], gradient, **CLOSE)


# References of each sample, which lie with the samples, or with their heads; and fewer samples or
# heads than ranks, which then all compute everything.
SIZES: tuple[tuple[int, dict[str, Any]], ...] = (
    (0, {"per_sample": True, "reference_mass": "per-sample"}),
    (1, {"per_sample": True, "reference_mass": "per-sample"}),
    (0, {"B": 1}),
    (1, {"H": 1}),
)


def attend_at_all_sizes() -> list[tuple[Tensor, dict[str, Tensor]]]:
    return [attend_by_samples_or_heads(dimension, **options) for dimension, options in SIZES]


@pytest.mark.slow
def test_dtensors_of_references_of_each_sample_and_of_fewer_samples_than_ranks() -> None:
    of_ranks = values(run_on_ranks(2, attend_at_all_sizes))
    for (_, options), *of_rank in zip(SIZES, *of_ranks, strict=True):
        whole = shard(dtensor_problem(**options) | {"normalize": True}, (13,), 0, (7,))
        expected = setformer_ext.set_attention(**whole)
        loss_of(expected).backward()
        for output, found in of_rank:
            torch.testing.assert_close(output, expected.detach(), **CLOSE)
            torch.testing.assert_close(found, gradients(whole), **CLOSE)


def positions(tokens: int, reference: Tensor) -> dict[str, Any]:
    """Of plain tensors, which all processes have alike."""
    return {
        "token_positions": torch.arange(tokens).double().unsqueeze(1),
        "reference_positions": torch.arange(reference.shape[-2]).double().unsqueeze(1),
        "position_bandwidth": 2.0,
    }


def pool_and_plan() -> tuple[Tensor, Tensor]:
    mesh = init_device_mesh("cpu", (2,))
    problem = random_problem(N=5, H=2)
    key, value = (distribute_tensor(problem[name], mesh, [Shard(0)]) for name in ("key", "value"))
    reference = distribute_tensor(problem["reference"], mesh, [Replicate()])
    pooled = setformer_ext.set_pooling(key, value, reference)
    plan = setformer_ext.transport_plan(key, reference, **positions(5, problem["reference"]))
    with pytest.raises(TypeError, match="value must be a DTensor as the key is, got Tensor"):
        setformer_ext.set_pooling(key, problem["value"], reference)
    with pytest.raises(TypeError, match="value must be a plain tensor as the key is, got DTensor"):
        setformer_ext.set_pooling(problem["key"], value, problem["reference"])
    with pytest.raises(TypeError, match="key must be a plain tensor, got a DTensor: set_attention"):
        setformer_ext.set_attention_varlen(None, key[0], value[0], reference, torch.tensor([0, 2]))
    ends = distribute_tensor(torch.tensor([0, 2]), mesh, [Replicate()])
    plain = (problem[name][0] for name in ("key", "value", "reference"))
    with pytest.raises(TypeError, match=r"cu_seqlens must be an int32 or .* got DTensor"):
        setformer_ext.set_attention_varlen(None, *plain, ends)
    module = distribute_module(setformer_ext.SetAttention(8, 2, pooled_references=True), mesh)
    x = distribute_tensor(torch.randn(2, 5, 8), mesh, [Shard(0)])
    with pytest.raises(TypeError, match="x must be a plain tensor where pooled_references=True"):
        module(x)
    return pooled.full_tensor(), plan.full_tensor()


@pytest.mark.slow
def test_pooling_and_plan_of_dtensors() -> None:
    problem = random_problem(N=5, H=2)
    expected = setformer_ext.set_pooling(problem["key"], problem["value"], problem["reference"])
    plan = setformer_ext.transport_plan(
        problem["key"], problem["reference"], **positions(5, problem["reference"])
    )
    for found in values(run_on_ranks(2, pool_and_plan)):
        torch.testing.assert_close(found, (expected, plan), **CLOSE)


MODULES: tuple[dict[str, Any], ...] = (
    {"position_bandwidth": 0.5, "query_projection": False},
    {"adaptive_reference_mass": True, "num_anchors": 4},
)


def of_a_module(options: dict[str, Any], mesh: Any = None, dimension: int = 0) -> list[Tensor]:
    """Output and gradients of SetAttention, of DTensors sharded on samples or tokens."""
    torch.manual_seed(0)
    module = setformer_ext.SetAttention(16, 2, 4, **options).double()
    x, mask = torch.randn(4, 7, 16).double(), torch.rand(4, 7) > 0.3
    mask[:, 0], mask[:, -1] = True, False
    if mesh is not None:
        module = distribute_module(module, mesh)
        x, mask = (distribute_tensor(tensor, mesh, [Shard(dimension)]) for tensor in (x, mask))
    found = []
    for valid in (None, mask):
        output = module(x, valid)
        output.square().sum().backward()
        found.append(output.detach())
    found += [weight.grad for weight in module.parameters() if weight.grad is not None]
    return [x.full_tensor() if isinstance(x, DTensor) else x for x in found]


def of_modules() -> list[list[Tensor]]:
    mesh = init_device_mesh("cpu", (2,))
    return [of_a_module(options, mesh, sharded) for options in MODULES for sharded in (0, 1)]


@pytest.mark.slow
def test_modules_take_dtensors() -> None:
    expected = [of_a_module(options) for options in MODULES for _ in range(2)]
    for found in values(run_on_ranks(2, of_modules)):
        torch.testing.assert_close(found, expected, **CLOSE)
