"""Packed sequences against each sequence alone, and nested tensors in SetAttention."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import setformer_ext
from conftest import Backend, cuda_emulated
from emulator.device import Emulator
from exactness import assert_as_exact_as_definition
from setformer_ext import SetAttention, ops, set_attention_varlen
from setformer_ext.cli.selftest.problems import differentiable, move
from setformer_ext.functional import make_problem

LENGTHS = [5, 0, 49, 1, 130]
QUERY_LENGTHS = [3, 4, 0, 60, 1]


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def packed_problem(
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    cross: bool = False,
    everything: bool = False,
    lengths: list[int] = LENGTHS,
    query_lengths: list[int] = QUERY_LENGTHS,
    M: int = 7,
) -> dict[str, Any]:
    """Arguments of set_attention_varlen; masses, positions and references of each sequence's own
    where `everything`."""
    rng = torch.Generator().manual_seed(0)
    S, N, Nq, H, D, Dv = len(lengths), sum(lengths), sum(query_lengths), 2, 8, 6
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*sizes: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(sizes, generator=rng, dtype=torch.float64).to(device, dtype)

    arguments: dict[str, Any] = {
        "query": normal(Nq, H, D) if cross else None,
        "key": normal(N, H, D),
        "value": normal(N, H, Dv),
        "reference": normal(*(S, H, M, D) if everything else (H, M, D)),
        "kernel": "gaussian",
        "bandwidth": 1.0,
        "epsilon": 0.1,
        "normalize": True,
        "cu_seqlens": offsets_of(lengths).to(device),
        "iterations": 3,
    }
    if cross:
        arguments["cu_seqlens_query"] = offsets_of(query_lengths).int().to(device)
    if everything:
        arguments |= {
            "token_mass": normal(N, H, dtype=accumulate).abs() + 0.1,
            "reference_mass": normal(S, H, M, dtype=accumulate).exp(),
            "epsilon": normal(H, dtype=accumulate).exp(),
            "token_positions": normal(N, 2, dtype=accumulate),
            "reference_positions": normal(M, 2, dtype=accumulate),
            "position_bandwidth": 2.0,
        }
        if cross:
            arguments["query_positions"] = normal(Nq, 2, dtype=accumulate)
    for name in differentiable(arguments):
        arguments[name].requires_grad_()
    return arguments


def inputs_of(arguments: dict[str, Any]) -> dict[str, Tensor]:
    return {name: arguments[name] for name in differentiable(arguments)}


def sequences(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The arguments of set_attention for each sequence."""
    shared = {name: x for name, x in arguments.items() if "max_seqlen" not in name}
    ends = shared.pop("cu_seqlens").tolist()
    query_ends = shared.pop("cu_seqlens_query").tolist() if "cu_seqlens_query" in shared else ends
    rows = dict.fromkeys(("key", "value", "token_mass", "token_positions"), ends)
    rows |= dict.fromkeys(("query", "query_positions"), query_ends)
    ranks = {"reference": 4, "reference_mass": 3}
    problems = []
    for s in range(len(ends) - 1):
        own = dict(shared)
        for name, x in shared.items():
            if not isinstance(x, Tensor):
                continue
            if name in rows:
                x = x[rows[name][s] : rows[name][s + 1]]
                own[name] = x if "positions" in name else x.transpose(0, 1).unsqueeze(0)
            elif x.dim() == ranks.get(name):
                own[name] = x[s : s + 1]
        problems.append(own)
    return problems


def one_by_one(arguments: dict[str, Any]) -> Tensor:
    outputs = [setformer_ext.set_attention(**own) for own in sequences(arguments)]
    return torch.cat([output.squeeze(0).transpose(0, 1) for output in outputs])


@pytest.mark.parametrize("cross", [False, True])
def test_floating_point_operations_are_those_of_the_sequences(cross: bool) -> None:
    arguments = packed_problem(torch.float32, cross=cross)
    totals = []
    for function in (lambda given: set_attention_varlen(**given), one_by_one):
        with FlopCounterMode(display=False) as counter:
            output = function(arguments)
            forward = counter.get_total_flops()
            output.sum().backward()
        totals.append((forward, counter.get_total_flops()))
    assert totals[0] == totals[1]
    assert totals[0][1] > totals[0][0] > 0


