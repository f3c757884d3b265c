"""What launches ask of a device: shared memory within each architecture's limit, whichever host
thread launches what, and what environment variables choose."""

import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import setformer_ext
from conftest import BACKENDS
from emulator.build import load
from emulator.device import Emulator
from exactness import assert_as_exact_as_definition
from setformer_ext import ops
from setformer_ext.cli.selftest.problems import random_problem
from test_cuda_binding import CUDA, bytes_on, gradients, on, problem

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "cuda"))

from layout import STORAGES, Needs, Problem
from occupancy import ARCHITECTURES
from sass import short_names


@pytest.fixture
def fresh(tmp_path: Path) -> ModuleType:
    """A module that has not launched anything: what a process decides once, each copy does."""
    return load(Path(shutil.copy(BACKENDS["cuda-emulated"]().module.__file__, tmp_path)))


# ---- shared memory ----------------------------------------------------------------------------

PASSES = (Needs.SCORES_ONLY, Needs.POOLS, Needs.DISTRIBUTES, Needs.DIFFERENTIATES)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("storage", STORAGES)
def test_every_pass_fits_every_architecture(storage: str, arch: int) -> None:
    """D up to 256 and M up to 512 are promised on all. Memory grows with D by 16 and with M by the
    rows of a tile: both ends of each step."""
    rows = STORAGES[storage].rows
    depths = [D for step in range(0, 256, 16) for D in (step + 1, step + 16)]
    counts = [M for step in range(0, 512, rows) for M in (step + 1, step + rows)]
    beyond = [
        (D, M, str(needs))
        for D in depths
        for M in counts
        for needs in PASSES
        if Problem(1, 1, 1, D, M, storage=STORAGES[storage]).shared(
            needs, resident=False, stages=2 if arch >= 80 else 1
        )
        > ARCHITECTURES[arch].shared_block
    ]
    assert beyond == []


