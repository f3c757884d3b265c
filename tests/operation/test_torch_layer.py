"""The operations inside torch: opcheck, compile, export, func, autocast, DDP, FLOP counts."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import setformer_ext
from conftest import Backend
from fresh import fresh
from setformer_ext import reference as definition
from setformer_ext.autograd import SetAttentionFunction
from setformer_ext.cli.selftest.problems import (
    Arguments,
    call,
    differentiable,
    output_gradient,
    random_problem,
    run,
)
from setformer_ext.cli.selftest.tolerance import largest
from setformer_ext.problem import Problem

OPERATIONS = torch.ops.setformer_ext

OPTIONS = {
    "plain": {},
    "everything": {
        "Nq": 5, "masked": True, "token_mass": True, "reference_mass": "learned",
        "bandwidth": "learned", "epsilon": "learned", "P": 2,
    },
    "per sample": {"per_sample": True, "reference_mass": "per-sample", "token_mass": True},
    "linear, no iterations": {"kernel": "linear", "iterations": 0, "masked": True},
}  # fmt: skip


def small(options: str = "plain", seed: int = 0, **more: object) -> Arguments:
    sizes = {"B": 2, "H": 2, "N": 7, "M": 3, "D": 4, "Dv": 3, "epsilon": 0.3}
    return random_problem(seed, **(sizes | OPTIONS[options] | more))


def operands(arguments: Arguments, distribute: bool = True) -> Problem:
    """The arguments of torch.ops.setformer_ext.set_attention."""
    heads, dtype = arguments["key"].shape[1], arguments["key"].dtype
    given = {name: arguments.get(name) for name in Problem._fields}
    by_head = {
        name: torch.as_tensor(arguments[name], dtype=dtype, device=arguments["key"].device)
        .expand(heads)
        .clone()
        for name in ("bandwidth", "epsilon")
    }
    return Problem(
        **given
        | by_head
        | {
            "position_bandwidth": arguments.get("position_bandwidth", 1.0),
            "distribute": distribute,
            "max_seqlen": 0,
            "max_seqlen_query": 0,
        }
    )


def with_gradients(problem: Problem) -> Problem:
    names = differentiable(problem._asdict())
    return problem._replace(
        **{name: getattr(problem, name).clone().requires_grad_() for name in names}
    )


# ---- the operations themselves ---------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("distribute", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_opcheck_set_attention(dtype: torch.dtype, distribute: bool, options: str) -> None:
    if not distribute and "Nq" in OPTIONS[options]:
        options = "per sample"  # pooling has no query
    problem = with_gradients(operands(small(options, dtype=dtype), distribute))
    torch.library.opcheck(OPERATIONS.set_attention.default, problem)


@pytest.mark.slow
@pytest.mark.parametrize("given", ["output", "pooled", "both"])
@pytest.mark.parametrize("options", OPTIONS)
def test_opcheck_set_attention_backward(options: str, given: str) -> None:
    # its own derivative goes through the definition, slow to trace: once
    in_full = options == "everything" and given == "both"
    problem = operands(small(options))
    solution = OPERATIONS.set_attention(*problem)
    grad_output = torch.randn_like(solution[0]) if given != "pooled" else None
    grad_pooled = torch.randn_like(solution[1]) if given != "output" else None
    grads = [x if x is None else x.requires_grad_(in_full) for x in (grad_output, grad_pooled)]
    checks = ["test_schema", "test_faketensor", "test_autograd_registration"]
    torch.library.opcheck(
        OPERATIONS.set_attention_backward.default,
        (*grads, *solution, *(with_gradients(problem) if in_full else problem)),
        test_utils=[*checks, "test_aot_dispatch_dynamic"] if in_full else checks,
    )


@pytest.mark.parametrize("options", OPTIONS)
def test_autograd_function(backend: Backend, options: str) -> None:
    """The autograd.Function is the operation, to the bit and through two derivatives."""
    problem = operands(small(options, device=backend.device))
    of_operation, of_function = (with_gradients(problem) for _ in range(2))
    results = []
    for function, problem in (
        (OPERATIONS.set_attention, of_operation),
        (SetAttentionFunction.apply, of_function),
    ):
        output, pooled, *_ = function(*problem)
        inputs = [getattr(problem, name) for name in differentiable(problem._asdict())]
        loss = output.square().sum() + pooled.sin().sum()
        first = torch.autograd.grad(loss, inputs, create_graph=True, materialize_grads=True)
        second = torch.autograd.grad(
            sum(x.square().sum() for x in first), inputs, materialize_grads=True
        )
        results.append([output, pooled, *first, *second])
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)
    assert any(largest(x) > 0 for x in results[0][2:])


# ---- compile and export ----------------------------------------------------------------------


def loss_and_gradients(function: Callable[..., Tensor], arguments: Arguments) -> dict[str, Tensor]:
    return run(function, arguments, output_gradient(setformer_ext.set_attention, arguments))


def named(compiled: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """call() goes by a function's name."""

    def set_attention(**arguments: object) -> Tensor:
        return compiled(**arguments)

    return set_attention