def alone_in_the_same_kernels(
    query: Tensor | None,  # [1, H, Nq, D]
    key: Tensor,  # [1, H, N, D]
    value: Tensor,  # [1, H, N, Dv]
    **options: Any,
) -> Tensor:  # [1, H, Nq or N, Dv]
    """A sequence packed with no other, by the kernels that are chosen for longer ones."""

    def packed(x: Tensor) -> Tensor:  # [1, H, N, ..] -> [N, H, ..]
        return x.squeeze(0).transpose(0, 1)

    if query is not None:
        options["cu_seqlens_query"] = torch.tensor([0, query.shape[2]])
    if (mass := options.get("token_mass")) is not None:
        options["token_mass"] = packed(mass)
    output = set_attention_varlen(
        None if query is None else packed(query),
        packed(key),
        packed(value),
        cu_seqlens=torch.tensor([0, key.shape[2]]),
        **options,
    )
    return output.transpose(0, 1).unsqueeze(0)


def assert_same_bits(arguments: dict[str, Any], output: Tensor, expected: Tensor) -> None:
    """But for gradients that are sums over sequences: these are added up elsewhere."""
    assert torch.equal(output, expected)
    inputs = inputs_of(arguments)
    upstream = torch.randn(output.shape, generator=torch.manual_seed(1)).to(output)
    grads = torch.autograd.grad(output, list(inputs.values()), upstream)
    expected_grads = torch.autograd.grad(expected, list(inputs.values()), upstream)
    S = arguments["cu_seqlens"].shape[0] - 1
    for name, grad, wanted in zip(inputs, grads, expected_grads, strict=True):
        if name == "epsilon" or (name == "reference" and grad.dim() == 3):
            largest, rounding = float(wanted.abs().max()), S * torch.finfo(grad.dtype).eps
            torch.testing.assert_close(grad, wanted, rtol=0, atol=8 * rounding * largest)
        else:
            assert torch.equal(grad, wanted), name


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_packed_sequences_are_the_sequences(
    dtype: torch.dtype, cross: bool, everything: bool
) -> None:
    arguments = packed_problem(dtype, cross=cross, everything=everything)
    assert_same_bits(arguments, set_attention_varlen(**arguments), one_by_one(arguments))


# On chip or resident, and streaming, where short heads are shared by fewer blocks than long ones.
KERNELS: dict[str, dict[str, Any]] = {
    "one block a head": {},
    "streaming": {"lengths": [70, 0, 600, 1], "query_lengths": [3, 5, 0, 300], "M": 130},
}


