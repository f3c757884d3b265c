"""What holds on a GPU alone: streams, graphs, several devices, memory."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import set_attention
from .behaviour_checks import OPTIONS, all_identical, forward_and_backward
from .outcome import Result, SkippedError, Task
from .problems import Arguments, call, differentiable, output_gradient, random_problem
from .tolerance import Comparison, compare_with_definition

FEW: dict[str, Any] = {
    "N": 100,
    "M": 17,
    "D": 16,
    "Dv": 16,
}  # one head fits the shared memory of one block
MANY: dict[str, Any] = {"N": 5000, "M": 49, "D": 32, "Dv": 32}
NO_CACHING = "PYTORCH_NO_CUDA_MEMORY_CACHING"
CYCLES = 200_000_000  # for which a stream is kept busy: about a tenth of a second


def tasks() -> list[Task]:
    """The checks; each skips itself where the machine lacks what it needs."""
    checks: dict[str, Callable[[torch.device], Result]] = {
        "work is put on the current stream": current_stream,
        "calls return before their work is done": no_waiting,
        "two streams at once": two_streams,
        "a CUDA graph": graph,
        "the second GPU while the first is current": second_device,
        "no memory of the size N x M": memory,
        "an epsilon that is not positive": invalid_epsilon,
    }
    return [
        Task(name, check, needs=(torch.float32,), backward=check is not invalid_epsilon)
        for name, check in checks.items()
    ]


def _need_caching() -> None:
    """Without it, as tools that check memory want it, torch waits for the device at every
    free, refuses to capture graphs and counts no memory."""
    if NO_CACHING in os.environ:
        raise SkippedError(f"needs torch's caching of memory: {NO_CACHING} is set")


def _problem(device: torch.device, sizes: dict[str, Any], **more: Any) -> Arguments:
    return random_problem(
        5, **sizes | OPTIONS | {"dtype": torch.float32} | more, device=str(device)
    )


def current_stream(device: torch.device) -> Result:
    """On a busy side stream that writes the inputs late: any other stream would read zeros."""
    comparisons = []
    for sizes in (FEW, MANY):
        arguments = _problem(device, sizes)
        expected = forward_and_backward(arguments)
        late = {
            n: torch.zeros_like(x) if n in ("key", "value") else x for n, x in arguments.items()
        }
        grad_output = output_gradient(set_attention, arguments, 0)
        torch.cuda.synchronize(device)
        stream = torch.cuda.Stream(device)
        with torch.cuda.device(device), torch.cuda.stream(stream):
            torch.cuda._sleep(CYCLES)
            for name in ("key", "value"):
                late[name].copy_(arguments[name])
            results = _gradients(late, grad_output)
        stream.synchronize()
        comparisons += all_identical(f"N={sizes['N']}", results, expected)
    return Result(comparisons)


def _gradients(arguments: Arguments, grad_output: Tensor) -> dict[str, Tensor]:
    """Output and gradients, with nothing that waits for the device."""
    names = differentiable(arguments)
    leaves = {name: arguments[name].detach().requires_grad_() for name in names}
    output = call(set_attention, arguments | leaves)
    gradients = torch.autograd.grad(output, list(leaves.values()), grad_output)
    return {"output": output.detach()} | dict(zip(names, gradients, strict=True))


def no_waiting(device: torch.device) -> Result:
    """Forward and backward return while the stream is still busy with what came before."""
    _need_caching()
    arguments = _problem(device, MANY)
    grad_output = output_gradient(set_attention, arguments, 0)
    _gradients(arguments, grad_output)  # loads the kernels
    torch.cuda.synchronize(device)
    with torch.cuda.device(device):
        before = torch.cuda.Event()
        torch.cuda._sleep(5 * CYCLES)
        before.record()
        _gradients(arguments, grad_output)
        done = before.query()
        torch.cuda.synchronize(device)
    return Result([Comparison("the stream was idle on return", float(done), 0)])


def two_streams(device: torch.device) -> Result:
    """Calls that run at the same time share nothing."""
    problems = [_problem(device, MANY), _problem(device, FEW, kernel="linear")]
    upstream = [output_gradient(set_attention, problem, 0) for problem in problems]
    expected = [_gradients(*pair) for pair in zip(problems, upstream, strict=True)]
    torch.cuda.synchronize(device)
    streams = [torch.cuda.Stream(device) for _ in problems]
    results: list[dict[str, Tensor]] = [{} for _ in problems]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.device(device), torch.cuda.stream(stream):
                results[i] = _gradients(problems[i], upstream[i])
    torch.cuda.synchronize(device)
    return Result(
        [
            comparison
            for i, name in enumerate(("first", "second"))
            for comparison in all_identical(f"{name} stream", results[i], expected[i])
        ]
    )


def graph(device: torch.device) -> Result:
    """Captured with one problem, replayed with the numbers of another."""
    _need_caching()
    comparisons = []
    for sizes in (FEW, MANY):
        arguments = _problem(device, sizes)
        other = random_problem(6, **sizes | OPTIONS | {"dtype": torch.float32}, device=str(device))
        grad_output = output_gradient(set_attention, arguments, 0)
        expected = _gradients(other, grad_output)
        _gradients(arguments, grad_output)
        torch.cuda.synchronize(device)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(captured):
            results = _gradients(arguments, grad_output)
        for name, x in arguments.items():
            if isinstance(x, Tensor):
                x.copy_(other[name])
        for _ in range(2):
            captured.replay()
        torch.cuda.synchronize(device)
        comparisons += all_identical(f"N={sizes['N']}", results, expected)
    return Result(comparisons)


def second_device(device: torch.device) -> Result:
    """Tensors on another GPU than the current one are worked on where they are."""
    if torch.cuda.device_count() < 2:
        raise SkippedError("torch finds one GPU")
    other = torch.device("cuda", (device.index + 1) % torch.cuda.device_count())
    comparisons: list[Comparison] = []
    with torch.cuda.device(device):
        for sizes in (FEW, MANY):
            comparisons += compare_with_definition(set_attention, _problem(other, sizes))
        current = torch.cuda.current_device()
    moved = float(current != device.index)
    return Result([*comparisons, Comparison("current device changed", moved, 0)])


def memory(device: torch.device) -> Result:
    """Forward and backward of many tokens and references take less than one N x M matrix."""
    _need_caching()
    sizes: dict[str, Any] = {
        "B": 1,
        "H": 1,
        "N": 65536,
        "M": 512,
        "D": 16,
        "Dv": 16,
        "iterations": 2,
    }
    arguments = random_problem(5, **sizes, dtype=torch.float32, device=str(device))
    grad_output = output_gradient(set_attention, arguments, 0)
    _gradients(arguments, grad_output)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    _gradients(arguments, grad_output)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    matrix = sizes["N"] * sizes["M"] * 4
    return Result([Comparison("bytes", peak, matrix, "allowed is one float32 matrix N x M")])


def invalid_epsilon(device: torch.device) -> Result:
    """No look at values that are on the device: the head is NaN, the others are right."""
    arguments = _problem(device, FEW, H=3, epsilon=0.5)
    expected = call(set_attention, arguments | {"epsilon": torch.full((3,), 0.5, device=device)})
    epsilon = torch.tensor([0.5, -1.0, 0.5], device=device)
    output = call(set_attention, arguments | {"epsilon": epsilon})
    valid = arguments["mask"].unsqueeze(1).expand(-1, 3, -1)
    numbers = (~output[:, 1][valid[:, 1]].isnan()).sum().item()
    differing = (output[:, [0, 2]] != expected[:, [0, 2]]).sum().item()
    return Result(
        [
            Comparison("the head itself", numbers, 0, "entries that are numbers"),
            Comparison("the other heads", differing, 0, "entries that differ"),
        ]
    )
