"""Problems beyond every size at which the kernels change how they compute: the scores that the CPU
keeps, the spans that threads share a head by, the tiles of tokens, references and depth, and the
shapes in which a head fits on a chip."""

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from conftest import Backend
from emulator.build import SOURCES
from emulator.device import Emulator
from exactness import assert_as_exact_as_definition
from setformer_ext import ops, set_attention
from setformer_ext.cli.selftest.problems import (
    Arguments,
    call,
    output_gradient,
    random_problem,
    run,
)


def constant(name: str, file: str = "transport.h") -> int:
    """Of the CPU's kernels, in bytes."""
    text = (SOURCES / "cpu" / file).read_text(encoding="utf-8")
    (found,) = re.findall(rf"{name} = int64_t{{(\d+)}} << (\d+);", text)
    return int(found[0]) << int(found[1])


# What the CPU keeps of a head, and of all heads of a problem over ranks: the scores of its tokens,
# and in backward a second matrix of their size.
KEPT, KEPT_OF_GROUP = constant("kCacheBytes"), constant("kGroupCacheBytes")
M = 64


def beyond(kept: int, matrices: int, dtype: torch.dtype = torch.float64) -> int:
    """So many tokens that the last few tiles of them are not kept."""
    return kept // (matrices * M * dtype.itemsize) + 300


LOGARITHMS = {"epsilon": 0.003}  # below 1/256 float64 takes logarithms instead of scaling
FORWARD, BACKWARD = beyond(KEPT, 1), beyond(KEPT, 2)
BEYOND: dict[str, dict[str, Any]] = {
    "forward": {"N": FORWARD},
    "forward, logarithms": LOGARITHMS | {"N": FORWARD, "masked": True},
    "backward, float32": {"N": beyond(KEPT, 2, torch.float32), "dtype": torch.float32},
    "queries": {"N": 40, "Nq": FORWARD},
    "queries in backward, logarithms": LOGARITHMS | {"N": 40, "Nq": BACKWARD, "masked": True},
    "backward, linear": {"N": BACKWARD, "Nq": 50, "kernel": "linear", "masked": True},
}
# The emulated kernels' tiles are of 64 tokens, 64 references and 32 channels.
MASKED = {"masked": True, "iterations": 2}
TILES: dict[str, dict[str, Any]] = {
    "more references than a tile, positions": MASKED | {"N": 75, "M": 70, "P": 2, "Nq": 41},
    "the same, streaming": MASKED | {"B": 1, "H": 1, "N": 130, "M": 70, "D": 136, "P": 2},
    "many more queries than tokens": MASKED | {"B": 1, "H": 1, "N": 3, "Nq": 301, "M": 9},
    "many more tokens than queries": MASKED | {"B": 1, "H": 1, "N": 301, "Nq": 2, "M": 9},
}
# A head of a half type stays on the chip, in the first shape that has room for it: (blocks of 8
# references, strips of 16 tokens for a warp, warps). Here are the smallest sizes of shapes forward
# and backward; None where no shape has room and other kernels run.
Shape = tuple[int, int, int] | None
ON_CHIP: dict[str, tuple[dict[str, int], Shape, Shape]] = {
    "many tokens, 7 blocks": ({"M": 33, "N": 225}, (7, 7, 8), (7, 1, 4)),
    "8 blocks": ({"M": 57, "N": 20}, (8, 6, 2), (8, 1, 1)),
    "more tokens, 8 blocks": ({"M": 57, "N": 65}, (8, 6, 2), (8, 1, 4)),
    "too many tokens, 8 blocks": ({"M": 57, "N": 769}, None, (8, 1, 4)),
    "16 blocks": ({"M": 65, "N": 20}, (16, 3, 2), None),
    "most steps": ({"M": 9, "N": 20, "iterations": 256}, (4, 7, 2), (4, 1, 1)),
    "too many steps": ({"M": 9, "N": 20, "iterations": 257}, (4, 7, 2), None),
    "longer than forward": ({"M": 9, "N": 1500}, None, (4, 1, 4)),
    "too long": ({"M": 3, "N": 4097, "D": 2, "Dv": 2, "iterations": 0}, None, None),
}
# float32, whose factors have three parts, has fewer strips a warp, and forward only.
ON_CHIP_IN_PARTS: dict[str, tuple[dict[str, int], Shape]] = {
    "4 blocks": ({"M": 9, "N": 20}, (4, 6, 2)),
    "more tokens, 4 blocks": ({"M": 9, "N": 193}, (4, 6, 8)),
    "one warp": ({"M": 33, "N": 20}, (7, 4, 1)),
    "more tokens, 7 blocks": ({"M": 33, "N": 65}, (7, 4, 2)),
    "many tokens, 7 blocks": ({"M": 49, "N": 129}, (7, 4, 8)),
    "8 blocks": ({"M": 57, "N": 20}, (8, 4, 2)),
    "more tokens, 8 blocks": ({"M": 57, "N": 129}, (8, 4, 8)),
    "16 blocks": ({"M": 65, "N": 20}, (16, 2, 2)),
    "more tokens, 16 blocks": ({"M": 65, "N": 65}, (16, 2, 8)),
    "deep": ({"M": 9, "N": 40, "D": 150, "Dv": 70}, (4, 6, 2)),
    "too many tokens": ({"M": 57, "N": 513}, None),
    "too large for a block": ({"M": 100, "N": 256, "D": 64, "Dv": 64}, None),
}
OF_SHAPE = re.compile(r"attention_(\w+)_on_chip_kernelINS1_5ShapeI\w+?Li(\d+)ELi(\d+)ELi(\d+)E")