def test_compiling_one_function_often_leaves_the_others_their_compilations() -> None:
    """torch counts them by code, and gives up after eight."""
    x, reference = torch.randn(1, 1, 9, 4), torch.randn(1, 3, 4)
    with torch._dynamo.config.patch(recompile_limit=2):
        for iterations in (1, 2):
            compiled = torch.compile(setformer_ext.set_pooling, fullgraph=True, backend="eager")
            compiled(x, x, reference, iterations=iterations)
        compiled = torch.compile(setformer_ext.set_attention, fullgraph=True, backend="eager")
        expected = setformer_ext.set_attention(None, x, x, reference)
        torch.testing.assert_close(compiled(None, x, x, reference), expected)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
def test_compile(options: str) -> None:
    """No graph break; the surrounding elementwise work is inductor's, the operation is ours."""

    def surrounded(**arguments: object) -> Tensor:
        arguments = arguments | {"value": 2 * arguments["value"]}
        return setformer_ext.set_attention(**arguments).sin()

    arguments = small(options)
    expected = loss_and_gradients(named(surrounded), arguments)
    compiled = torch.compile(surrounded, fullgraph=True, backend="inductor")
    for name, x in loss_and_gradients(named(compiled), arguments).items():
        # inductor reorders the elementwise operations around the call: some roundings
        torch.testing.assert_close(x, expected[name], rtol=1e-12, atol=1e-13)


