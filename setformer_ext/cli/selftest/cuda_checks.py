"""Checks that need a GPU: streams, graphs, several devices, memory."""

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import set_attention, set_attention_varlen
from .behaviour_checks import OPTIONS, all_identical, count
from .outcome import Check, SkippedError, Task
from .problems import Arguments, call, generator, output_gradient, random_problem, run
from .tolerance import Comparison, compare_with_definition

# One head of few tokens fits the shared memory of one block.
FEW: dict[str, Any] = {"N": 100, "M": 17, "D": 16, "Dv": 16}
MANY: dict[str, Any] = {"N": 5000, "M": 49, "D": 32, "Dv": 32}
NO_CACHING = "PYTORCH_NO_CUDA_MEMORY_CACHING"
CYCLES = 200_000_000  # to keep a stream busy, about a tenth of a second


def tasks() -> list[Task]:
    """The checks; each skips itself if the machine lacks what it needs."""
    checks: dict[str, Check] = {
        "work is put on the current stream": current_stream,
        "calls return before their work is done": no_waiting,
        "two streams at once": two_streams,
        "a CUDA graph": graph,
        "packed sequences in a CUDA graph": graph_of_packed,
        "the second GPU while the first is current": second_device,
        "no memory of the size N x M": memory,
        "an epsilon that is not positive": invalid_epsilon,
    }
    return [
        Task(name, check, needs=(torch.float32,), backward=check is not invalid_epsilon)
        for name, check in checks.items()
    ]


def _need_caching() -> None:
    """Skip without torch's caching of memory, which tools that check memory switch off: torch then
    waits for the device at every free, refuses to capture graphs and counts no memory."""
    if NO_CACHING in os.environ:
        raise SkippedError(f"needs torch's caching of memory: {NO_CACHING} is set")


def _problem(
    device: torch.device, sizes: dict[str, Any], seed: int = 5, **more: Any
) -> tuple[Arguments, Tensor]:
    """Arguments of set_attention and a gradient of its output."""
    options = sizes | OPTIONS | {"dtype": torch.float32} | more
    arguments = random_problem(seed, **options, device=device)
    return arguments, output_gradient(set_attention, arguments)


def current_stream(device: torch.device) -> Iterator[Comparison]:
    """On a busy side stream that writes the inputs late: any other stream would read zeros."""
    for sizes in (FEW, MANY):
        arguments, grad_output = _problem(device, sizes)
        expected = run(set_attention, arguments, grad_output)
        late = arguments | {name: torch.zeros_like(arguments[name]) for name in ("key", "value")}
        torch.cuda.synchronize(device)
        stream = torch.cuda.Stream(device)
        with torch.cuda.device(device), torch.cuda.stream(stream):
            torch.cuda._sleep(CYCLES)
            for name in ("key", "value"):
                late[name].copy_(arguments[name])
            results = run(set_attention, late, grad_output)
        stream.synchronize()
        yield from all_identical(f"N={sizes['N']}", results, expected)


def no_waiting(device: torch.device) -> Iterator[Comparison]:
    """Forward and backward return while the stream is still busy with what came before."""
    _need_caching()
    problem = _problem(device, MANY)
    run(set_attention, *problem)  # loads the kernels
    torch.cuda.synchronize(device)
    with torch.cuda.device(device):
        before = torch.cuda.Event()
        torch.cuda._sleep(5 * CYCLES)
        before.record()
        run(set_attention, *problem)
        done = before.query()
        torch.cuda.synchronize(device)
    yield Comparison("the stream was idle on return", float(done), 0)


def two_streams(device: torch.device) -> Iterator[Comparison]:
    """Calls that run at the same time share nothing."""
    problems = [_problem(device, MANY), _problem(device, FEW, kernel="linear")]
    expected = [run(set_attention, *problem) for problem in problems]
    torch.cuda.synchronize(device)
    streams = [torch.cuda.Stream(device) for _ in problems]
    results: list[dict[str, Tensor]] = [{} for _ in problems]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.device(device), torch.cuda.stream(stream):
                results[i] = run(set_attention, *problems[i])
    torch.cuda.synchronize(device)
    for i, name in enumerate(("first", "second")):
        yield from all_identical(f"{name} stream", results[i], expected[i])