@pytest.mark.parametrize("sizes", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_one_launch_computes_all_sequences(
    backend: Backend, dtype: torch.dtype, cross: bool, sizes: dict[str, Any]
) -> None:
    """On CUDA the longest decides which kernels run: then each sequence has the bits that it has
    alone in these, and they are as exact as others."""
    if backend.emulated and dtype == torch.float64 and sizes:  # streams whatever the sizes are
        sizes = {"lengths": [40, 0, 270, 1], "query_lengths": [3, 5, 0, 150], "M": 20}
    arguments = packed_problem(dtype, backend.device, cross=cross, everything=True, **sizes)
    longest = {"max_seqlen": int(arguments["cu_seqlens"].diff().max())}
    if cross:
        longest["max_seqlen_query"] = int(arguments["cu_seqlens_query"].diff().max())
    parts = sequences(arguments)
    launched = []
    emulator = Emulator(backend.module.__file__) if backend.emulated else None

    def call(function: Callable[..., Tensor], given: dict[str, Any]) -> Tensor:
        if emulator is not None:
            emulator.clear_launches()
        output = function(**given, **longest)
        if emulator is not None:
            launched.append([launch.kernel for launch in emulator.launches()])
        return output

    def alone(**given: Any) -> Tensor:
        return call(alone_in_the_same_kernels, given)

    alone.__name__ = "set_attention"  # of the definition, which it is compared with
    output = call(set_attention_varlen, arguments)
    expected = torch.cat([alone(**own).squeeze(0).transpose(0, 1) for own in parts])
    for own, kernels in zip(parts, launched[1:], strict=False):
        if own["key"].numel() > 0 and (not cross or own["query"].numel() > 0):
            assert kernels == launched[0]  # of nothing some have no block
    assert_same_bits(arguments, output, expected)
    for own in parts:
        assert_as_exact_as_definition(alone, move(own, dtype=dtype))


def test_results_lie_in_memory_as_they_are_read() -> None:
    arguments = packed_problem(torch.float32)
    output = set_attention_varlen(**arguments)
    assert output.is_contiguous()
    assert torch.autograd.grad(output.sum(), arguments["key"])[0].is_contiguous()


@pytest.mark.parametrize("heads", [1, 2, 16])  # the spans of a head in parallel, or heads
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(threads: int, heads: int) -> None:
    lengths = [3, 3000, 0, 1]
    arguments = {
        "query": None,
        "key": torch.randn(sum(lengths), heads, 4),
        "value": torch.randn(sum(lengths), heads, 3),
        "reference": torch.randn(heads, 5, 4),
        "cu_seqlens": offsets_of(lengths),
    }
    torch.set_num_threads(1)
    expected = one_by_one(arguments)
    torch.set_num_threads(threads)
    assert torch.equal(set_attention_varlen(**arguments), expected)


@pytest.mark.parametrize("cross", [False, True])
def test_second_derivative(cross: bool) -> None:
    arguments = packed_problem(torch.float64, cross=cross, everything=True)
    inputs = inputs_of(arguments)

    def twice(output: Tensor) -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(output.square().sum(), list(inputs.values()), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), list(inputs.values()))

    found, expected = twice(set_attention_varlen(**arguments)), twice(one_by_one(arguments))
    for name, x, wanted in zip(inputs, found, expected, strict=True):
        torch.testing.assert_close(x, wanted, msg=lambda text, name=name: f"{name}: {text}")


def test_compile() -> None:
    arguments = packed_problem(torch.float32, cross=True, everything=True)
    compiled = torch.compile(set_attention_varlen, fullgraph=True)
    output = compiled(**arguments)
    torch.testing.assert_close(output, set_attention_varlen(**arguments))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"key": torch.zeros(1, 2, 9, 8)},
            ValueError,
            r"key must be \[N, H, D\], got \[1, 2, 9",
        ),
        ({"key": None}, TypeError, "key must be a tensor, got NoneType"),
        ({"value": torch.zeros(9, 2, 6)}, ValueError, r"value must be \[N=185, H=2, Dv\]"),
        ({"cu_seqlens": None}, TypeError, "cu_seqlens must be an int32 or int64 tensor"),
        ({"cu_seqlens": torch.zeros(6)}, TypeError, "cu_seqlens must be int32 or int64, got float"),
        (
            {"cu_seqlens": torch.tensor([0])},
            ValueError,
            r"cu_seqlens must be \[S \+ 1\] for S >= 1",
        ),
        *(
            (
                {"cu_seqlens": torch.tensor(offsets)},
                ValueError,
                r"cu_seqlens must be ascending from 0 to the number of packed tokens, 185, got \[",
            )
            for offsets in ([0, 9], [0, 99, 98, 185], [1, 185], [0, -9, 185])
        ),
        (
            {"cu_seqlens": torch.zeros(6, dtype=torch.int64, device="meta")},
            ValueError,
            "cu_seqlens must be on a",
        ),
        ({"key": torch.zeros(185, 2, 0)}, ValueError, r"key must be \[N, H, D\] with D >= 1"),
        ({"value": torch.zeros(185, 2, 0)}, ValueError, r"value must be \[N, H, Dv\] with Dv >= 1"),
        (
            {"reference": torch.zeros(3, 2, 7, 8)},
            ValueError,
            r"reference must be .*\[S=5, H=2, M, D=8\], got \[3, 2, 7, 8\]",
        ),
        (
            {"cu_seqlens_query": torch.tensor([0, 185])},
            ValueError,
            "cu_seqlens_query must be None in self attention",
        ),
        ({"query": torch.zeros(9, 2, 8)}, TypeError, "cu_seqlens_query must be an int32 or int64"),
        (
            {"query": torch.zeros(9, 2, 8), "cu_seqlens_query": torch.tensor([0, 9])},
            ValueError,
            r"cu_seqlens_query must be \[S \+ 1=6\] as cu_seqlens is, got \[2\]",
        ),
        (
            {"max_seqlen": 129},
            ValueError,
            "max_seqlen must be at least the length of every sequence, got 129, of 130",
        ),
        ({"max_seqlen": 0}, ValueError, "max_seqlen must be >= 1, got 0"),
        ({"max_seqlen": 130.0}, TypeError, "max_seqlen must be an int or None, got float"),
        ({"max_seqlen": True}, TypeError, "max_seqlen must be an int or None, got bool"),
        ({"max_seqlen_query": 9}, ValueError, "max_seqlen_query must be None in self attention"),
        ({"token_mass": torch.zeros(2, 185)}, ValueError, r"token_mass must be \[N=185, H=2\]"),
        ({"token_mass": -torch.ones(185, 2)}, ValueError, "token_mass must be >= 0 everywhere"),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"set_attention.*: {message}"):
        set_attention_varlen(**packed_problem(torch.float32) | changes)


