"""What the definition must do whoever computes it: known solutions, invariances, edge cases.

Truth comes from elsewhere: closed forms, torch's attention, POT, the equations in NumPy.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import Backend
from setformer_ext import reference as definition
from setformer_ext.cli.selftest.problems import (
    call,
    generator,
    output_gradient,
    random_problem,
    run,
)

CONVERGED = 400  # iterations after which Sinkhorn at epsilon = 0.3 no longer moves

# A result of a few hundred float64 operations on numbers of size 1 to 10.
EXACT = {"rtol": 1e-11, "atol": 1e-12}


def close(actual: Tensor, expected: Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, **(tolerance or EXACT))


def problem(backend: Backend, **options: object) -> dict:
    return random_problem(**({"N": 33, "epsilon": 0.3} | options), device=backend.device)


def random(*shape: int, seed: int = 0, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(device)


# ---- the equations ---------------------------------------------------------------------------


def log_sum_exp(x: np.ndarray, axis: int) -> np.ndarray:
    largest = x.max(axis=axis, keepdims=True)
    return np.log(np.exp(x - largest).sum(axis=axis)) + largest.squeeze(axis)


def similarity_in_numpy(
    x: np.ndarray, y: np.ndarray, kernel: str, bandwidth: float
) -> np.ndarray:  # [N, D], [M, D] -> [N, M], entry by entry
    return np.array(
        [
            [
                np.exp(-((k - r) ** 2).sum() / (2 * bandwidth**2))
                if kernel == "gaussian"
                else (k * r).sum()
                for r in y
            ]
            for k in x
        ]
    )


def sinkhorn_in_numpy(
    s: np.ndarray, a: np.ndarray, b: np.ndarray, iterations: int
) -> tuple[np.ndarray, np.ndarray]:  # f^T [N], g^T [M]
    f, g = np.log(a), np.zeros(len(b))
    for _ in range(iterations):
        f = np.log(a) - log_sum_exp(s + g, axis=1)
        g = np.log(b) - log_sum_exp(s.T + f, axis=1)
    return f, g


@pytest.mark.parametrize("iterations", [0, 1, 2, 5])
@pytest.mark.parametrize("kernel", ["gaussian", "linear"])
@pytest.mark.parametrize("cross", [False, True])
def test_equations(backend: Backend, cross: bool, kernel: str, iterations: int) -> None:
    """One head at a time, straight from the equations, positions and masses included."""
    arguments = problem(
        backend,
        B=2,
        H=2,
        N=17,
        M=5,
        Nq=9 if cross else None,
        kernel=kernel,
        bandwidth="learned",
        epsilon="learned",
        iterations=iterations,
        token_mass=True,
        reference_mass="learned",
        P=2,
    )
    arguments["token_mass"] = arguments["token_mass"] + 0.1  # NumPy's log of 0 warns
    output = call(backend.set_attention, arguments).cpu()
    pooled = call(backend.set_pooling, arguments).cpu()
    plan = call(backend.transport_plan, arguments).cpu()
    numbers = {
        name: x.cpu().numpy() if isinstance(x, Tensor) else x for name, x in arguments.items()
    }
    nearness = {
        name: similarity_in_numpy(
            numbers[name],
            numbers["reference_positions"],
            "gaussian",
            numbers["position_bandwidth"] / math.sqrt(2),
        )
        for name in ("token_positions", "query_positions")
        if name in numbers
    }
    for item, head in np.ndindex(2, 2):
        epsilon, bandwidth = numbers["epsilon"][head], numbers["bandwidth"][head]
        reference = numbers["reference"][head]
        key = numbers["key"][item, head]
        a = numbers["token_mass"][item, head] / numbers["token_mass"][item, head].sum()
        b = numbers["reference_mass"][head] / numbers["reference_mass"][head].sum()
        s = similarity_in_numpy(key, reference, kernel, bandwidth) * nearness["token_positions"]
        s /= epsilon
        f, g = sinkhorn_in_numpy(s, a, b, iterations)
        C = np.exp(s + f[:, None])
        C /= C.sum(axis=0)
        A = C.T @ numbers["value"][item, head]
        if cross:
            query = numbers["query"][item, head]
            s = similarity_in_numpy(query, reference, kernel, bandwidth)
            s *= nearness["query_positions"] / epsilon
            _, g = sinkhorn_in_numpy(s, np.full(9, 1 / 9), b, iterations)
        R = np.exp(s + g)
        R /= R.sum(axis=1, keepdims=True)
        close(plan[item, head], torch.from_numpy(C * b))
        close(pooled[item, head], torch.from_numpy(A))
        close(output[item, head], torch.from_numpy(R @ A))


@pytest.mark.parametrize("P", [1, 2, 3])
@pytest.mark.parametrize("kernel", ["gaussian", "linear"])
def test_kernels_and_positions_planted_as_similarities(
    backend: Backend, kernel: str, P: int
) -> None:
    """A linear kernel with the identity for references takes any S: key = S."""
    arguments = problem(backend, kernel=kernel, P=P, bandwidth=0.7)
    x, y = arguments["key"], arguments["reference"]
    if kernel == "gaussian":
        s = torch.exp(-(torch.cdist(x, y.expand(2, -1, -1, -1)) ** 2) / (2 * 0.7**2))
    else:
        s = torch.einsum("bhnd,hmd->bhnm", x, y)
    positions = arguments["token_positions"], arguments["reference_positions"]
    w = torch.exp(-(torch.cdist(*positions) ** 2) / arguments["position_bandwidth"] ** 2)
    planted = {
        "query": None,
        "key": s * w,
        "value": arguments["value"],
        "reference": torch.eye(7, dtype=s.dtype, device=s.device).expand(3, 7, 7),
        "kernel": "linear",
        "epsilon": 0.3,
        "iterations": arguments["iterations"],
        "normalize": False,
    }
    close(call(backend.set_attention, arguments), call(backend.set_attention, planted))


# ---- known solutions -------------------------------------------------------------------------


def test_planted_permutation(backend: Backend) -> None:
    """Keys that are the references in another order: at small epsilon each token gets itself."""
    N = 17
    order = torch.randperm(N, generator=generator(0))
    reference = torch.eye(N, dtype=torch.float64, device=backend.device).unsqueeze(0)
    key = reference[:, order].unsqueeze(0)
    value = random(1, 1, N, 5, device=backend.device)
    options = {"kernel": "linear", "epsilon": 0.02, "iterations": 3}
    plan = backend.transport_plan(key, reference, **options)
    # By symmetry the potentials are constants, so C is the softmax of 1/epsilon against zeros.
    other = 1 / (math.exp(1 / 0.02) + N - 1)
    close(plan, (key[0].mT == 1).double().mT / N + (key == 0) * other / N)
    # what one token gets of the others: N rows of `other`, far below 1e-12
    close(backend.set_pooling(key, value, reference, **options)[0, 0, order], value[0, 0])
    close(backend.set_attention(None, key, value, reference, **options), value)


def test_dirac_token_mass(backend: Backend) -> None:
    """If one token holds all the mass, every reference draws it and every token receives it."""
    arguments = problem(backend)
    mass = torch.zeros(2, 3, 33, dtype=torch.float64, device=backend.device)
    mass[:, :, 5] = 3.0
    arguments["token_mass"] = mass
    value = arguments["value"][:, :, 5:6]
    close(call(backend.set_pooling, arguments), value.expand(2, 3, 7, 5))
    close(call(backend.set_attention, arguments), value.expand(2, 3, 33, 5))


@pytest.mark.parametrize("iterations", [0, 1, 5])
def test_equal_keys_average_the_values(backend: Backend, iterations: int) -> None:
    arguments = problem(backend, token_mass=True, iterations=iterations)
    arguments["key"] = arguments["key"][:, :, :1].expand(-1, -1, 33, -1)
    a = arguments["token_mass"] / arguments["token_mass"].sum(-1, keepdim=True)
    mean = (a.unsqueeze(-1) * arguments["value"]).sum(-2, keepdim=True)
    close(call(backend.set_attention, arguments), mean.expand(2, 3, 33, 5))


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("masses", [False, True])
def test_no_iterations_is_two_calls_of_sdpa(backend: Backend, masses: bool, cross: bool) -> None:
    arguments = problem(
        backend,
        N=97,
        Nq=129 if cross else None,
        kernel="linear",
        epsilon=0.7,
        iterations=0,
        masked=masses,
        token_mass=masses,
        reference_mass="learned" if masses else None,
    )
    key, query, value = arguments["key"], arguments["query"], arguments["value"]
    reference = arguments["reference"].expand(2, -1, -1, -1)
    bias = None
    if masses:
        bias = arguments["token_mass"].log().unsqueeze(-2)
        bias = bias.masked_fill(~arguments["mask"][:, None, None], -torch.inf)
    # g = 0 without an iteration, so the reference masses play no part
    pooled = F.scaled_dot_product_attention(reference, key, value, bias, scale=1 / 0.7)
    query = key if query is None else query
    expected = F.scaled_dot_product_attention(query, reference, pooled, scale=1 / 0.7)
    if masses:
        valid = arguments["query_mask" if cross else "mask"]
        expected = expected * valid[:, None, :, None]
    close(call(backend.set_pooling, arguments), pooled)
    close(call(backend.set_attention, arguments), expected)


# ---- the transport plan ----------------------------------------------------------------------


@pytest.mark.parametrize("iterations", [0, 1, 5])
@pytest.mark.parametrize("kernel", ["gaussian", "linear"])
def test_columns_of_the_plan_sum_to_b(backend: Backend, kernel: str, iterations: int) -> None:
    arguments = problem(
        backend,
        kernel=kernel,
        iterations=iterations,
        masked=True,
        token_mass=True,
        reference_mass="per-sample",
        per_sample=True,
    )
    plan = call(backend.transport_plan, arguments)
    mass = arguments["reference_mass"]
    close(plan.sum(-2), mass / mass.sum(-1, keepdim=True))
    assert (plan >= 0).all()
    assert (plan.movedim(2, 1)[~arguments["mask"]] == 0).all()
    assert (plan[arguments["token_mass"] == 0] == 0).all()


def test_rows_of_the_plan_sum_to_a_at_convergence(backend: Backend) -> None:
    arguments = problem(
        backend, iterations=CONVERGED, masked=True, token_mass=True, reference_mass="learned"
    )
    mass = arguments["token_mass"] * arguments["mask"].unsqueeze(1)
    close(call(backend.transport_plan, arguments).sum(-1), mass / mass.sum(-1, keepdim=True))


@pytest.mark.parametrize("kernel", ["gaussian", "linear"])
def test_plan_is_that_of_pot_at_convergence(backend: Backend, kernel: str) -> None:
    arguments = problem(
        backend,
        kernel=kernel,
        epsilon=0.5,
        iterations=CONVERGED,
        H=1,
        token_mass=True,
        reference_mass="learned",
    )
    # every token has mass, else POT takes log 0
    arguments["token_mass"] = arguments["token_mass"] + 0.1
    plan = call(backend.transport_plan, arguments).cpu()
    pooled = call(backend.set_pooling, arguments).cpu()
    output = call(backend.set_attention, arguments).cpu()
    for item, head in np.ndindex(2, 1):
        a, b = (
            (mass / mass.sum()).cpu().numpy()
            for mass in (arguments["token_mass"][item, head], arguments["reference_mass"][head])
        )
        expected = plan_of_pot(
            arguments["key"][item, head], arguments["reference"][head], a, b, kernel, 0.5
        )
        # POT stops once the marginals are off by less than 1e-12
        close(plan[item, head], expected, rtol=1e-8, atol=1e-11)
        A = expected.mT @ arguments["value"][item, head].cpu() / torch.from_numpy(b)[:, None]
        R = expected / torch.from_numpy(a)[:, None]
        close(pooled[item, head], A, rtol=1e-8, atol=1e-9)
        close(output[item, head], R @ A, rtol=1e-8, atol=1e-9)


def plan_of_pot(
    key: Tensor, reference: Tensor, a: np.ndarray, b: np.ndarray, kernel: str, epsilon: float
) -> Tensor:
    s = similarity_in_numpy(key.cpu().numpy(), reference.cpu().numpy(), kernel, 1.0)
    import ot  # alone here: where POT is missing, the other tests run

    plan = ot.sinkhorn(
        a, b, -s, epsilon, method="sinkhorn_log", numItermax=5000, stopThr=1e-13, warn=True
    )
    return torch.from_numpy(plan)


def test_cross_attention_glues_two_plans_of_pot(backend: Backend) -> None:
    """LOTFormer's coupling: queries to references to keys, P_q diag(1/b) P_k^T / a_q."""
    arguments = problem(backend, H=1, Nq=9, epsilon=0.5, iterations=CONVERGED)
    output = call(backend.set_attention, arguments).cpu()
    uniform = {n: np.full(n, 1 / n) for n in (33, 9, 7)}
    for item, head in np.ndindex(2, 1):
        to_keys, to_queries = (
            plan_of_pot(
                arguments[name][item, head],
                arguments["reference"][head],
                uniform[n],
                uniform[7],
                "gaussian",
                0.5,
            )
            for name, n in (("key", 33), ("query", 9))
        )
        coupling = to_queries @ to_keys.mT * 7
        close(coupling.sum(0), torch.full((33,), 1 / 33, dtype=torch.float64))
        expected = 9 * coupling @ arguments["value"][item, head].cpu()
        close(output[item, head], expected, rtol=1e-8, atol=1e-9)