def test_compile_with_changing_sizes() -> None:
    """One compilation serves all N and B when sizes are dynamic."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        setformer_ext.set_attention, fullgraph=True, dynamic=True, backend=counter
    )
    compilations = []
    for N, B in ((7, 5), (11, 8), (33, 9)):
        # no two sizes equal: dynamo takes those for one
        arguments = random_problem(0, B=B, H=2, N=N, M=3, D=4, Dv=6)
        expected = loss_and_gradients(setformer_ext.set_attention, arguments)
        for name, x in loss_and_gradients(named(compiled), arguments).items():
            assert torch.equal(x, expected[name]), name
        compilations.append(counter.frame_count)
    # dynamo may start over within the first call, once it has seen which numbers are symbols
    assert len(set(compilations)) == 1


@pytest.mark.parametrize("options", OPTIONS)
def test_export(options: str) -> None:
    class Attention(torch.nn.Module):
        def forward(self, arguments: Arguments) -> Tensor:
            return setformer_ext.set_attention(**arguments)

    arguments = small(options)
    program = torch.export.export(Attention(), (arguments,), strict=False)
    assert "setformer_ext.set_attention" in program.graph_module.code
    assert torch.equal(program.module()(arguments), setformer_ext.set_attention(**arguments))


# ---- torch.func ------------------------------------------------------------------------------


def of(arguments: Arguments, *names: str) -> Callable[..., Tensor]:
    def function(*tensors: Tensor) -> Tensor:
        return setformer_ext.set_attention(**arguments | dict(zip(names, tensors, strict=True)))

    return function


@pytest.mark.parametrize("options", OPTIONS)
def test_func_grad(backend: Backend, options: str) -> None:
    arguments = small(options, device=backend.device)
    upstream = output_gradient(setformer_ext.set_attention, arguments)
    expected = run(setformer_ext.set_attention, arguments, upstream)
    names = differentiable(arguments)
    function = of(arguments, *names)
    tensors = [arguments[name] for name in names]
    gradients = torch.func.grad(
        lambda *x: (function(*x) * upstream).sum(), argnums=tuple(range(len(names)))
    )(*tensors)
    for name, x in zip(names, gradients, strict=True):
        torch.testing.assert_close(x, expected[name], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("options", OPTIONS)
def test_jacrev(options: str) -> None:
    """Row by row what autograd gives."""
    arguments = small(
        options, B=1, N=3, H=1, Dv=2, **({"Nq": 2} if options == "everything" else {})
    )
    for name in differentiable(arguments):
        function, x = of(arguments, name), arguments[name]
        expected = torch.autograd.functional.jacobian(function, x)
        torch.testing.assert_close(torch.func.jacrev(function)(x), expected, rtol=1e-11, atol=1e-12)


# names of the vmapped tensors and the dimension each is stacked along
VMAPS = [
    {"key": 0, "value": 0},
    {"key": 2, "value": 1},
    {"value": 0},
    {"key": 0},
    {"reference": 0},
    {"key": 1, "reference": 3},
    {"key": 0, "value": 0, "mask": 1, "token_mass": 3, "reference_mass": 0},
    {"query": 0},
    {"query": 2, "query_mask": 0, "key": 0},
    {"epsilon": 0},
    {"bandwidth": 0, "value": 1},
]


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("in_dims", VMAPS, ids=str)
def test_vmap(backend: Backend, in_dims: dict[str, int], per_sample: bool) -> None:
    """Over a batch of problems: each sample is the call alone, forward and backward."""
    if backend.emulated and len(in_dims) < 3:
        pytest.skip("samples are folded before any kernel: the longest list will do, emulated")
    reference_mass = "per-sample" if per_sample else "learned"
    options = {
        "per_sample": per_sample, "reference_mass": reference_mass, "device": backend.device,
    }  # fmt: skip
    samples = [small("everything", seed=seed, **options) for seed in range(3)]
    shared = samples[0]
    stacked = [torch.stack([x[name] for x in samples], dim=dim) for name, dim in in_dims.items()]
    batched = torch.func.vmap(of(shared, *in_dims), in_dims=tuple(in_dims.values()))

    def one_by_one(*tensors: Tensor) -> Tensor:
        unbound = [x.unbind(d) for x, d in zip(tensors, in_dims.values(), strict=True)]
        return torch.stack([of(shared, *in_dims)(*x) for x in zip(*unbound, strict=True)])

    results = []
    for function in (batched, one_by_one):
        inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in stacked]
        output = function(*inputs)
        upstream = torch.linspace(-1, 1, output.numel()).to(output).view(output.shape)
        wanted = [x for x in inputs if x.requires_grad]
        results.append([output, *torch.autograd.grad(output, wanted, upstream)])
    for x, y in zip(*results, strict=True):
        # learned tensors sum the samples' gradients in another order
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_per_sample(backend: Backend, options: str) -> None:
    """vmap over grad, the usual road to per-sample gradients."""
    samples = [small(options, seed=seed, device=backend.device) for seed in range(3)]
    names = differentiable(samples[0])
    function = of(samples[0], *names)

    def loss(*tensors: Tensor) -> Tensor:
        return function(*tensors).square().sum()

    gradient = torch.func.grad(loss, argnums=tuple(range(len(names))))
    stacked = [torch.stack([x[name] for x in samples]) for name in names]
    found = torch.func.vmap(gradient)(*stacked)
    for i in range(3):
        expected = gradient(*(x[i] for x in stacked))
        for name, x, y in zip(names, found, expected, strict=True):
            torch.testing.assert_close(x[i], y, rtol=1e-12, atol=1e-13, msg=name)


def test_vmap_of_the_others(backend: Backend) -> None:
    samples = [small("per sample", seed=seed, device=backend.device) for seed in range(3)]
    for function in (setformer_ext.set_pooling, setformer_ext.transport_plan):

        def of_key(key: Tensor, function: Callable[..., Tensor] = function) -> Tensor:
            return call(function, samples[0] | {"key": key})

        keys = torch.stack([x["key"] for x in samples])
        expected = torch.stack([of_key(key) for key in keys])
        assert torch.equal(torch.func.vmap(of_key)(keys), expected)


# ---- training machinery ----------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(backend: Backend, use_reentrant: bool) -> None:
    arguments = small("everything", device=backend.device)
    upstream = output_gradient(setformer_ext.set_attention, arguments)
    expected = run(setformer_ext.set_attention, arguments, upstream)
    names = differentiable(arguments)
    leaves = [arguments[name].clone().requires_grad_() for name in names]
    output = checkpoint(of(arguments, *names), *leaves, use_reentrant=use_reentrant)
    output.backward(upstream)
    assert torch.equal(output, expected["output"])
    for name, x in zip(names, leaves, strict=True):
        assert torch.equal(x.grad, expected[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_autocast(backend: Backend, options: str, dtype: torch.dtype) -> None:
    """Tokens and references are cast as for a matrix product; gradients keep the inputs' type."""
    arguments = small(options, dtype=torch.float32, device=backend.device)
    if isinstance(arguments["bandwidth"], Tensor):
        arguments["bandwidth"] = 1.0  # divides before the cast: compared below without
    storage = {
        name: x.to(dtype)
        for name in ("query", "key", "value", "reference")
        if (x := arguments[name]) is not None
    }
    expected = call(setformer_ext.set_attention, arguments | storage)
    names = differentiable(arguments)
    leaves = {name: arguments[name].clone().requires_grad_() for name in names}
    with torch.autocast(backend.device.partition(":")[0], dtype):
        output = call(setformer_ext.set_attention, arguments | leaves)
        mixed = call(setformer_ext.set_attention, arguments | {"value": storage["value"]})
    assert output.dtype == expected.dtype == dtype
    assert torch.equal(output, expected)
    assert torch.equal(mixed, expected)
    assert_gradients_are_those_of_the_storage_type(
        output, leaves, partial(call, setformer_ext.set_attention), arguments | storage
    )