def graph(device: torch.device) -> Iterator[Comparison]:
    """Captured with one problem, replayed with the numbers of another."""
    _need_caching()
    for sizes in (FEW, MANY):
        arguments, grad_output = _problem(device, sizes)
        other, _ = _problem(device, sizes, seed=6)
        expected = run(set_attention, other, grad_output)
        run(set_attention, arguments, grad_output)
        torch.cuda.synchronize(device)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(captured):
            results = run(set_attention, arguments, grad_output)
        for name, x in arguments.items():
            if isinstance(x, Tensor):
                x.copy_(other[name])
        for _ in range(2):
            captured.replay()
        torch.cuda.synchronize(device)
        yield from all_identical(f"N={sizes['N']}", results, expected)


def graph_of_packed(device: torch.device) -> Iterator[Comparison]:
    """Captured with some offsets, replayed with others, which the CPU reads in neither call."""
    _need_caching()
    rng, (H, D, M) = generator(7), (3, 16, 17)
    for longest in (100, 5000):
        N = 2 * longest
        shapes = ((N, H, D), (N, H, D), (H, M, D))
        tensors = [torch.randn(shape, generator=rng).to(device) for shape in shapes]
        for x in tensors:
            x.requires_grad_()
        half = longest // 2
        ends = torch.tensor([0, half, half, longest, N], device=device)
        others = torch.tensor([0, longest, longest + 1, longest + 9, N], device=device)
        expected = _packed(*tensors, ends=others, longest=longest)
        _packed(*tensors, ends=ends, longest=longest)
        torch.cuda.synchronize(device)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(captured):
            results = _packed(*tensors, ends=ends, longest=longest)
        ends.copy_(others)
        captured.replay()
        torch.cuda.synchronize(device)
        yield from all_identical(f"longest {longest}", results, expected)


def _packed(
    key: Tensor,  # [N, H, D]
    value: Tensor,  # [N, H, D]
    reference: Tensor,  # [H, M, D]
    *,
    ends: Tensor,  # [S + 1]
    longest: int,
) -> dict[str, Tensor]:
    """Output and gradients of packed sequences."""
    output = set_attention_varlen(None, key, value, reference, ends, max_seqlen=longest)
    grads = torch.autograd.grad(output.square().sum(), (key, value, reference))
    names = ("key", "value", "reference")
    return {"output": output.detach(), **dict(zip(names, grads, strict=True))}


def second_device(device: torch.device) -> Iterator[Comparison]:
    """Tensors on another GPU than the current one are computed with on that GPU."""
    if torch.cuda.device_count() < 2:
        raise SkippedError("torch finds one GPU")
    other = torch.device("cuda", (device.index + 1) % torch.cuda.device_count())
    comparisons: list[Comparison] = []
    with torch.cuda.device(device):
        for sizes in (FEW, MANY):
            arguments, _ = _problem(other, sizes)
            comparisons += compare_with_definition(set_attention, arguments)
        current = torch.cuda.current_device()
    yield from comparisons
    yield Comparison("current device changed", float(current != device.index), 0)


def memory(device: torch.device) -> Iterator[Comparison]:
    """Forward and backward of many tokens and references take less than one N x M matrix."""
    _need_caching()
    sizes: dict[str, Any] = {"B": 1, "H": 1, "N": 65536, "M": 512, "D": 16, "Dv": 16}
    arguments = random_problem(5, **sizes, iterations=2, dtype=torch.float32, device=device)
    grad_output = output_gradient(set_attention, arguments)
    run(set_attention, arguments, grad_output)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run(set_attention, arguments, grad_output)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    matrix = sizes["N"] * sizes["M"] * 4
    yield Comparison("bytes", peak, matrix, "allowed is one float32 matrix N x M")


def invalid_epsilon(device: torch.device) -> Iterator[Comparison]:
    """Values on a device are not checked: a head with a bad epsilon is NaN, others are right."""
    arguments, _ = _problem(device, FEW, H=3, epsilon=0.5)
    expected = call(set_attention, arguments | {"epsilon": torch.full((3,), 0.5, device=device)})
    epsilon = torch.tensor([0.5, -1.0, 0.5], device=device)
    output = call(set_attention, arguments | {"epsilon": epsilon})
    valid = arguments["mask"].unsqueeze(1).expand(-1, 3, -1)
    numbers = ~output[:, 1][valid[:, 1]].isnan()
    differing = output[:, [0, 2]] != expected[:, [0, 2]]
    yield count("the head itself", numbers, "entries that are numbers")
    yield count("the other heads", differing, "entries that differ")