def test_more_references_than_eight_steps_leave_room_for(
    fresh: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code for sm_80 on a device that gives a block 99 KiB."""
    monkeypatch.setattr(ops, "_C", fresh)
    emulator = Emulator(fresh.__file__)
    emulator.set_capability(86)
    arguments = random_problem(B=1, H=1, N=9, M=321, D=49, Dv=8, dtype=torch.bfloat16)
    assert_as_exact_as_definition(setformer_ext.set_attention, arguments)
    p = Problem(1, 1, tokens=9, depth=49, references=321)
    most = max(launch.shared_bytes for launch in emulator.launches())
    assert most == p.shared(Needs.DIFFERENTIATES, resident=False) <= 99 * 1024


@pytest.mark.parametrize(("most_ranks", "kernel"), [(8, "on_cluster"), (2, "on_shares")])
def test_heads_are_shared_out_where_a_cluster_cannot_run(
    fresh: ModuleType, monkeypatch: pytest.MonkeyPatch, most_ranks: int, kernel: str
) -> None:
    """Four blocks would share this head; the second call knows the answer."""
    monkeypatch.setattr(ops, "_C", fresh)
    emulator = Emulator(fresh.__file__)
    emulator.set_capability(90)
    emulator.set_most_ranks(most_ranks)
    arguments = random_problem(B=1, H=1, N=1793, M=9, D=8, Dv=8, dtype=torch.bfloat16)
    for _ in range(2):
        emulator.clear_launches()
        assert_as_exact_as_definition(setformer_ext.set_attention, arguments, backward=False)
        kernels = {launch.kernel for launch in emulator.launches()}
        assert any(kernel in name for name in kernels)
        assert any("on_cluster" in name for name in kernels) == (kernel == "on_cluster")


@pytest.mark.parametrize(
    ("capability", "options", "kernels"),
    [
        (80, {"N": 60}, ["attention_forward_on_chip_kernel"]),
        (90, {"N": 1000}, ["attention_forward_on_cluster_kernel"]),
        (80, {"N": 60, "D": 65}, 2 * ["unit_length_kernel"] + ["attention_forward_on_chip_kernel"]),
    ],
)
def test_scaling_to_unit_length_takes_no_launch(
    fresh: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capability: int,
    options: dict[str, int],
    kernels: list[str],
) -> None:
    """But for rows that no warp's room holds."""
    monkeypatch.setattr(ops, "_C", fresh)
    emulator = Emulator(fresh.__file__)
    emulator.set_capability(capability)
    sizes = {"B": 1, "H": 1, "M": 9, "D": 8, "Dv": 8, "iterations": 1} | options
    arguments = random_problem(**sizes, normalize=True, dtype=torch.bfloat16)
    assert_as_exact_as_definition(setformer_ext.set_attention, arguments, backward=False)
    assert [name.partition("<")[0] for name, _ in launched(emulator)] == kernels


def test_a_launch_between_anothers_limit_and_start(fresh: ModuleType) -> None:
    """As another host thread's may come: here a smaller one of the same kernel."""
    emulator = Emulator(fresh.__file__)
    arrays, smaller = problem(190), problem(120)
    kernels: list[int] = []

    def launch_smaller() -> None:
        if not kernels:
            kernels.append(1)
            fresh.set_attention_forward(**smaller)

    with emulator.after_limit(launch_smaller):
        fresh.set_attention_forward(**arrays)
    first, second = emulator.launches()
    assert first.kernel == second.kernel
    assert 48 * 1024 < first.shared_bytes < second.shared_bytes
    for results in (arrays, smaller):
        assert results["output"].isfinite().all()


def test_limits_are_set_once_and_never_lowered(fresh: ModuleType) -> None:
    """Per kernel and device, to what the device gives a block."""
    emulator = Emulator(fresh.__file__)
    for tokens in (30, 100, 30):
        for device in (0, 1):
            arrays = problem(tokens)
            memory = bytes_on(CUDA, device)
            fresh.set_attention_forward(**on(arrays, CUDA, device), workspace=memory)
            given = arrays | gradients(arrays)
            fresh.set_attention_backward(**on(given, CUDA, device), workspace=memory)
    limits = emulator.limits()
    assert {limit.device for limit in limits} == {0, 1}
    assert {limit.bytes for limit in limits} == {ARCHITECTURES[80].shared_block}
    times = Counter((limit.kernel, limit.device) for limit in limits)
    assert set(times.values()) == {1}
    large = {(x.kernel, x.device) for x in emulator.launches() if x.shared_bytes > 48 * 1024}
    assert set(times) == large
    assert len(large) == 4  # both directions, on both devices


# ---- knobs: docs/cuda.md ----------------------------------------------------------------------


def launched(emulator: Emulator) -> list[tuple[str, int]]:
    """Kernels, without their type, and blocks."""
    launches = emulator.launches()
    names = short_names({launch.kernel for launch in launches})
    return [(names[launch.kernel].split("<")[0], launch.grid[0]) for launch in launches]


def attended(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> list[tuple[str, int]]:
    """The launches of attention and its gradient, whose results are right."""
    monkeypatch.setattr(ops, "_C", module)
    emulator = Emulator(module.__file__)
    arguments = random_problem(B=1, H=2, D=8, Dv=8, iterations=2, **options)
    assert_as_exact_as_definition(setformer_ext.set_attention, arguments)
    return launched(emulator)


@pytest.mark.parametrize(("value", "resident"), [("on", True), ("", True), ("off", False)])
def test_residency(
    fresh: ModuleType, monkeypatch: pytest.MonkeyPatch, value: str, resident: bool
) -> None:
    monkeypatch.setenv("SETFORMER_CUDA_RESIDENT", value)
    more = {"M": 129}  # references than kernels on chip take
    names = {name for name, _ in attended(fresh, monkeypatch, N=70, dtype=torch.float32, **more)}
    assert ("attention_forward_resident_kernel" in names) == resident
    assert ("attention_backward_resident_kernel" in names) == resident
    assert ("sinkhorn_step_kernel" in names) == ("gradient_kernel" in names) == (not resident)


@pytest.mark.parametrize(("tiles", "splits"), [("1", 7), ("2", 4), ("", 2), ("8", 1)])
def test_tiles_of_a_block(
    fresh: ModuleType, monkeypatch: pytest.MonkeyPatch, tiles: str, splits: int
) -> None:
    """Of 7 tiles of 32 tokens: float64 always streams."""
    monkeypatch.setenv("SETFORMER_CUDA_TILES", tiles)
    launches = attended(fresh, monkeypatch, N=7 * 32 - 10, M=5, dtype=torch.float64)
    for kernel in ("sinkhorn_step_kernel", "collect_kernel", "distribute_kernel"):
        assert {blocks for name, blocks in launches if name == kernel} == {2 * splits}
    assert {blocks for name, blocks in launches if name == "gradient_kernel"} == {2 * splits}
    assert ("merge_columns_kernel" in dict(launches)) == (splits > 1)


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("SETFORMER_CUDA_RESIDENT", "1", "on or off"),
        ("SETFORMER_CUDA_RESIDENT", "OFF", "on or off"),
        ("SETFORMER_CUDA_TILES", "3", "a power of two from 1 to 1024"),
        ("SETFORMER_CUDA_TILES", "0", "a power of two from 1 to 1024"),
        ("SETFORMER_CUDA_TILES", "-4", "a power of two from 1 to 1024"),
        ("SETFORMER_CUDA_TILES", "4 ", "a power of two from 1 to 1024"),
        ("SETFORMER_CUDA_TILES", "2048", "a power of two from 1 to 1024"),
        ("SETFORMER_CUDA_TILES", "99999999999999999999", "a power of two from 1 to 1024"),
        ("SETFORMER_CUDA_TILES", "four", "a power of two from 1 to 1024"),
    ],
)
def test_nonsense_is_refused(
    fresh: ModuleType, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, expected: str
) -> None:
    """By every call until it is mended, and before anything is launched."""
    monkeypatch.setenv(variable, value)
    arrays = problem(30)
    calls: list[tuple[Callable[..., None], dict[str, Any]]] = [
        (fresh.set_attention_forward, arrays),
        (fresh.set_attention_backward, arrays | gradients(arrays)),
    ]
    for function, given in calls:
        with pytest.raises(ValueError, match=f"{variable} must be {expected}") as caught:
            function(**given)
        assert f"got '{value}'" in str(caught.value)
    assert Emulator(fresh.__file__).launches() == []
    monkeypatch.delenv(variable)
    fresh.set_attention_forward(**arrays)
    assert arrays["output"].isfinite().all()
