"""setformer_ext.numpy: the operation on arrays, without torch."""

from typing import Any

import numpy as np
import pytest
import torch

import setformer_ext.numpy as arrays
from fresh import fresh
from setformer_ext import reference as definition
from setformer_ext.cli.selftest.problems import call, random_problem

OPTIONS: list[dict[str, Any]] = [
    {},
    {"masked": True, "token_mass": True, "reference_mass": "learned", "P": 2},
    {"Nq": 9, "masked": True, "per_sample": True, "kernel": "linear", "iterations": 2, "P": 1},
    {"iterations": 0, "epsilon": "learned", "bandwidth": "learned"},
]
# of results of size 1 to 10: rounding of the storage type, some tens of operations in the other
TOLERANCE = {"float64": 1e-11, "float32": 2e-5, "float16": 2e-2}


def as_numpy(problem: dict[str, Any]) -> dict[str, Any]:
    return {name: x.numpy() if isinstance(x, torch.Tensor) else x for name, x in problem.items()}


@pytest.mark.parametrize("function", ["set_attention", "set_pooling", "transport_plan"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_as_the_definition(options: dict, dtype: str, normalize: bool, function: str) -> None:
    """Of arrays that are read-only and whose rows lie apart; masses in any type."""
    problem = random_problem(
        3, N=17, M=5, normalize=normalize, dtype=getattr(torch, dtype), **options
    )
    exact = {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in problem.items()
    }
    expected = call(getattr(definition, function), exact).numpy()
    given = as_numpy(problem)
    given["key"] = np.asfortranarray(given["key"])
    given["key"].flags.writeable = False
    found = call(getattr(arrays, function), given)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, expected, TOLERANCE[dtype], TOLERANCE[dtype])


def test_defaults_are_those_of_the_definition() -> None:
    problem = random_problem(N=17, M=5)
    tensors = [problem[name] for name in ("query", "key", "value", "reference")]
    found = arrays.set_attention(*(None if x is None else x.numpy() for x in tensors))
    np.testing.assert_allclose(found, definition.set_attention(*tensors), 1e-11, 1e-11)
    key, reference = tensors[1].numpy(), tensors[3].numpy()
    assert np.array_equal(
        arrays.set_attention(key, key, key, reference),
        arrays.set_attention(None, key, key, reference),
    )


def test_byte_order_and_lists() -> None:
    key = np.random.default_rng(0).normal(size=(1, 2, 9, 4))
    reference = np.random.default_rng(1).normal(size=(2, 3, 4))
    expected = arrays.set_attention(None, key, key, reference, epsilon=[0.1, 0.2])
    swapped = key.astype(key.dtype.newbyteorder())
    found = arrays.set_attention(
        None, swapped, swapped, reference, epsilon=np.array([0.1, 0.2], "f"), iterations=np.int8(1)
    )
    np.testing.assert_allclose(found, expected, 1e-6)


@pytest.mark.parametrize("shape", [(1, 2, 0, 4), (0, 2, 9, 4)])
def test_nothing_to_attend_to(shape: tuple[int, ...]) -> None:
    key, reference = np.ones(shape), np.ones((2, 3, 4))
    assert arrays.set_attention(None, key, key, reference).shape == shape
    pooled = arrays.set_pooling(key, key, reference)
    assert pooled.shape == (shape[0], 2, 3, 4)
    assert (pooled == 0).all()
    assert arrays.transport_plan(key, reference).shape == (*shape[:3], 3)


X, Y = np.ones((1, 2, 9, 4)), np.ones((2, 3, 4))
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"key": X[0]}, ValueError, r"key must be \[B, H, N, D\], got \[2, 9, 4\]"),
    ({"key": "a"}, TypeError, "key"),
    ({"key": None}, TypeError, "key"),
    ({"key": X.astype(int)}, TypeError, "key must be float32.* got int64"),
    ({"value": X[:, :, :4]}, ValueError, "value must be .*N=9"),
    ({"value": X.astype("f")}, TypeError, "value must be float64, got float32"),
    ({"reference": Y[:1]}, ValueError, "reference must be .*H=2"),
    ({"reference": 1.0}, (TypeError, ValueError), "reference"),
    ({"query": X[..., :3]}, ValueError, "query must be .*D=4"),
    ({"mask": np.ones((1, 9))}, TypeError, "mask must be bool, got float64"),
    ({"query_mask": np.ones((1, 9), bool)}, ValueError, "query_mask must be None in self att"),
    ({"token_mass": np.full((1, 2, 9), -1)}, ValueError, "token_mass must be >= 0"),
    ({"token_mass": np.ones((1, 2, 9), bool)}, TypeError, "token_mass must be float64, got bool"),
    ({"reference_mass": np.zeros((2, 3))}, ValueError, "reference_mass must be > 0"),
    ({"epsilon": 0}, ValueError, "epsilon must be > 0"),
    ({"epsilon": [0.1, 0.2, 0.3]}, ValueError, r"epsilon must be \[H=2\], got \[3\]"),
    ({"bandwidth": "wide"}, TypeError, "bandwidth must be"),
    ({"iterations": 1.5}, TypeError, "iterations must be a number, got 1.5"),
    ({"iterations": True}, TypeError, "iterations must be a number, got True"),
    ({"normalize": "no"}, TypeError, "normalize must be a bool, got 'no'"),
    ({"iterations": -2}, ValueError, "iterations must be >= 0"),
    ({"kernel": "cosine"}, ValueError, "kernel must be 'gaussian' or 'linear', got 'cosine'"),
    (
        {"token_positions": np.ones((9, 2)), "reference_positions": np.ones((3, 2))},
        ValueError,
        "position_bandwidth must be given together with positions",
    ),
    ({"token_positions": np.ones((9, 2)), "position_bandwidth": 1}, ValueError, "together"),
    ({"attn_mask": None}, TypeError, "has no argument attn_mask: give mask"),
    ({"nonsense": np.ones(3)}, TypeError, "unexpected keyword argument 'nonsense'"),
    ({"stream": 5}, TypeError, "unexpected keyword argument 'stream'"),  # of the compiled module
    ({"epsilon": None}, TypeError, "epsilon must be given"),
    ({"kernel": None}, ValueError, "kernel must be 'gaussian' or 'linear', got 'None'"),
    ({"iterations": None}, TypeError, "iterations must be a number, got None"),
    ({"normalize": None}, TypeError, "normalize must be a bool, got None"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[str(list(x[0])) for x in BAD])