def test_tokens_and_references_swap(backend: Backend) -> None:
    """At convergence the plan from tokens to references is that back, transposed."""
    x, y = random(2, 3, 17, 5, device=backend.device), random(2, 3, 9, 5, device=backend.device)
    a, b = (
        torch.rand(2, 3, n, generator=generator(n), dtype=torch.float64).to(backend.device) + 0.1
        for n in (17, 9)
    )
    options = {"epsilon": 0.3, "iterations": CONVERGED}
    there = backend.transport_plan(x, y, token_mass=a, reference_mass=b, **options)
    back = backend.transport_plan(y, x, token_mass=b, reference_mass=a, **options)
    close(there, back.mT)


def test_token_matrix_at_convergence(backend: Backend) -> None:
    """R C^T is doubly stochastic, symmetric, positive semidefinite and of rank <= M."""
    arguments = problem(backend, B=1, H=2, M=5, iterations=CONVERGED)
    eye = torch.eye(33, dtype=torch.float64, device=backend.device)
    arguments["value"] = eye.expand(1, 2, 33, 33)
    matrix = call(backend.set_attention, arguments)
    ones = torch.ones(1, 2, 33, dtype=torch.float64, device=backend.device)
    close(matrix.sum(-1), ones)
    close(matrix.sum(-2), ones)
    close(matrix, matrix.mT)
    eigenvalues = torch.linalg.eigvalsh(matrix)  # ascending
    assert (eigenvalues > -1e-12).all()
    assert (eigenvalues[..., :-5].abs() < 1e-12).all()
    close(eigenvalues[..., -1], ones[..., 0])


