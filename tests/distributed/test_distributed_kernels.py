"""The kernels with the tokens of each sequence cut among ranks, which are threads here: the results
of all ranks together against the definition."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import Backend
from exactness import assert_as_exact_as_definition
from ranks import ThreadRanks
from setformer_ext import autograd, functional, ops
from setformer_ext.cli.selftest.problems import random_problem
from setformer_ext.distributed.ranks import log2_sum
from setformer_ext.problem import OF_KEYS, OF_QUERIES, Backward, Gradients, Problem, Solution

# Parts of all tokens, and of all queries: uneven, and a rank without any.
SHARES = (0.1, 0.0, 0.6, 0.3)


def cut(total: int) -> list[int]:
    sizes = [int(share * total) for share in SHARES]
    sizes[-1] = total - sum(sizes[:-1])
    return sizes


def shards(problem: Problem) -> list[Problem]:
    """The problems of the ranks."""
    parts: list[dict[str, Any]] = [{} for _ in SHARES]
    for names in (OF_KEYS, OF_QUERIES):
        for name, dimension in names.items():
            x = getattr(problem, name)
            if x is None:
                continue
            for own, part in zip(parts, x.split(cut(x.shape[dimension]), dimension), strict=True):
                own[name] = part
    return [problem._replace(**own) for own in parts]


class Sharded(torch.autograd.Function):
    """set_attention by ranks that are threads."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        problem = Problem(*arguments)
        ctx.problem = problem
        ctx.shards = shards(problem)
        ranks = ThreadRanks(len(SHARES))
        ctx.solutions = ranks.run(lambda rank, merge: ops.solve(ctx.shards[rank], merge))
        return torch.cat([solution.output for solution in ctx.solutions], 2)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        grads = grad_output.split(cut(grad_output.shape[2]), 2)

        def differentiate(rank: int, merge: Any) -> Gradients:
            given = Backward(grads[rank], None, ctx.solutions[rank], ctx.shards[rank])
            return ops.differentiate(given, merge)

        found = ThreadRanks(len(SHARES)).run(differentiate)
        whole = {}
        for name, parts in zip(Gradients._fields, zip(*found, strict=True), strict=True):
            if getattr(ctx.problem, name) is None:
                whole[name] = parts[0]
            elif name in OF_KEYS | OF_QUERIES:
                whole[name] = torch.cat(parts, 2)
            elif name == "reference_mass":  # of which each rank has the whole
                assert all(torch.equal(part, parts[0]) for part in parts)
                whole[name] = parts[0]
            else:
                whole[name] = torch.stack(parts).sum(0)
        return autograd.gradients_of_inputs(ctx.problem, whole)


def problem_of_all(**options: Any) -> Problem:
    return functional.make_problem(
        {**functional.DEFAULTS, "epsilon": 0.1, "iterations": 5, **options}
    )


def set_attention(**options: Any) -> Tensor:
    output: Tensor = Sharded.apply(*problem_of_all(**options))  # type: ignore[no-untyped-call]
    return output


PROBLEMS: dict[str, dict[str, Any]] = {
    "self": {},
    "one step": {"iterations": 1},
    "no step": {"iterations": 0},
    "log domain": {"epsilon": 0.01, "iterations": 3},
    "linear": {"kernel": "linear", "iterations": 3},
    "cross": {"Nq": 61, "iterations": 2},
    "cross, no step": {"Nq": 61, "iterations": 0},
    "cross, log domain": {"Nq": 61, "epsilon": 0.01, "iterations": 2},
    "masked": {"masked": True, "token_mass": True, "reference_mass": "learned"},
    "masked cross": {"masked": True, "Nq": 61, "token_mass": True, "iterations": 2},
    "of each sample": {"per_sample": True, "reference_mass": "per-sample"},
    "positions": {"P": 2, "bandwidth": "learned", "epsilon": "learned"},
    "many tokens": {"N": 1301, "B": 1, "H": 2},
    "forms of both kinds": {"epsilon": "both", "iterations": 2},
}