def test_refused(change: dict[str, Any], error: Any, message: str) -> None:
    given = {"query": None, "key": X, "value": X, "reference": Y} | change
    with pytest.raises(error, match=message) as caught:
        arrays.set_attention(**given)
    assert str(caught.value).startswith(("set_attention: ", "set_attention() "))
    if change.keys() & {"query", "query_mask"}:
        return
    del given["query"]
    with pytest.raises(error, match=message) as caught:
        arrays.set_pooling(**given)
    assert str(caught.value).startswith(("set_pooling: ", "set_pooling() "))


@pytest.mark.parametrize("function", [arrays.set_pooling, arrays.transport_plan])
def test_options_of_queries_are_none_of_others(function: Any) -> None:
    given = {"key": X, "value": X, "reference": Y}
    if function is arrays.transport_plan:
        del given["value"]
    with pytest.raises(TypeError, match=f"{function.__name__}.* unexpected .* 'query_mask'"):
        function(**given, query_mask=None)


def test_without_torch() -> None:
    """Blocked, as if it were not installed."""
    code = """
    import sys
    sys.modules["torch"] = None
    import numpy as np
    from setformer_ext.numpy import set_attention, set_pooling, transport_plan
    rng = np.random.default_rng(0)
    key, value = rng.standard_normal((2, 1, 1, 9, 4))
    reference = rng.standard_normal((1, 3, 4))
    options = {"epsilon": 0.5, "iterations": 0, "kernel": "linear", "normalize": False}
    output = set_attention(None, key, value, reference, **options)
    s = key[0, 0] @ reference[0].T / 0.5
    C = np.exp(s) / np.exp(s).sum(0)
    R = np.exp(s) / np.exp(s).sum(1, keepdims=True)
    result = [
        np.abs(output[0, 0] - R @ (C.T @ value[0, 0])).max(),
        np.abs(set_pooling(key, value, reference, **options)[0, 0] - C.T @ value[0, 0]).max(),
        np.abs(transport_plan(key, reference, **options)[0, 0] - C / 3).max(),
    ]
    """
    assert max(fresh(code)) < 1e-14