@pytest.mark.parametrize("cross", [False, True])
def test_pooling_and_attention_follow_from_plans(backend: Backend, cross: bool) -> None:
    arguments = problem(
        backend,
        Nq=9 if cross else None,
        masked=True,
        token_mass=not cross,
        reference_mass="learned",
        iterations=2,
    )
    b = (arguments["reference_mass"] / arguments["reference_mass"].sum(-1, keepdim=True))[..., None]
    pooled = call(backend.set_pooling, arguments)
    close(pooled, call(backend.transport_plan, arguments).mT @ arguments["value"] / b)
    # distribute divides the rows of the plan by their sums: softmax forgets f
    if cross:
        plan = backend.transport_plan(
            arguments["query"],
            arguments["reference"],
            mask=arguments["query_mask"],
            reference_mass=arguments["reference_mass"],
            epsilon=0.3,
            iterations=2,
            normalize=False,
        )
    else:
        plan = call(backend.transport_plan, arguments)
    sums = plan.sum(-1, keepdim=True)
    has_mass = sums.squeeze(-1) > 0
    expected = (plan / sums) @ pooled
    close(call(backend.set_attention, arguments)[has_mass], expected[has_mass])


# ---- invariances -----------------------------------------------------------------------------


@pytest.mark.parametrize("iterations", [0, 1, 5])
@pytest.mark.parametrize("shift", [-100.0, 50.0])
def test_constant_added_to_the_similarities(
    backend: Backend, shift: float, iterations: int
) -> None:
    """One more feature, 1 in the keys and the shift in the references."""
    arguments = problem(backend, kernel="linear", iterations=iterations, masked=True)
    shifted = arguments | {
        "key": F.pad(arguments["key"], (0, 1), value=1.0),
        "reference": F.pad(arguments["reference"], (0, 1), value=shift),
    }
    # s is rounded at |shift| / epsilon, some hundreds
    tolerance = {"rtol": 1e-10, "atol": 1e-11}
    for function in (backend.set_attention, backend.set_pooling, backend.transport_plan):
        close(call(function, shifted), call(function, arguments), **tolerance)


