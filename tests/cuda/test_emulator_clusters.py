"""Clusters in the emulator: known values, and what goes wrong among blocks is found."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

from emulator.build import build_cuda, find_nvcc
from emulator.device import Emulator
from test_emulator import ILLEGAL_ADDRESS, LAUNCH_FAILURE, ORDERS, SUCCESS

SOURCE = (Path(__file__).parent / "emulator" / "cluster_samples.cu").read_text(encoding="utf-8")
INVALID_CLUSTER_SIZE = 912


@pytest.fixture(scope="module")
def library() -> Path:
    if find_nvcc() is None:
        pytest.skip("needs nvcc, see tests/cuda/emulator/build.py")
    return build_cuda(SOURCE, architecture=90)


@pytest.fixture
def emulator(library: Path) -> Emulator:
    emulator = Emulator(library)
    emulator.configure()
    emulator.clear_errors()
    return emulator


def launch(emulator: Emulator, name: str, blocks: int) -> tuple[int, np.ndarray]:
    data = np.zeros(32 * blocks, np.float32)
    function = getattr(emulator.library, f"launch_{name}")
    return int(function(ctypes.c_void_p(data.ctypes.data), blocks)), data.reshape(blocks, 32)


def test_blocks_know_their_place(emulator: Emulator) -> None:
    status, data = launch(emulator, "places", 8)
    assert status == SUCCESS
    rows = data.flatten()[:32].reshape(8, 4)
    assert list(rows[:, 0]) == [0, 1, 2, 3] * 2
    assert set(rows[:, 1]) == {4}
    assert list(rows[:, 2]) == [0] * 4 + [1] * 4


@pytest.mark.parametrize("mode", ["plain", "race"])
@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_known_values(emulator: Emulator, order: str, seed: int, mode: str) -> None:
    lanes = np.arange(32)
    with emulator.configured(order, seed, mode):  # type: ignore[arg-type]
        status, data = launch(emulator, "exchange", 4)
        assert status == SUCCESS, emulator.last_message
        for block in range(4):
            assert (data[block] == 100 * (block ^ 1) + 31 - lanes).all()
        status, data = launch(emulator, "sums", 4)
        assert status == SUCCESS, emulator.last_message
        assert (data[1::2] == 2 * lanes.sum() + 2 * 32).all()
        assert (data[::2] == 0).all()
        status, data = launch(emulator, "messages", 8)
        assert status == SUCCESS, emulator.last_message
        assert (data == (1 + 2 + 3 + 4) * (10 + 20)).all()
        status, data = launch(emulator, "signal", 2)
        assert status == SUCCESS, emulator.last_message
        assert (data[0] == 7 * (31 - lanes)).all()
        status, data = launch(emulator, "answer", 2)
        assert status == SUCCESS, emulator.last_message
        assert (data == [[1], [2]]).all()
    assert emulator.errors == 0


@pytest.mark.parametrize("mode", ["plain", "race"])
def test_generic_addresses(emulator: Emulator, mode: str) -> None:
    with emulator.configured(mode=mode):  # type: ignore[arg-type]
        status, data = launch(emulator, "generic", 4)
    assert status == SUCCESS, emulator.last_message
    assert (data[::2] == np.arange(32) + 1000).all()
    assert (data[1::2] == np.arange(32)).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_meeting", ("nothing orders", "nobody has written")),
        ("not_released", ("nothing orders this access after the write",)),
        ("not_awaited", ("nobody has written", "left before it waited for this store")),
        ("used_too_early", ("nothing orders this use", "nobody has initialised")),
        ("read_too_early", ("nothing orders this write after the read",)),
    ],
)
@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_races(
    emulator: Emulator, name: str, message: tuple[str, ...], order: str, seed: int
) -> None:
    with emulator.configured(order, seed, mode="race"):  # type: ignore[arg-type]
        status, _ = launch(emulator, name, 4)
    assert status == LAUNCH_FAILURE
    assert any(words in emulator.last_message for words in message), emulator.last_message


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("left_alone", ILLEGAL_ADDRESS, "of a block that has left, rank 1"),
        ("never_comes", LAUNCH_FAILURE, "deadlock: 64 threads"),
        ("did_not_arrive", LAUNCH_FAILURE, "has not arrived"),
        ("arrives_twice", LAUNCH_FAILURE, "a second time"),
        ("rank_beyond", ILLEGAL_ADDRESS, "rank 2 of a cluster of 2"),
        ("no_barrier_there", LAUNCH_FAILURE, "nobody has initialised it"),
        ("too_many", LAUNCH_FAILURE, "more arrive at an mbarrier than it counts"),
        ("another_blocks_barrier", LAUNCH_FAILURE, "an mbarrier of another block"),
    ],
)
def test_errors(emulator: Emulator, name: str, status: int, message: str) -> None:
    found, _ = launch(emulator, name, 2)
    assert found == status
    assert message in emulator.last_message
    # One failed launch leaves the next one alone.
    assert launch(emulator, "exchange", 2)[0] == SUCCESS


def test_clusters_fill_the_grid(emulator: Emulator) -> None:
    assert launch(emulator, "exchange", 3)[0] == INVALID_CLUSTER_SIZE