def test_compiled_calls_check_the_longest_sequence_too() -> None:
    arguments = packed_problem(torch.float32, cross=True)
    longest = {"max_seqlen": max(LENGTHS), "max_seqlen_query": max(QUERY_LENGTHS)}
    compiled = torch.compile(set_attention_varlen, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**arguments, **longest), set_attention_varlen(**arguments))
    for name, length in longest.items():
        expected = f"{name} must be at least the length of every sequence, got {length - 1}"
        with pytest.raises(ValueError, match=expected):
            compiled(**arguments, **longest | {name: length - 1})


MODULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "pooled references": {"pooled_references": True},
    "queries are keys": {"query_projection": False},
    "adaptive masses": {"adaptive_reference_mass": True},
    "positions": {"position_bandwidth": 0.5},
    "anchors": {"num_anchors": 6},
}


@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES)
def test_nested_tensors_in_the_module(options: dict[str, Any]) -> None:
    """Each sequence alone, and without positions (which count padding) the padded call."""
    torch.manual_seed(0)
    module = SetAttention(16, num_heads=2, num_references=6, **options).double()
    parts = [torch.randn(n, 16, dtype=torch.float64, requires_grad=True) for n in (5, 1, 49)]
    nested = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
    output = module(nested)
    alone = [module(part.unsqueeze(0)).squeeze(0) for part in parts]
    for found, expected in zip(output.unbind(), alone, strict=True):
        torch.testing.assert_close(found, expected)
    assert (nested + output).is_nested  # a residual
    grads = torch.autograd.grad(output.values().square().sum(), parts)
    expected_grads = torch.autograd.grad(sum(x.square().sum() for x in alone), parts)
    for found, expected in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(found, expected)
    if "position_bandwidth" not in options:
        mask = torch.arange(49) < torch.tensor([[5], [1], [49]])
        padded = module(nested.to_padded_tensor(0.0), mask)
        torch.testing.assert_close(output.to_padded_tensor(0.0), padded)