def test_order_of_the_tokens(backend: Backend) -> None:
    arguments = problem(backend, masked=True, token_mass=True, P=2)
    order = torch.randperm(33, generator=generator(1))
    permuted = arguments | {
        "key": arguments["key"][:, :, order],
        "value": arguments["value"][:, :, order],
        "mask": arguments["mask"][:, order],
        "token_mass": arguments["token_mass"][:, :, order],
        "token_positions": arguments["token_positions"][order],
    }
    expected = call(backend.set_attention, arguments)[:, :, order]
    close(call(backend.set_attention, permuted), expected)
    close(call(backend.set_pooling, permuted), call(backend.set_pooling, arguments))


def test_order_of_the_references(backend: Backend) -> None:
    arguments = problem(backend, reference_mass="learned", P=2)
    order = torch.randperm(7, generator=generator(1))
    permuted = arguments | {
        "reference": arguments["reference"][:, order],
        "reference_mass": arguments["reference_mass"][:, order],
        "reference_positions": arguments["reference_positions"][order],
    }
    expected = call(backend.set_pooling, arguments)[:, :, order]
    close(call(backend.set_pooling, permuted), expected)
    close(call(backend.set_attention, permuted), call(backend.set_attention, arguments))


def test_outputs_are_averages_of_the_values(backend: Backend) -> None:
    arguments = problem(backend, masked=True, epsilon=0.05, token_mass=True)
    arguments["mask"][:, 0] = True
    value = arguments["value"]
    valid = arguments["mask"][:, None, :, None]
    low = torch.where(valid, value, torch.inf).amin(-2, keepdim=True)
    high = torch.where(valid, value, -torch.inf).amax(-2, keepdim=True)
    pooled = call(backend.set_pooling, arguments)
    assert ((pooled >= low - 1e-12) & (pooled <= high + 1e-12)).all()
    output = call(backend.set_attention, arguments)
    inside = (output >= low - 1e-12) & (output <= high + 1e-12)
    assert (inside | ~valid).all()