# Where no block has room for a head, a cluster may have: (blocks of references, strips), ranks.
ON_CLUSTER: dict[str, tuple[dict[str, int], tuple[int, int] | None, int]] = {
    "32 references": ({"N": 897, "M": 9}, (4, 7), 2),
    "56 references": ({"N": 897, "M": 49}, (7, 7), 2),
    "56 references, more tokens": ({"N": 1793, "M": 49}, (7, 7), 4),
    "64 references": ({"N": 769, "M": 60}, (8, 6), 2),
    "64 references, queries": ({"N": 50, "M": 60, "Nq": 769}, (8, 6), 2),
    "128 references": ({"N": 385, "M": 100}, (16, 3), 2),
    "128 references, deep": ({"N": 600, "M": 100, "D": 150, "Dv": 70}, (16, 3), 4),
    "eight blocks": ({"N": 1537, "M": 100}, (16, 3), 8),
    "none": ({"N": 3073, "M": 100}, None, 1),
}
OF_CLUSTER = re.compile(r"attention_forward_on_cluster_kernel\w+?ShapeI\w+?Li(\d+)ELi(\d+)E")


def of(backend: Backend, **options: Any) -> Arguments:
    return random_problem(**({"dtype": torch.float32} | options), device=backend.device)


@pytest.mark.slow
@pytest.mark.parametrize("name", BEYOND)
def test_scores_beyond_those_that_are_kept(name: str) -> None:
    sizes: dict[str, Any] = {"B": 1, "H": 1, "M": M, "D": 2, "Dv": 2, "iterations": 1}
    assert_as_exact_as_definition(set_attention, random_problem(**sizes | BEYOND[name]))


@pytest.mark.parametrize("beyond", [False, True], ids=["prepared once", "too many for that"])
def test_references_that_samples_share(beyond: bool) -> None:
    """They have the bits of references that each sample has for itself."""
    most = constant("kMostSharedBytes", "kernels.cpp")
    D = 24 if not beyond else most // (torch.float64.itemsize * M) + 1
    arguments = random_problem(B=3, H=2, N=50, M=M, D=D, Dv=9, iterations=2, dtype=torch.float64)
    key, value, reference = (arguments[name].detach() for name in ("key", "value", "reference"))
    copies = reference.expand(3, -1, -1, -1).contiguous()
    results = []
    for references in (reference, copies):
        tensors = [x.requires_grad_() for x in (key, value, references)]
        output = set_attention(None, *tensors, iterations=2)
        results.append([output, *torch.autograd.grad(output.square().sum(), tensors)])
    *shared, of_shared = results[0]
    *own, of_own = results[1]
    assert all(torch.equal(a, b) for a, b in zip(shared, own, strict=True))
    assert torch.equal(of_shared, of_own.sum(0))