def assert_gradients_are_those_of_the_storage_type(
    output: Tensor,
    leaves: dict[str, Tensor],
    function: Callable[[Arguments], Tensor],
    arguments: Arguments,
) -> None:
    """Autocast's gradients, in float32, are those of the cast arguments, which are compared with
    the definition elsewhere."""
    cast = {name: arguments[name].detach().requires_grad_() for name in leaves}
    expected, gradients = (
        torch.autograd.grad(
            result.float().square().sum(),
            list(inputs.values()),
            allow_unused=True,
            materialize_grads=True,
        )
        for result, inputs in ((function(arguments | cast), cast), (output, leaves))
    )
    for name, gradient, x in zip(leaves, gradients, expected, strict=True):
        assert gradient.dtype == torch.float32, name
        assert torch.equal(gradient, x.float()), name
    assert any(largest(gradient) > 0 for gradient in gradients)


OTHERS = ["set_pooling", "transport_plan", "set_attention_varlen"]


def others(name: str, arguments: Arguments) -> tuple[Callable[..., Tensor], Arguments]:
    """An operation beside set_attention, and what it takes of a problem."""
    if name != "set_attention_varlen":
        return partial(call, getattr(setformer_ext, name)), arguments
    packed = {n: arguments[n][:1].flatten(0, 1).transpose(0, 1) for n in ("key", "value")}
    offsets = torch.tensor([0, 3, 7], dtype=torch.int32)
    given = packed | {"cu_seqlens": offsets} | {n: arguments[n] for n in ("reference", "epsilon")}
    return partial(_varlen, normalize=arguments["normalize"]), given