def test_errors_of_nested_tensors() -> None:
    module = SetAttention(16, num_heads=2, num_references=6)
    parts = [torch.randn(n, 16) for n in (5, 3)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    with pytest.raises(ValueError, match="mask must be None with a nested x"):
        module(nested, torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"x must be a nested tensor of layout torch\.jagged"):
        module(torch.nested.nested_tensor(parts, layout=torch.strided))
    with pytest.raises(ValueError, match=r"x must be floating point \[B, j, C=16\]"):
        module(torch.nested.nested_tensor([torch.randn(5, 8)], layout=torch.jagged))
    with pytest.raises(TypeError, match="x must be floating point"):
        module(torch.nested.nested_tensor([torch.ones(5, 16).int()], layout=torch.jagged))
    starts, lengths = torch.tensor([0, 4]), torch.tensor([2, 5])
    holes = torch.nested.narrow(torch.randn(2, 9, 16), 1, starts, lengths, layout=torch.jagged)
    with pytest.raises(ValueError, match=r"x must be .* without holes \(call \.contiguous\(\)\)"):
        module(holes)


def test_nested_tensors_without_tokens() -> None:
    module = SetAttention(16, num_heads=2, num_references=6)
    empty = torch.nested.nested_tensor([torch.zeros(0, 16)] * 3, layout=torch.jagged)
    assert module(empty).values().shape == (0, 16)


def test_cuda_workspace_is_for_all_tokens_and_not_for_sequences_as_long_as_the_longest() -> None:
    module = cuda_emulated().module

    def bytes_wanted(lengths: list[int]) -> int:
        S, N, H, D, M, T = len(lengths), sum(lengths), 1, 4, 3, 1
        arrays = {
            "key": np.zeros((1, H, N, D), "f4"),
            "value": np.zeros((1, H, N, D), "f4"),
            "reference": np.zeros((H, M, D), "f4"),
            "epsilon": np.ones(H, "f4"),
            "offsets": np.cumsum([0, *lengths]),
            "output": np.zeros((1, H, N, D), "f4"),
            "pooled": np.zeros((S, H, M, D), "f4"),
            "rows": np.zeros((1, H, T + 1, N), "f4"),
            "columns": np.zeros((S, H, T + 1, M), "f4"),
        }
        wanted = []

        def workspace(size: int) -> None:
            wanted.append(size)
            raise InterruptedError

        with pytest.raises(InterruptedError):
            module.set_attention_forward(
                **arrays, iterations=T, max_seqlen=max(lengths), workspace=workspace
            )
        return wanted[0]

    one = bytes_wanted([60000])
    assert one < bytes_wanted([60000] + [600] * 100) < 3 * one


# Offsets that no call on the CPU takes, of 20 tokens in sequences of 12 at most, and which of the
# sequences they spoil.
WRONG_OFFSETS = {
    "descending": ([0, 8, 4, 16, 20], [True, True, True, False]),
    "too long": ([0, 2, 18, 20], [False, True, False]),
    "beyond the end": ([0, 9, 12, 24], [False, False, True]),
    "far beyond": ([0, 9, 1 << 40, 1 << 50], [False, True, True]),
    "negative": ([0, -5, 8, 20], [True, True, False]),
    "not from 0": ([3, 9, 12, 20], [True, False, False]),
    "not to the end": ([0, 9, 12, 17], [False, False, True]),
}


@pytest.mark.parametrize("name", WRONG_OFFSETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wrong_offsets_that_nobody_reads_make_a_sequence_nan(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, name: str
) -> None:
    """The others are what they should be."""
    offsets, spoilt = WRONG_OFFSETS[name]
    monkeypatch.setattr(ops, "_C", cuda_emulated().module)
    H, N = 2, 20
    key, value = (torch.randn(1, H, N, 8).to(dtype) for _ in range(2))
    reference = torch.randn(H, 5, 8).to(dtype)
    options = {"kernel": "gaussian", "position_bandwidth": None, "iterations": 2}
    options |= {"bandwidth": 1.0, "epsilon": 0.1, "normalize": False}
    problem = make_problem({"key": key, "value": value, "reference": reference, **options})
    problem = problem._replace(offsets=torch.tensor(offsets), max_seqlen=12)
    solution = ops.solve(problem)
    for s in range(len(spoilt)):
        begin, end = offsets[s], offsets[s + 1]
        if spoilt[s]:  # or has no tokens within bounds, of which it collects 0
            assert (solution.pooled[s].isnan() | (solution.pooled[s] == 0)).all(), s
            begin, end = max(begin, 0), max(end, 0)
            assert solution.output[:, :, begin : min(end, begin + 12)].isnan().all(), s
        else:
            alone = setformer_ext.reference.set_attention(
                None,
                *(x[:, :, begin:end].double() for x in (key, value)),
                reference.double(),
                **options | {"position_bandwidth": 1.0},
            )
            found = solution.output[:, :, begin:end].double()
            tolerance = 8 * torch.finfo(dtype).eps * float(value.abs().max())
            torch.testing.assert_close(found, alone, rtol=0, atol=tolerance)