@pytest.mark.parametrize("name", TILES)
def test_beyond_the_tiles(backend: Backend, name: str) -> None:
    sizes = {"B": 1, "H": 2, "D": 24, "Dv": 9} | TILES[name]
    if not backend.emulated:  # which are as fast with ten times as many
        sizes |= {n: 10 * sizes[n] + 1 for n in ("N", "Nq") if sizes.get(n, 0) > 40}
    assert_as_exact_as_definition(backend.set_attention, of(backend, **sizes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ON_CHIP)
def test_shapes_on_the_chip(backend: Backend, name: str, dtype: torch.dtype) -> None:
    sizes, *shapes = ON_CHIP[name]
    assert shapes_of_exact_attention(backend, sizes, dtype) in ([], shapes)


@pytest.mark.parametrize("name", ON_CHIP_IN_PARTS)
def test_shapes_on_the_chip_in_parts(backend: Backend, name: str) -> None:
    sizes, shape = ON_CHIP_IN_PARTS[name]
    assert shapes_of_exact_attention(backend, sizes, torch.float32) in ([], [shape, None])


def shapes_of_exact_attention(
    backend: Backend, sizes: dict[str, int], dtype: torch.dtype
) -> list[Shape]:
    """Of forward and backward, where the device can be asked."""
    options = {"B": 1, "H": 1, "D": 24, "Dv": 9, "P": 2, "masked": True, "iterations": 2}
    arguments = of(backend, **options | sizes, token_mass=True, dtype=dtype)
    emulator = Emulator(backend.module.__file__) if backend.emulated else None
    if emulator is not None:
        emulator.clear_launches()
    assert_as_exact_as_definition(backend.set_attention, arguments)
    if emulator is None:
        return []
    kernels = " ".join(launch.kernel for launch in emulator.launches())
    found = {way: tuple(map(int, shape)) for way, *shape in OF_SHAPE.findall(kernels)}
    return [found.get(way) for way in ("forward", "backward")]


@pytest.mark.parametrize("N", [60, 1200], ids=["else resident", "else streaming"])
def test_heads_on_the_chip_and_elsewhere_in_one_call(backend: Backend, N: int) -> None:
    """Small epsilons need logarithms, and so do reference masses that are far apart."""
    options = {"B": 2, "H": 3, "M": 9, "D": 24, "Dv": 9, "masked": True, "iterations": 2}
    arguments = of(
        backend, **options, N=N, dtype=torch.bfloat16, reference_mass="learned", epsilon="learned"
    )
    with torch.no_grad():
        arguments["epsilon"].copy_(torch.tensor([0.1, 0.01, 0.2]))
        arguments["reference_mass"][2, 4] = 1e-12
    assert_as_exact_as_definition(backend.set_attention, arguments)


@pytest.fixture
def clustered(backend: Backend) -> Iterator[Emulator]:
    """The emulated device, as one that has clusters."""
    if not backend.emulated:
        pytest.skip("only the emulated device is asked what it runs")
    emulator = Emulator(backend.module.__file__)
    with emulator.of_capability(90):
        yield emulator


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ON_CLUSTER)
def test_blocks_of_a_cluster_share_a_head(
    backend: Backend, clustered: Emulator, name: str, dtype: torch.dtype
) -> None:
    sizes, shape, ranks = ON_CLUSTER[name]
    options = {"B": 1, "H": 1, "D": 24, "Dv": 9, "P": 2, "masked": True, "iterations": 2}
    arguments = of(backend, **options | sizes, token_mass=True, dtype=dtype)
    clustered.clear_launches()
    assert_as_exact_as_definition(backend.set_attention, arguments, backward=False)
    launches = [(OF_CLUSTER.findall(launch.kernel), launch) for launch in clustered.launches()]
    found = [(tuple(map(int, *on_cluster)), x.grid[0]) for on_cluster, x in launches if on_cluster]
    assert found == ([(shape, ranks)] if shape else [])
    output = call(backend.set_attention, arguments)
    with clustered.configured(order="random"):
        assert torch.equal(call(backend.set_attention, arguments), output)


@pytest.mark.slow
def test_rooms_of_exchanges_do_not_overlap(backend: Backend, clustered: Emulator) -> None:
    """Numbers follow log-sum-exps, which take twice the room, where the last step is an odd one."""
    options = {"B": 1, "H": 1, "D": 8, "Dv": 8, "iterations": 1, "epsilon": 0.01}
    arguments = of(backend, **options, N=1537, M=100, dtype=torch.bfloat16)
    with clustered.configured(mode="race"):
        assert_as_exact_as_definition(backend.set_attention, arguments, backward=False)
    assert clustered.errors == 0


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("epsilon", [0.01, 0.1], ids=["logarithms", "scaling"])
def test_spans_that_begin_with_nothing(backend: Backend, epsilon: float, cross: bool) -> None:
    """Threads and blocks share a head by spans of its tokens; the first of them are masked whole,
    so that their sums are of nothing: -inf in the log domain."""
    N, begin = (403, 280) if backend.emulated else (6001, 4100)
    options = {"B": 1, "H": 1, "N": N, "M": 9, "D": 24, "Dv": 5, "iterations": 2}
    if cross:
        options["Nq"] = N // 2
    arguments = of(backend, **options, masked=True, epsilon=epsilon)
    arguments["mask"][:, :begin] = False
    if cross:
        arguments["query_mask"][:, : begin // 2] = False
    assert arguments["mask"].any()
    assert_as_exact_as_definition(backend.set_attention, arguments)


@pytest.mark.slow
def test_heads_of_a_group_keep_less_and_give_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A head alone, whose scores are all kept, and in a group of one rank among so many heads that
    the group's limit is below that of a head."""
    H = 2 * KEPT_OF_GROUP // KEPT + 1
    N = beyond(KEPT_OF_GROUP // H, 2)
    assert N * 2 * M * torch.float64.itemsize < KEPT
    arguments = random_problem(B=1, H=H, N=N, M=M, D=2, Dv=2, iterations=1)
    upstream = output_gradient(set_attention, arguments)
    alone = {
        name: x[:, 3:4] if name in ("key", "value") else x[3:4] if name == "reference" else x
        for name, x in arguments.items()
    }
    expected = run(set_attention, alone, upstream[:, 3:4])
    merged: list[str] = []
    of_one_rank = partial(ops.run, merge=lambda arrays, how: merged.append(how))
    monkeypatch.setattr(ops, "run", lambda name, arrays, _=None: of_one_rank(name, arrays))
    found = run(set_attention, arguments, upstream)
    assert merged
    torch.testing.assert_close(found["output"][:, 3:4], expected["output"])
    for name in ("key", "value"):
        torch.testing.assert_close(found[name][:, 3:4], expected[name])
    torch.testing.assert_close(found["reference"][3:4], expected["reference"])
