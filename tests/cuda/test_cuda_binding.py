"""From Python to the launch code: devices, streams, memory and errors."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.dlpack import to_dlpack

import setformer_ext
from conftest import BACKENDS, Backend
from emulator.device import Emulator
from setformer_ext import _C, arguments, ops
from setformer_ext.problem import Problem, accumulate_dtype

CUDA, CUDA_MANAGED, ROCM = 2, 13, 10  # DLPack's device types

# ---- the torch layer, as far as it goes without a device --------------------------------------


@pytest.fixture
def compiled_with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "DEVICES", ("cpu", "meta", "cuda"))


def test_operations_are_registered_for_cuda() -> None:
    for name in ("set_attention", "set_attention_backward"):
        for key in ("CPU", "CUDA"):
            operation = f"setformer_ext::{name}"
            assert torch._C._dispatch_has_kernel_for_dispatch_key(operation, key), operation


@pytest.mark.usefixtures("compiled_with_cuda")
def test_results_are_on_the_device_of_the_tensors() -> None:
    """Fake tensors know their device: a factory call that forgot it would mix two."""
    device = {"device": "cuda:1"}
    with FakeTensorMode(), torch.no_grad():
        key, value = torch.empty(2, 3, 9, 4, **device), torch.empty(2, 3, 9, 5, **device)
        query, reference = torch.empty(2, 3, 7, 4, **device), torch.empty(3, 6, 4, **device)
        epsilon, mask = torch.ones(3, **device), torch.ones(2, 9, dtype=torch.bool, **device)
        options = {"epsilon": epsilon, "mask": mask, "bandwidth": 2}
        output = setformer_ext.set_attention(query, key, value, reference, **options)
        plan = setformer_ext.transport_plan(key, reference, **options)
        pooled = setformer_ext.set_pooling(key, value, reference, **options)
        tensors = (key, value, reference, epsilon, epsilon, query, mask, *(None,) * 8)
        problem = Problem(*tensors, "linear", 1.0, 5, True, True, 0, 0)
        solution = torch.ops.setformer_ext.set_attention(*problem)
        gradients = torch.ops.setformer_ext.set_attention_backward(
            output, None, *solution, *problem
        )
    assert output.shape == (2, 3, 7, 5)
    assert plan.shape == (2, 3, 9, 6)
    assert pooled.shape == (2, 3, 6, 5)
    for x in (output, plan, pooled, *solution, *gradients):
        assert x.device == torch.device("cuda:1")


def test_work_goes_onto_the_current_stream_of_the_keys_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    current = [torch.device("cuda:0")]

    @contextmanager
    def made_current(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    streams = {torch.device("cuda:0"): 0x50, torch.device("cuda:1"): 0x51}
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=streams[device])
    )
    monkeypatch.setattr(torch.cuda, "device", made_current)
    monkeypatch.setattr(ops, "to_dlpack", lambda x: x)
    passed: dict[str, Any] = {}

    def function(**arrays: Any) -> None:
        passed.update(arrays, current=current[-1])

    monkeypatch.setattr(ops, "_C", SimpleNamespace(set_attention_forward=function))
    with FakeTensorMode():
        key = torch.empty(1, 1, 9, 4, device="cuda:1")
        ops.run("set_attention_forward", {"key": key, "iterations": 3})
        memory = passed["workspace"](1000)
    assert passed["stream"] == 0x51
    assert passed["current"] == key.device
    assert current == [torch.device("cuda:0")]
    assert passed["key"] is key
    assert passed["iterations"] == 3
    assert (memory.device, memory.dtype, memory.shape) == (key.device, torch.uint8, (1000,))


def test_a_build_without_cuda_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "DEVICES", ("cpu", "meta"))
    monkeypatch.setitem(arguments.BUILD, "cuda", "not compiled: nvcc was not found")
    with FakeTensorMode():
        x = torch.empty(2, 3, 9, 4, device="cuda:0")
        with pytest.raises(
            ValueError, match=r"set_pooling: key must be on the CPU.*nvcc was not"
        ) as e:
            setformer_ext.set_pooling(x, x, x)
    assert "SETFORMER_CUDA=on" in str(e.value)
    assert "got cuda:0" in str(e.value)


@pytest.mark.skipif(bool(_C.build_info()["cuda_runtime"]), reason="this build has CUDA kernels")
def test_the_compiled_module_without_cuda_says_how_to_get_one() -> None:
    with pytest.raises(
        ValueError, match=r"key must be in CPU memory.*got cuda:1.*SETFORMER_CUDA=on"
    ):
        _C.set_attention_forward(**on(problem(), CUDA, 1))


# ---- the compiled module ----------------------------------------------------------------------


@pytest.fixture(scope="session")
def emulated() -> ModuleType:
    """In which the host's memory is that of device 0."""
    return BACKENDS["cuda-emulated"]().module