def test_masses_are_taken_up_to_a_factor(backend: Backend) -> None:
    arguments = problem(backend, token_mass=True, reference_mass="learned")
    scaled = arguments | {
        "token_mass": 17 * arguments["token_mass"],
        "reference_mass": arguments["reference_mass"] / 9,
    }
    close(call(backend.set_attention, scaled), call(backend.set_attention, arguments))


def test_token_of_mass_two_is_that_token_twice(backend: Backend) -> None:
    arguments = problem(backend)
    mass = torch.ones(2, 3, 33, dtype=torch.float64, device=backend.device)
    mass[:, :, 4] = 2.0
    twice = torch.tensor([*range(33), 4])
    doubled = arguments | {name: arguments[name][:, :, twice] for name in ("key", "value")}
    close(
        call(backend.set_attention, arguments | {"token_mass": mass}),
        call(backend.set_attention, doubled)[:, :, :33],
    )


def test_learned_and_per_sample_references_agree(backend: Backend) -> None:
    arguments = problem(backend, reference_mass="learned")
    per_sample = {
        name: arguments[name].expand(2, *arguments[name].shape).clone()
        for name in ("reference", "reference_mass")
    }
    close(
        call(backend.set_attention, arguments | per_sample), call(backend.set_attention, arguments)
    )


