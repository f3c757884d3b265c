"""Backends to run the numeric tests on, and the profile hypothesis runs under."""

from collections.abc import Callable
from dataclasses import dataclass

import hypothesis
import pytest
import torch
from torch import Tensor

import setformer_ext

# The same examples on every machine, and no deadline: shared machines stall.
hypothesis.settings.register_profile(
    "setformer", derandomize=True, deadline=None, max_examples=60, print_blob=True
)
hypothesis.settings.load_profile("setformer")


@dataclass(frozen=True)
class Backend:
    """The three functions as one implementation offers them, and where their tensors live."""

    device: str
    set_attention: Callable[..., Tensor]
    set_pooling: Callable[..., Tensor]
    transport_plan: Callable[..., Tensor]


BACKENDS = {
    "cpu": Backend(
        "cpu",
        setformer_ext.set_attention,
        setformer_ext.set_pooling,
        setformer_ext.transport_plan,
    ),
}


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return BACKENDS[request.param]


@pytest.fixture(autouse=True)
def threads():
    """Tests that change the number of threads leave the others what they found."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