def placed(x: Tensor, device_type: int, device: int) -> object:
    """A capsule of x that claims to lie on another device."""
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    capsule = to_dlpack(x)
    # a DLTensor starts with its data pointer, device type and device number
    where = ctypes.cast(pointer(capsule, b"dltensor") + 8, ctypes.POINTER(ctypes.c_int32 * 2))
    where.contents[:] = device_type, device
    return capsule


def problem(N: int = 900) -> dict[str, Tensor]:
    """What set_attention_forward takes and writes; more tokens than one block holds."""
    rng = torch.Generator().manual_seed(0)
    return {
        "key": torch.randn(1, 2, N, 8, generator=rng),
        "value": torch.randn(1, 2, N, 8, generator=rng),
        "reference": torch.randn(2, 5, 8, generator=rng),
        "epsilon": torch.ones(2),
        "output": torch.full((1, 2, N, 8), torch.nan),
        "pooled": torch.full((1, 2, 5, 8), torch.nan),
        "rows": torch.full((1, 2, 2, N), torch.nan),
        "columns": torch.full((1, 2, 2, 5), torch.nan),
    }


def gradients(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """What set_attention_backward takes and writes beside."""
    return {
        "grad_output": torch.ones_like(arrays["output"]),
        "grad_key": torch.full_like(arrays["key"], torch.nan),
        "grad_value": torch.full_like(arrays["value"], torch.nan),
        "grad_reference": torch.full_like(arrays["reference"], torch.nan)[None],
        "grad_epsilon": torch.full((1, 2), torch.nan),
    }


def on(arrays: dict[str, Tensor], device_type: int, device: int) -> dict[str, object]:
    return {name: placed(x, device_type, device) for name, x in arrays.items()}


def bytes_on(device_type: int, device: int) -> Any:
    return lambda size: placed(torch.empty(size, dtype=torch.uint8), device_type, device)


def test_arrays_of_two_devices(emulated: ModuleType) -> None:
    arrays: dict[str, Any] = problem()
    for device_type, device, name in ((CUDA, 1, "cuda:1"), (ROCM, 0, "DLPack device type 10")):
        mixed = arrays | {"value": placed(arrays["value"], device_type, device)}
        message = rf"set_attention_forward: value must be on the key's device, cuda:0, got {name}"
        with pytest.raises(ValueError, match=message):
            emulated.set_attention_forward(**mixed, workspace=bytes_on(CUDA, 0))
    with pytest.raises(
        ValueError, match=r"key must be in .* a CUDA device, got DLPack device type 10"
    ):
        emulated.set_attention_forward(**on(arrays, ROCM, 0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workspace", "error", "message"),
    [
        (None, TypeError, "workspace must be a function .*bytes.* on cuda:0, got NoneType"),
        (torch.zeros(10), TypeError, "workspace must be a function .* got Tensor"),
        (lambda size: None, TypeError, "workspace must return an array, got None"),
        (lambda size: np.empty(size - 1, np.uint8), ValueError, r"workspace must be \[bytes="),
        (lambda size: np.empty(size), TypeError, "workspace must be uint8, got float64"),
        (lambda size: np.empty((size, 1), np.uint8), ValueError, r"got \[\d+, 1\]"),
        (
            lambda size: np.empty(2 * size, np.uint8)[::2],
            ValueError,
            "workspace must be contiguous",
        ),
        (
            bytes_on(CUDA, 1),
            ValueError,
            "workspace must be on the key's device, cuda:0, got cuda:1",
        ),
    ],
)
def test_wrong_workspace(emulated: ModuleType, workspace: Any, error: type, message: str) -> None:
    arrays = problem()
    with pytest.raises(error, match=f"set_attention_forward: .*{message}") as caught:
        emulated.set_attention_forward(**arrays, workspace=workspace)
    assert caught.type is error
    assert arrays["output"].isnan().all()


def test_an_error_of_the_allocator_comes_through(emulated: ModuleType) -> None:
    def out_of_memory(size: int) -> None:
        raise torch.OutOfMemoryError("no memory left")

    with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
        emulated.set_attention_forward(**problem(), workspace=out_of_memory)


@pytest.mark.parametrize(("device_type", "device"), [(CUDA, 0), (CUDA, 1), (CUDA_MANAGED, 1)])
def test_capsules_of_cuda_memory(emulated: ModuleType, device_type: int, device: int) -> None:
    """Also on a device that is not the current one."""
    expected, arrays = problem(), problem()
    _C.set_attention_forward(**expected)
    emulated.set_attention_forward(
        **on(arrays, device_type, device), workspace=bytes_on(device_type, device)
    )
    for name in ("output", "pooled"):
        torch.testing.assert_close(arrays[name], expected[name], rtol=1e-4, atol=1e-5)


class Exporter:
    """An array of a library that takes the consumer's stream, as the protocol has it."""

    def __init__(self, x: Tensor):
        self.x = x
        self.streams: list[int | None] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, 0

    def __dlpack__(self, *, stream: int | None = None) -> object:
        self.streams.append(stream)
        return placed(self.x, CUDA, 0)


@pytest.mark.parametrize(("stream", "told"), [(0, 1), (0x1230, 0x1230)])
def test_owners_of_arrays_are_told_the_stream(emulated: ModuleType, stream: int, told: int) -> None:
    """The protocol's number for the default stream is 1."""
    arrays: dict[str, Any] = problem()
    arrays["key"] = Exporter(arrays["key"])
    emulated.set_attention_forward(**arrays, workspace=bytes_on(CUDA, 0), stream=stream)
    assert arrays["key"].streams == [told]


@pytest.mark.parametrize("tokens", [30, 900])
@pytest.mark.parametrize("stream", [0, 0x1230])
@pytest.mark.parametrize("device", [0, 1])
def test_every_launch_is_on_the_device_and_stream(
    emulated: ModuleType, device: int, stream: int, tokens: int
) -> None:
    """Forward and backward; the current device is what it was before."""
    devices = Emulator(emulated.__file__)
    arrays = problem(tokens)
    for function, given in (
        (emulated.set_attention_forward, arrays),
        (emulated.set_attention_backward, arrays | gradients(arrays)),
    ):
        devices.clear_launches()
        function(**on(given, CUDA, device), stream=stream, workspace=bytes_on(CUDA, device))
        log = devices.launches()
        assert log
        for launch in log:
            found = launch.device, launch.stream, launch.status
            assert found == (device, stream, 0), launch.kernel
        assert devices.get_device() == 0


def test_errors_name_operation_kernel_and_device(emulated: ModuleType) -> None:
    """And leave nothing behind that a later call would report."""
    arrays = problem()
    message = r"set_attention_forward: \w+ failed on cuda:7: cudaErrorInvalidDevice: invalid device"
    with pytest.raises(RuntimeError, match=message):
        emulated.set_attention_forward(**on(arrays, CUDA, 7), workspace=bytes_on(CUDA, 7))
    emulated.set_attention_forward(**arrays, workspace=bytes_on(CUDA, 0))
    assert arrays["output"].isfinite().all()


class EnoughError(Exception):
    """Raised instead of giving memory."""


@pytest.mark.parametrize(("N", "M"), [(1_000_000, 64), (20_000, 512)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_workspace_holds_no_plan(emulated: ModuleType, dtype: torch.dtype, N: int, M: int) -> None:
    """In neither direction as much as a quarter of an N x M array would take."""
    T, D, asked = 5, 16, []
    accumulate = accumulate_dtype(dtype)

    def nothing(*shape: int, dtype: torch.dtype = accumulate) -> Tensor:
        return torch.empty(shape, dtype=dtype)  # untouched, so that it takes no memory

    def allocate(size: int) -> None:
        asked.append(size)
        raise EnoughError

    arrays = {
        "key": nothing(1, 1, N, D, dtype=dtype),
        "value": nothing(1, 1, N, D, dtype=dtype),
        "reference": nothing(1, M, D, dtype=dtype),
        "epsilon": torch.ones(1, dtype=accumulate),
        "output": nothing(1, 1, N, D, dtype=dtype),
        "pooled": nothing(1, 1, M, D),
        "rows": nothing(1, 1, T + 1, N),
        "columns": nothing(1, 1, T + 1, M),
        "iterations": T,
    }
    gradients = {
        "grad_output": nothing(1, 1, N, D, dtype=dtype),
        "grad_key": nothing(1, 1, N, D, dtype=dtype),
        "grad_value": nothing(1, 1, N, D, dtype=dtype),
        "grad_reference": nothing(1, 1, M, D),
        "grad_epsilon": nothing(1, 1),
    }
    with pytest.raises(EnoughError):
        emulated.set_attention_forward(**arrays, workspace=allocate)
    with pytest.raises(EnoughError):
        emulated.set_attention_backward(**arrays, **gradients, workspace=allocate)
    plan = N * M * accumulate.itemsize
    assert 0 < asked[0] < plan / 4
    assert 0 < asked[1] < plan / 4


@pytest.mark.parametrize(
    ("depth", "value_depth", "references", "message"),
    [
        (257, 4, 3, r"D, the depth of key, must be at most 256 on CUDA, got 257"),
        (4, 257, 3, r"Dv, the depth of value, must be at most 256 on CUDA, got 257"),
        (4, 4, 513, r"M, the number of references, must be at most 512 on CUDA, got 513"),
    ],
)
def test_sizes_beyond_the_kernels_are_refused(
    backend: Backend, depth: int, value_depth: int, references: int, message: str
) -> None:
    key, value = torch.randn(1, 1, 9, depth), torch.randn(1, 1, 9, value_depth)
    arguments = [x.to(backend.device) for x in (key, value, torch.randn(1, references, depth))]
    if not backend.on_cuda:
        assert backend.set_attention(None, *arguments).isfinite().all()
        return
    with pytest.raises(ValueError, match=f"{message}; the CPU takes any size"):
        backend.set_attention(None, *arguments)