def problem_of(name: str, dtype: torch.dtype, **sizes: int) -> dict[str, Any]:
    options = sizes | PROBLEMS[name]
    both = options.get("epsilon") == "both"
    if both:
        options["epsilon"] = "learned"
    arguments = random_problem(dtype=dtype, **options)
    if both:  # heads by scaling beside heads in the log domain
        arguments["epsilon"] = torch.tensor([0.2, 0.003, 0.1], dtype=dtype)
    return arguments


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_shards_together_are_as_exact_as_the_definition(
    backend: Backend, name: str, dtype: torch.dtype
) -> None:
    torch.set_num_threads(1)
    sizes = {"B": 1} if backend.emulated and name != "of each sample" else {}
    assert_as_exact_as_definition(set_attention, problem_of(name, dtype, **sizes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision(backend: Backend, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    assert_as_exact_as_definition(set_attention, problem_of("masked", dtype))


def test_log2_sum() -> None:
    x = torch.tensor([[0.0, -torch.inf, 1000, -torch.inf], [0, 3, 998, -torch.inf]])
    expected = torch.tensor([1.0, 3, 1000 + math.log2(1.25), -torch.inf])
    torch.testing.assert_close(log2_sum(x), expected)


def test_bits_do_not_depend_on_the_run_or_the_threads() -> None:
    def results(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        problem = problem_of("many tokens", torch.float32)
        inputs = [problem[name].requires_grad_() for name in ("key", "value", "reference")]
        output = set_attention(**problem)
        return [output, *torch.autograd.grad(output.sin().sum(), inputs)]

    first = results(1)
    for again in (results(1), results(2), results(3)):
        for x, y in zip(first, again, strict=True):
            assert torch.equal(x, y)


def test_no_rank_holds_a_valid_token() -> None:
    problem = random_problem(N=20, masked=True)
    problem["mask"] = torch.zeros(2, 20, dtype=torch.bool)
    problem["key"].requires_grad_()
    output = set_attention(**problem)
    (gradient,) = torch.autograd.grad(output.sum(), problem["key"])
    assert torch.equal(output, torch.zeros_like(output))
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_what_one_rank_finds_wrong_ends_the_call_of_all() -> None:
    problem = random_problem(N=20, token_mass=True)
    parts = shards(problem_of_all(**problem))
    token_mass = parts[2].token_mass
    assert token_mass is not None
    parts[2] = parts[2]._replace(token_mass=token_mass - 2)

    def error(rank: int, merge: Any) -> str:
        with pytest.raises((ValueError, RuntimeError)) as caught:
            ops.solve(parts[rank], merge)
        return str(caught.value)

    errors = ThreadRanks(len(SHARES)).run(error)
    for rank, text in enumerate(errors):
        expected = "token_mass must be >= 0" if rank == 2 else "another rank of the group failed"
        assert expected in text


def test_errors_of_ranks_that_differ_end_the_call_of_all() -> None:
    """One refuses its masses in the first head, the others what all have alike in the second."""
    whole = random_problem(N=20, token_mass=True, reference_mass="learned")
    parts = shards(problem_of_all(**whole))
    token_mass, reference_mass = parts[2].token_mass, parts[2].reference_mass
    assert token_mass is not None
    assert reference_mass is not None
    token_mass[:, 0] = -1
    reference_mass[1] = 0  # of all ranks

    def error(rank: int, merge: Any) -> str:
        with pytest.raises(ValueError, match="mass must") as caught:
            ops.solve(parts[rank], merge)
        return str(caught.value)

    for rank, text in enumerate(ThreadRanks(len(SHARES)).run(error)):
        assert ("token_mass" if rank == 2 else "reference_mass") in text


def test_heads_of_both_forms_are_merged_together() -> None:
    """One message a stage for each way of merging, however the forms alternate."""
    calls = []
    problem = random_problem(H=6, N=9, iterations=3)
    problem["epsilon"] = torch.tensor([0.1, 0.001] * 3, dtype=torch.float64)
    ops.solve(problem_of_all(**problem), lambda arrays, how: calls.append((len(arrays), how)))
    # masses; each step; then, in the log domain alone, what collect is divided by and collects
    heads = 2 * 6 // 2  # of either form, each beside one of the other: an entry each
    steps = [(heads, "sum"), (heads, "logsum")] * 2 + [(2 * heads, "sum"), (heads, "logsum")]
    assert calls == [(1, "sum"), *steps, (heads, "sum"), (heads, "sum")]


def test_what_merging_raises_comes_out_of_the_call() -> None:
    def interrupted(arrays: list[Any], how: str) -> None:
        raise KeyboardInterrupt

    problem = problem_of_all(**random_problem(N=9))
    with pytest.raises(KeyboardInterrupt):
        ops.solve(problem, interrupted)
    with pytest.raises(TypeError, match="merge must be a function"):
        ops.solve(problem, "sum")  # type: ignore[arg-type]
    assert isinstance(ops.solve(problem), Solution)