def test_scalars_and_tensors_of_epsilon_and_bandwidth_agree(backend: Backend) -> None:
    arguments = problem(backend, epsilon=0.3, bandwidth=0.8)
    expected = call(backend.set_attention, arguments)
    for shape in ((), (3,)):
        tensors = {
            name: torch.full(shape, arguments[name], dtype=torch.float64, device=backend.device)
            for name in ("epsilon", "bandwidth")
        }
        close(call(backend.set_attention, arguments | tensors), expected)


def test_query_that_is_key_is_the_self_case(backend: Backend) -> None:
    arguments = problem(backend, masked=True, token_mass=True)
    expected = call(backend.set_attention, arguments)
    arguments["query"] = arguments["key"]
    assert torch.equal(call(backend.set_attention, arguments), expected)


def test_equal_query_without_masses_is_the_self_case(backend: Backend) -> None:
    """Two solves of the same problem: the copy is another tensor, so the cross case."""
    arguments = problem(backend, masked=True)
    expected = call(backend.set_attention, arguments)
    cross = {"query": arguments["key"].clone(), "query_mask": arguments["mask"]}
    close(call(backend.set_attention, arguments | cross), expected)


def test_far_and_wide_positions(backend: Backend) -> None:
    """A wide position_bandwidth is as no positions; a narrow one cuts all similarities off."""
    arguments = problem(backend, P=2, token_mass=True)
    without = {name: x for name, x in arguments.items() if "position" not in name}
    # w = 1 - 32 / 1e18 at most
    wide = arguments | {"position_bandwidth": 1e9}
    close(call(backend.set_attention, wide), call(backend.set_attention, without))
    narrow = arguments | {"position_bandwidth": 1e-3}
    a = arguments["token_mass"] / arguments["token_mass"].sum(-1, keepdim=True)
    mean = (a.unsqueeze(-1) * arguments["value"]).sum(-2, keepdim=True)
    close(call(backend.set_attention, narrow), mean.expand(2, 3, 33, 5))


# ---- masks and edge cases --------------------------------------------------------------------


@pytest.mark.parametrize("cross", [False, True])
def test_masked_equals_removed(backend: Backend, cross: bool) -> None:
    """Outputs and gradients; the padding may hold anything, even NaN."""
    arguments = problem(
        backend, masked=True, Nq=17 if cross else None, token_mass=True, reference_mass="learned"
    )
    tokens, queries = arguments["mask"], arguments["query_mask" if cross else "mask"]
    query_name = "query" if cross else "key"
    padded = dict(arguments)
    for name in ("key", "value"):
        padded[name] = arguments[name].masked_fill(~tokens[:, None, :, None], torch.nan)
    padded["token_mass"] = arguments["token_mass"].masked_fill(~tokens[:, None], torch.nan)
    if cross:
        padded["query"] = arguments["query"].masked_fill(~queries[:, None, :, None], torch.nan)
    grad_output = output_gradient(backend.set_attention, arguments)
    for case in (arguments, padded):
        results = run(backend.set_attention, case, grad_output)
        shared = dict.fromkeys(("reference", "reference_mass"), 0)
        for item in range(2):
            keep, keep_queries = tokens[item], queries[item]
            alone = {name: x for name, x in arguments.items() if name not in ("mask", "query_mask")}
            for name in ("key", "value", "token_mass"):
                alone[name] = arguments[name][item : item + 1, :, keep]
            if cross:
                alone["query"] = arguments["query"][item : item + 1, :, keep_queries]
            upstream = grad_output[item : item + 1, :, keep_queries]
            expected = run(backend.set_attention, alone, upstream)
            close(results["output"][item, :, keep_queries], expected["output"][0])
            assert (results["output"][item, :, ~keep_queries] == 0).all()
            for name in ("key", "value", "token_mass", *(["query"] if cross else [])):
                kept = keep_queries if name == query_name else keep
                close(results[name][item, :, kept], expected[name][0])
                assert (results[name][item, :, ~kept] == 0).all(), name
            shared = {name: x + expected[name] for name, x in shared.items()}
        for name, x in shared.items():
            close(results[name], x)