def _varlen(given: Arguments, **options: object) -> Tensor:
    return setformer_ext.set_attention_varlen(None, **given, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_autocast_of_the_others(name: str, dtype: torch.dtype) -> None:
    function, arguments = others(name, small(dtype=torch.float32))
    storage = {n: arguments[n].to(dtype) for n in ("key", "value", "reference") if n in arguments}
    expected = function(arguments | storage)
    leaves = {n: arguments[n].clone().requires_grad_() for n in storage}
    with torch.autocast("cpu", dtype):
        output = function(arguments | leaves)
        mixed = function(arguments | {"key": storage["key"]})
    assert output.dtype == expected.dtype == mixed.dtype
    assert torch.equal(output, expected)
    assert torch.equal(mixed, expected)
    assert_gradients_are_those_of_the_storage_type(output, leaves, function, arguments | storage)


@pytest.mark.parametrize("name", ["set_attention", *OTHERS])
def test_autocast_leaves_float64_alone(name: str) -> None:
    if name == "set_attention":
        function, arguments = partial(call, setformer_ext.set_attention), small()
    else:
        function, arguments = others(name, small())
    with torch.autocast("cpu", torch.bfloat16):
        output = function(arguments)
    assert output.dtype == torch.float64
    assert torch.equal(output, function(arguments))


@pytest.mark.parametrize("options", OPTIONS)
def test_func_hessian(options: str) -> None:
    """Transforms of transforms: the second derivative goes through the definition."""
    arguments = small(options)

    def loss(function: Callable[..., Tensor], key: Tensor) -> Tensor:
        return call(function, arguments | {"key": key}).square().sum()

    hessians = [
        torch.func.jacrev(torch.func.grad(partial(loss, function)))(arguments["key"])
        for function in (setformer_ext.set_attention, definition.set_attention)
    ]
    assert largest(hessians[0] - hessians[1]) <= 1e-9 * largest(hessians[1])


def test_func_grad_under_autocast() -> None:
    arguments = small(dtype=torch.float32)

    def loss(key: Tensor) -> Tensor:
        return call(setformer_ext.set_attention, arguments | {"key": key}).float().square().sum()

    leaf = arguments["key"].clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        (expected,) = torch.autograd.grad(loss(leaf), leaf)
        assert torch.equal(torch.func.grad(loss)(arguments["key"]), expected)
    assert largest(expected) > 0


@pytest.mark.parametrize("cross", [False, True])
def test_flop_counts(cross: bool) -> None:
    """By hand: B H = 6, N = 7, Nq = 5, M = 3, D = 4, Dv = 2, T = 5, two for a multiply-add.

    A pair of token and reference costs 2 D = 8 for its similarity, 4 T = 20 for the steps and
    2 Dv = 4 to collect; to distribute costs 2 Dv + 2 = 6.
    """
    arguments = random_problem(0, B=2, H=3, N=7, Nq=5 if cross else None, M=3, D=4, Dv=2)
    leaves = {name: arguments[name].requires_grad_() for name in differentiable(arguments)}
    with FlopCounterMode(display=False) as counter:
        output = call(setformer_ext.set_attention, arguments | leaves)
        forward = counter.get_total_flops()
        output.sum().backward()
    solved, collected, distributed = 8 + 20, 4, 6
    if cross:
        assert forward == 6 * 3 * (7 * (solved + collected) + 5 * (solved + distributed))
    else:
        assert forward == 6 * 3 * 7 * (solved + collected + distributed)
    counts = counter.get_flop_counts()["Global"]
    assert counts[OPERATIONS.set_attention] == forward
    # Backward: similarities and the gradients of keys and references, 2 D = 8 each; the steps and
    # their adjoints, 4 T = 20 each; then 2 Dv = 4 and 1 for each product with values or their
    # gradients that the forward has, twice.
    pair = 3 * 8 + 2 * 20
    pairs = 12 * (pair + 2 * (4 + 1)) if cross else 7 * (pair + 4 * (4 + 1))
    assert counts[OPERATIONS.set_attention_backward] == 6 * 3 * pairs

    with FlopCounterMode(display=False) as counter:
        pooled = call(setformer_ext.set_pooling, arguments | leaves)
        assert counter.get_total_flops() == 6 * 3 * 7 * (8 + 20 + 4)
        pooled.sum().backward()
    counts = counter.get_flop_counts()["Global"]
    assert counts[OPERATIONS.set_attention_backward] == 6 * 3 * 7 * (pair + 2 * (4 + 1))


DDP = """
import os
import torch, torch.distributed as distributed, torch.multiprocessing as multiprocessing
import setformer_ext
from setformer_ext.cli.selftest.problems import random_problem

class Pooled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        problem = random_problem(0, H=2, N=7, M=3, dtype=torch.float64)
        self.reference = torch.nn.Parameter(problem["reference"])
        self.epsilon = torch.nn.Parameter(torch.full((2,), 0.3, dtype=torch.float64))

    def forward(self, key, value):
        return setformer_ext.set_attention(
            None, key, value, self.reference, epsilon=self.epsilon
        )

def data():
    problem = random_problem(1, B=4, H=2, N=7, M=3)
    return problem["key"], problem["value"]

def gradients(model, key, value):
    model(key, value).square().mean().backward()
    return [x.grad for x in model.parameters()]

def worker(rank, path):
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{path}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model = torch.nn.parallel.DistributedDataParallel(Pooled())
    found = gradients(model, *(x[2 * rank : 2 * rank + 2] for x in data()))
    torch.save(found, f"{path}/{rank}.pt")
    distributed.barrier()  # neither leaves while the other still talks to it
    os._exit(0)  # gloo's threads abort now and then when the interpreter ends in order
"""


@pytest.mark.slow
def test_distributed_data_parallel(tmp_path: object) -> None:
    """Two processes with half the batch each get the gradients of the whole batch."""
    (tmp_path / "ddp_worker.py").write_text(DDP)
    difference = fresh(
        f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import os
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        import torch, torch.multiprocessing as multiprocessing
        import ddp_worker
        multiprocessing.spawn(ddp_worker.worker, args=({str(tmp_path)!r},), nprocs=2)
        expected = ddp_worker.gradients(ddp_worker.Pooled(), *ddp_worker.data())
        result = [
            max((x - y).abs().max().item() / y.abs().max().item() for x, y in zip(found, expected))
            for found in (torch.load({str(tmp_path)!r} + f"/{{rank}}.pt") for rank in range(2))
        ]
        """
    )
    # the mean over four samples in two halves
    assert max(difference) < 1e-12
