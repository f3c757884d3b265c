"""Backends to run the numeric tests on, and the profile hypothesis runs under."""

import contextlib
import gc
import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import Tensor

import setformer_ext
from emulator.build import emulated_module, find_nvcc
from optional import pytest_make_collect_report, pytest_runtest_makereport
from setformer_ext import ops

__all__ = ["pytest_make_collect_report", "pytest_runtest_makereport"]  # hooks for pytest

# Small problems take all threads too, here and in the processes that tests start: read once.
os.environ.setdefault("SETFORMER_LEAST_PARALLEL_WORK", "0")
# Options of this run are not meant for the pytest processes that tests start.
os.environ.pop("PYTEST_ADDOPTS", None)

# Of all that tests draw: a test draws the same whatever ran before it.
SEED = int(os.environ.get("SETFORMER_TEST_SEED", "0"))

# The same examples on every machine, and no deadline: shared machines stall.
with contextlib.suppress(ModuleNotFoundError):
    import hypothesis

    hypothesis.settings.register_profile(
        "setformer", derandomize=True, deadline=None, max_examples=60, print_blob=True
    )
    hypothesis.settings.load_profile("setformer")


def drawn_by_seed(test: Callable) -> Callable:
    """A property, of which hypothesis tries other examples for every SEED but 0."""
    return hypothesis.seed(SEED)(test) if SEED else test


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What runs emulated kernels is slow, if only for loading them. A plan is plain torch's, whose
    tensors are the CPU's there too: the same test again."""
    emulated = [item for item in items if "cuda-emulated" in item.name]
    for item in emulated:
        item.add_marker(pytest.mark.slow)
    again = {item for item in emulated if "transport_plan" in item.name}
    config.hook.pytest_deselected(items=list(again))
    items[:] = [item for item in items if item not in again]


def pytest_collection_finish() -> None:
    """The garbage collector need not look through all that is imported again and again."""
    gc.collect()
    gc.freeze()


def pytest_report_header() -> str:
    return f"seed: {SEED} (SETFORMER_TEST_SEED draws another)"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The seed again where a test failed: --quiet leaves the header out."""
    if terminalreporter.getreports("failed") or terminalreporter.getreports("error"):
        terminalreporter.write_line(pytest_report_header())


@dataclass(frozen=True)
class Backend:
    """The functions as one implementation offers them, and where their tensors live. (A plan is the
    definition's in plain torch, whatever the module.)"""

    name: str
    device: str
    module: ModuleType  # what the operations call in place of setformer_ext._C
    examples: int  # of each property that hypothesis tries
    set_attention: Callable[..., Tensor] = setformer_ext.set_attention
    set_pooling: Callable[..., Tensor] = setformer_ext.set_pooling
    transport_plan: Callable[..., Tensor] = setformer_ext.transport_plan

    @property
    def emulated(self) -> bool:
        """Every thread of a kernel is a fiber on the CPU: ten thousand times slower than a GPU."""
        return self.name == "cuda-emulated"

    @property
    def on_cuda(self) -> bool:
        """The CUDA kernels run, on a GPU or emulated."""
        return self.name != "cpu"

    @property
    def approximate(self) -> bool:
        """Exponentials of float32 may err by 2 units in the last place: on a GPU, or perturbed."""
        perturbed = os.environ.get("EMULATOR_ARITHMETIC") == "perturbed"
        return self.on_cuda and (perturbed or not self.emulated)


def cpu() -> Backend:
    return Backend("cpu", "cpu", setformer_ext._C, examples=60)


def cuda_emulated() -> Backend:
    """The CUDA kernels and their launch code on CPU tensors, see tests/cuda/emulator/."""
    if find_nvcc() is None:
        pytest.skip("the emulator needs nvcc, see tests/cuda/emulator/build.py")
    return Backend("cuda-emulated", "cpu", emulated_module(), examples=6)


def cuda() -> Backend:
    return Backend("cuda", "cuda:0", setformer_ext._C, examples=60)


BACKENDS = {"cpu": cpu, "cuda-emulated": cuda_emulated}
if torch.cuda.is_available():
    BACKENDS["cuda"] = cuda


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return BACKENDS[request.param]()


@pytest.fixture(scope="session", params=[name for name in BACKENDS if name != "cuda"])
def host_module(request: pytest.FixtureRequest) -> ModuleType:
    """A compiled module that takes arrays in the host's memory."""
    return BACKENDS[request.param]().module


@pytest.fixture(autouse=True)
def operations_call_the_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """Forward and backward of a test that takes a backend run on its compiled module."""
    if "backend" in request.fixturenames:
        ops._C = request.getfixturevalue("backend").module
    yield
    ops._C = setformer_ext._C


@pytest.fixture(autouse=True)
def compiled_anew() -> Iterator[None]:
    """torch compiles a function a few times only, and would count those of other tests as well."""
    yield
    if (dynamo := sys.modules.get("torch._dynamo")) is not None:
        dynamo.reset()


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(SEED)
    torch.manual_seed(SEED)
    with contextlib.suppress(ModuleNotFoundError):
        import numpy

        numpy.random.seed(SEED)  # noqa: NPY002 (timm draws from it)


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Small models are fastest on one thread; who changes the number leaves others what it was."""
    before = torch.get_num_threads()
    if request.path.parent.name in ("language", "vision"):
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