def test_no_valid_token(backend: Backend) -> None:
    """Output 0 and gradient 0 for that item, the other as if alone."""
    arguments = problem(backend, masked=True, token_mass=True, per_sample=True)
    arguments["mask"][0] = False
    grad_output = output_gradient(backend.set_attention, arguments)
    results = run(backend.set_attention, arguments, grad_output)
    for name, x in results.items():
        assert (x[0] == 0).all(), name
        assert x[1].isfinite().all(), name
        assert (x[1] != 0).any(), name
    pooled = call(backend.set_pooling, arguments)
    assert (pooled[0] == 0).all()
    assert (pooled[1] != 0).any()
    assert (call(backend.transport_plan, arguments)[0] == 0).all()


def test_no_mass_at_all(backend: Backend) -> None:
    """Valid tokens whose masses are all 0 have nothing to give: as if none were valid."""
    arguments = problem(backend, token_mass=True, per_sample=True)
    arguments["token_mass"][0] = 0
    for function in (backend.set_attention, backend.set_pooling, backend.transport_plan):
        grad_output = output_gradient(function, arguments)
        for name, x in run(function, arguments, grad_output).items():
            assert (x[0] == 0).all(), name
            assert x[1].isfinite().all(), name
            assert (x[1] != 0).any(), name


def test_no_valid_query(backend: Backend) -> None:
    arguments = problem(backend, Nq=9, masked=True)
    arguments["query_mask"][0] = False
    grad_output = output_gradient(backend.set_attention, arguments)
    results = run(backend.set_attention, arguments, grad_output)
    for name in ("output", "query", "key", "value"):
        assert (results[name][0] == 0).all(), name
        assert (results[name][1] != 0).any(), name


@pytest.mark.parametrize(
    "empty", [{"N": 0}, {"B": 0}, {"N": 0, "Nq": 5}, {"Nq": 0}, {"B": 0, "Nq": 5}], ids=str
)
@pytest.mark.parametrize("iterations", [0, 3])
def test_empty(backend: Backend, empty: dict, iterations: int) -> None:
    """Nothing in, nothing or zeros out, zero gradients for what there is."""
    arguments = problem(
        backend,
        iterations=iterations,
        masked=True,
        token_mass=True,
        reference_mass="learned",
        **empty,
    )
    for function in (backend.set_attention, backend.set_pooling, backend.transport_plan):
        grad_output = output_gradient(function, arguments)
        for name, x in run(function, arguments, grad_output).items():
            expected = grad_output.shape if name == "output" else arguments[name].shape
            assert x.shape == expected, name
            nothing_drawn = function is backend.set_attention or empty.get("N") == 0
            assert (x == 0).all() or not nothing_drawn, name


# ---- tokens of mass 0 ------------------------------------------------------------------------


def test_token_of_mass_zero_draws_nothing(backend: Backend) -> None:
    """For the others it is as if it were not there, whatever its value."""
    arguments = problem(backend, iterations=3)
    mass = torch.ones(2, 3, 33, dtype=torch.float64, device=backend.device)
    mass[:, :, 5] = 0
    arguments["token_mass"] = mass
    others = torch.tensor([i for i in range(33) if i != 5])
    without = {name: x for name, x in arguments.items() if name != "token_mass"}
    without |= {name: arguments[name][:, :, others] for name in ("key", "value")}
    pooled = call(backend.set_pooling, without)
    close(call(backend.set_pooling, arguments), pooled)
    output = call(backend.set_attention, arguments)
    close(output[:, :, others], call(backend.set_attention, without))
    # It receives: the limit of ever smaller masses, of which nobody notices 1e-30.
    mass = mass.clone()
    mass[:, :, 5] = 1e-30
    close(output[:, :, 5], call(backend.set_attention, arguments | {"token_mass": mass})[:, :, 5])
    assert (output[:, :, 5].abs().sum(-1) > 0).all()
    changed = dict(arguments) | {"value": arguments["value"].clone()}
    changed["value"][:, :, 5] += 100
    assert torch.equal(call(backend.set_attention, changed), output)


@pytest.mark.parametrize("iterations", [0, 1, 5])
def test_derivative_by_a_mass_of_zero(backend: Backend, iterations: int) -> None:
    """Finite, and the slope on the side where masses live."""
    arguments = problem(backend, B=1, H=1, N=9, token_mass=True, iterations=iterations)
    mass = arguments["token_mass"].clone()
    mass[..., 5] = 0
    arguments["token_mass"] = mass
    grad_output = output_gradient(backend.set_attention, arguments)
    gradient = run(backend.set_attention, arguments, grad_output)["token_mass"][0, 0, 5]

    def loss(x: float) -> Tensor:
        moved = mass.clone()
        moved[..., 5] = x
        output = call(backend.set_attention, arguments | {"token_mass": moved})
        return (grad_output * output).sum()

    step = 1e-5
    slope = (-3 * loss(0) + 4 * loss(step) - loss(2 * step)) / (2 * step)
    # the one-sided difference is off by step^2 third derivatives and by rounding / step
    close(gradient, slope, rtol=1e-6, atol=1e-8)
    assert gradient.abs() > 1e-3


def test_mass_zero_far_from_every_reference(backend: Backend) -> None:
    """A token without mass has no normaliser to keep exp in range: still no NaN."""
    arguments = problem(
        backend, kernel="linear", epsilon=1e-3, token_mass=True, B=1, H=1, N=9, iterations=5
    )
    arguments["token_mass"][..., :4] = 0
    arguments["key"][..., :4, :] *= 1e3
    grad_output = output_gradient(backend.set_attention, arguments)
    for name, x in run(backend.set_attention, arguments, grad_output).items():
        assert x.isfinite().all(), name


@pytest.mark.parametrize("function", ["set_attention", "set_pooling", "transport_plan"])
@pytest.mark.parametrize("kernel", ["gaussian", "linear"])
def test_what_is_hidden_may_hold_anything(kernel: str, function: str) -> None:
    """Outputs and gradients of the definition are those with zeros in place of NaN."""
    problem = random_problem(3, N=11, M=4, D=3, masked=True, kernel=kernel, dtype=torch.float64)
    hidden = ~problem["mask"][:, None, :, None]
    assert hidden.any()
    names = ["key", "reference"] if function == "transport_plan" else ["key", "value", "reference"]
    found = []
    for padding in (0.0, torch.nan):
        given = {name: problem[name].masked_fill(hidden, padding) for name in ("key", "value")}
        given["reference"] = problem["reference"]
        inputs = [given[name].requires_grad_() for name in names]
        options = {"mask": problem["mask"], "kernel": kernel}
        query = (None,) if function == "set_attention" else ()
        output = getattr(definition, function)(*query, *inputs, **options)
        found.append([output, *torch.autograd.grad(output.sin().sum(), inputs)])
    for with_zeros, with_nan in zip(*found, strict=True):
        assert torch.equal(with_zeros, with_nan)
