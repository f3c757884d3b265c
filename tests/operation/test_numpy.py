"""setformer_ext._C with NumPy arrays: no tensor anywhere near it."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from fresh import fresh
from setformer_ext import _C
from setformer_ext import reference as definition
from setformer_ext.cli.selftest.problems import random_problem, run

Arrays = dict[str, Any]


def problem(dtype: str = "float64", **options: object) -> Arrays:
    """What set_attention_forward takes, as arrays."""
    arguments = random_problem(
        3, N=17, M=5, dtype=getattr(torch, dtype), **({"epsilon": "learned"} | options)
    )
    accumulate = "float64" if dtype == "float64" else "float32"
    storage = ("query", "key", "value", "reference")
    arrays = {}
    for name, x in arguments.items():
        if isinstance(x, torch.Tensor):
            x = x.numpy()
            if x.dtype != bool and name not in storage:
                x = x.astype(accumulate)
        elif name == "bandwidth":
            x = np.full(arguments["key"].shape[1], x, accumulate)
        if x is not None:
            arrays[name] = x
    return arrays


def results(arrays: Arrays) -> Arrays:
    """Arrays for what set_attention_forward writes, full of NaN."""
    key, value, query = arrays["key"], arrays["value"], arrays.get("query")
    B, H, N, _ = key.shape
    M, T, accumulate = arrays["reference"].shape[-2], arrays["iterations"], arrays["epsilon"].dtype

    def nan(*shape: int, dtype: Any = accumulate) -> np.ndarray:
        return np.full(shape, np.nan, dtype)

    tokens = N if query is None else query.shape[2]
    written = {
        "output": nan(B, H, tokens, value.shape[-1], dtype=key.dtype),
        "pooled": nan(B, H, M, value.shape[-1]),
        "rows": nan(B, H, T + 1, N),
        "columns": nan(B, H, max(T, 1) + 1, M),
    }
    if query is not None:
        written |= {
            "query_rows": nan(B, H, T + 1, tokens),
            "query_columns": nan(B, H, max(T, 1), M),
        }
    return written


def gradients(arrays: Arrays) -> Arrays:
    """Arrays for what set_attention_backward writes, full of NaN."""
    B, H, _, D = arrays["key"].shape
    M, accumulate = arrays["reference"].shape[-2], arrays["epsilon"].dtype
    shapes = {
        name: (arrays[name].shape, arrays[name].dtype)
        for name in ("key", "value", "query", "token_mass")
        if name in arrays
    } | {"reference": ((B, H, M, D), accumulate), "epsilon": ((B, H), accumulate)}
    if "bandwidth" in arrays:
        shapes["bandwidth"] = ((B, H), accumulate)
    if "reference_mass" in arrays:
        shapes["reference_mass"] = ((B, H, M), accumulate)
    return {f"grad_{name}": np.full(*shape[:1], np.nan, shape[1]) for name, shape in shapes.items()}


def call(function: Callable[..., None], *arrays: Arrays, **more: Any) -> None:
    """With a function that gives memory to the CUDA kernels."""
    given = {name: x for some in arrays for name, x in some.items()}
    assert function(**given, **more, workspace=lambda size: np.empty(size, np.uint8)) is None


def as_torch(arrays: Arrays) -> Arrays:
    """The same problem for the definition, in float64."""
    tensors = {
        name: torch.from_numpy(np.array(x, bool if x.dtype == bool else "float64"))
        if isinstance(x, np.ndarray)
        else x
        for name, x in arrays.items()
    }
    return {"query": None, "normalize": False} | tensors


OPTIONS = [
    {},
    {"masked": True, "token_mass": True, "reference_mass": "learned", "P": 2},
    {"Nq": 9, "masked": True, "per_sample": True, "kernel": "linear", "iterations": 2, "P": 1},
    {"iterations": 0},
]

# of results of size 1 to 10: rounding of the storage type, some tens of operations in the other
TOLERANCE = {"float64": 1e-11, "float32": 2e-5, "float16": 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_forward_and_backward(host_module: ModuleType, options: dict, dtype: str) -> None:
    arrays = problem(dtype, **options)
    written = results(arrays)
    call(host_module.set_attention_forward, arrays, written)
    grad_output = np.random.default_rng(0).standard_normal(written["output"].shape).astype(dtype)
    grads = gradients(arrays)
    call(host_module.set_attention_backward, arrays, written, grads, grad_output=grad_output)

    expected = run(
        definition.set_attention, as_torch(arrays), torch.from_numpy(grad_output).double()
    )
    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(written["output"], expected["output"], tolerance, tolerance)
    assert len(grads) == len(expected) - 1
    for name, x in grads.items():
        y = expected[name.removeprefix("grad_")].numpy()
        if x.ndim > y.ndim:
            x = x.sum(0)  # one per sample of what all samples share
        np.testing.assert_allclose(
            x, y, tolerance, tolerance * max(1, np.abs(y).max()), err_msg=name
        )


def test_pooling_alone(host_module: ModuleType) -> None:
    """Without an output array only the pooled outputs are written."""
    arrays = problem()
    expected, written = results(arrays), results(arrays)
    call(host_module.set_attention_forward, arrays, expected)
    del written["output"]
    call(host_module.set_attention_forward, arrays, written)
    np.testing.assert_array_equal(written["pooled"], expected["pooled"])


def test_strides(host_module: ModuleType) -> None:
    """Transposed and sliced arrays in, a sliced array out."""
    arrays = problem(reference_mass="learned", masked=True)
    expected = results(arrays)
    call(host_module.set_attention_forward, arrays, expected)
    strided = {name: x.T.copy().T if isinstance(x, np.ndarray) else x for name, x in arrays.items()}
    written = results(arrays)
    wide = np.full((2, 6, 17, 11), np.nan)
    written["output"] = wide[:, ::2, :, 1::2]
    call(host_module.set_attention_forward, strided, written)
    np.testing.assert_array_equal(wide[:, ::2, :, 1::2], expected["output"])
    assert np.isnan(wide[:, 1::2]).all()
    assert np.isnan(wide[..., ::2]).all()


def test_read_only_inputs(host_module: ModuleType) -> None:
    """Broadcast and memory-mapped arrays cannot be written to, and need not be."""
    arrays = problem()
    expected, written = results(arrays), results(arrays)
    call(host_module.set_attention_forward, arrays, expected)
    arrays["key"] = np.array(arrays["key"])
    arrays["key"].flags.writeable = False
    call(host_module.set_attention_forward, arrays, written)
    np.testing.assert_array_equal(written["output"], expected["output"])


BAD = [
    # argument: what is done to it, error, what the message says
    ("key", lambda x: x[0], ValueError, r"key must be \[B, H, N, D\], got \[3, 17, 8\]"),
    ("key", lambda x: x.astype("int64"), TypeError, "key must be float32.* got int64"),
    ("key", lambda x: x.tolist(), TypeError, "key must be an array with __dlpack__.* got list"),
    ("key", lambda x: None, TypeError, "key must be given"),
    ("value", lambda x: x[:, :, :5], ValueError, r"value must be .*N=17.*got \[2, 3, 5, 5\]"),
    ("value", lambda x: x.astype("float32"), TypeError, "value must be float64, got float32"),
    ("reference", lambda x: x[:2], ValueError, r"reference must be .*H=3.*got \[2, 5, 8\]"),
    ("mask", lambda x: np.ones((2, 17)), TypeError, "mask must be bool, got float64"),
    ("mask", lambda x: np.ones((2, 9), bool), ValueError, r"mask must be .*N=17.*got \[2, 9\]"),
    ("epsilon", lambda x: x[:1], ValueError, r"epsilon must be \[H=3\], got \[1\]"),
    ("rows", lambda x: x[:, :, 1:], ValueError, r"rows must be .*T\+1=6.*got \[2, 3, 5, 17\]"),
    ("rows", lambda x: x[..., ::-1], ValueError, "rows must be contiguous"),
    ("rows", lambda x: None, TypeError, "rows must be given"),
    ("output", lambda x: x[:, :, 1:], ValueError, r"output must be .*N=17.*got \[2, 3, 16, 5\]"),
    ("token_positions", lambda x: np.ones((17, 2)), ValueError, "must be given together"),
    ("reference_positions", lambda x: np.ones((5, 2)), ValueError, "must be given together"),
    ("iterations", lambda x: -1, ValueError, "iterations must be >= 0 .*got -1"),
    ("kernel", lambda x: "cosine", ValueError, "kernel must be .* got 'cosine'"),
    ("position_bandwidth", lambda x: -1.0, ValueError, "position_bandwidth must be > 0"),
    ("nonsense", lambda x: np.ones(3), TypeError, "unexpected argument 'nonsense'"),
]


@pytest.mark.parametrize(
    ("name", "spoil", "error", "message"), BAD, ids=[f"{x[0]} {x[3]}" for x in BAD]
)
def test_refused(host_module: ModuleType, name: str, spoil: Any, error: type, message: str) -> None:
    arrays = problem()
    arrays |= results(arrays)
    arrays[name] = spoil(arrays.get(name))
    with pytest.raises(error, match=message) as caught:
        call(host_module.set_attention_forward, arrays)
    assert caught.type is error


@pytest.mark.parametrize("options", [{}, {"Nq": 9, "masked": True}, {"iterations": 0}])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_output_alone_and_numbers_for_all_heads(dtype: str, options: Arrays) -> None:
    arrays = problem(dtype, **options)
    H, accumulate = arrays["key"].shape[1], arrays["epsilon"].dtype
    by_head = {"epsilon": np.full(H, 0.7, accumulate), "bandwidth": np.full(H, 1.3, accumulate)}
    whole = results(arrays)
    call(_C.set_attention_forward, arrays | by_head, whole)
    alone = results(arrays)["output"]
    numbers = {"epsilon": 0.7, "bandwidth": 1.3}
    call(_C.set_attention_forward, arrays | numbers, {"output": alone})
    assert np.array_equal(alone, whole["output"])


def test_numbers_that_are_none(host_module: ModuleType) -> None:
    arrays = problem()
    output = {"output": results(arrays)["output"]}
    on_cpu = host_module is _C
    for number, message in ((0.0, "must be > 0"), (np.nan, "finite"), (np.inf, "finite")):
        with pytest.raises(
            ValueError if on_cpu else TypeError, match=message if on_cpu else "arra"
        ):
            call(host_module.set_attention_forward, arrays | {"epsilon": float(number)}, output)


def test_query_without_output_is_refused(host_module: ModuleType) -> None:
    arrays = problem(Nq=9)
    written = results(arrays)
    del written["output"]
    with pytest.raises(ValueError, match="query is given, so output must be"):
        call(host_module.set_attention_forward, arrays, written)


@pytest.mark.parametrize("name", ["bandwidth", "reference_mass"])
def test_gradient_of_what_is_not_given_is_refused(host_module: ModuleType, name: str) -> None:
    arrays = problem(reference_mass="learned", bandwidth="learned")
    written = results(arrays)
    call(host_module.set_attention_forward, arrays, written)
    grads = gradients(arrays) | {"grad_output": np.ones_like(written["output"])}
    del arrays[name]
    with pytest.raises(TypeError, match=f"{name} must be given"):
        call(host_module.set_attention_backward, arrays, written, grads)


BAD_VALUES = {
    # argument: values for 2 samples, 3 heads, 17 tokens, 5 references; what the message says
    "epsilon": (lambda: np.array([0.5, -1, 0.5]), "epsilon must be > 0"),
    "bandwidth": (lambda: np.array([1.0, 0, 1]), "bandwidth must be > 0"),
    "token_mass": (lambda: one_bad((2, 3, 17), -1.0), "token_mass must be >= 0"),
    "reference_mass": (lambda: one_bad((2, 3, 5), 0.0), "reference_mass must be > 0"),
}


def one_bad(shape: tuple[int, ...], value: float) -> np.ndarray:
    x = np.ones(shape)
    x[1, 1, 3] = value
    return x


@pytest.mark.parametrize("name", BAD_VALUES)
def test_bad_values(host_module: ModuleType, name: str) -> None:
    """Refused on the CPU; on CUDA, where reading them would have to wait, NaN in their head."""
    arrays = problem()
    good = results(arrays)
    call(host_module.set_attention_forward, arrays, good)
    spoil, message = BAD_VALUES[name]
    arrays[name] = spoil()
    written = results(arrays)
    if host_module is _C:
        with pytest.raises(ValueError, match=message):
            call(host_module.set_attention_forward, arrays, written)
        return
    call(host_module.set_attention_forward, arrays, written)
    spoiled = np.zeros((2, 3), bool)
    spoiled[1 if arrays[name].ndim == 3 else slice(None), 1] = True
    for result in ("output", "pooled"):
        assert np.isnan(written[result][spoiled]).all()
        assert np.isfinite(written[result][~spoiled]).all()
    grads = gradients(arrays)
    grad_output = np.ones_like(written["output"])
    call(host_module.set_attention_backward, arrays, written, grads, grad_output=grad_output)
    for gradient in ("grad_key", "grad_value", "grad_reference"):
        assert np.isnan(grads[gradient][spoiled]).all()
        assert np.isfinite(grads[gradient][~spoiled]).all()


def test_results_that_cannot_be_written(host_module: ModuleType) -> None:
    arrays = problem()
    written = results(arrays)
    written["output"].flags.writeable = False
    with pytest.raises((ValueError, BufferError, TypeError)):
        call(host_module.set_attention_forward, arrays, written)
    assert np.isnan(written["output"]).all()


def test_without_importing_torch() -> None:
    """The arrays are NumPy's and so is the rest; torch is blocked, as if not installed."""
    code = """
    import sys
    sys.modules["torch"] = None
    import numpy as np
    try:
        import setformer_ext
    except ImportError:
        pass
    from setformer_ext import _C
    rng = np.random.default_rng(0)
    key, value = rng.standard_normal((2, 1, 1, 9, 4))
    reference = rng.standard_normal((1, 3, 4))
    output = np.empty((1, 1, 9, 4))
    _C.set_attention_forward(
        key=key, value=value, reference=reference, epsilon=np.array([0.5]), iterations=0,
        kernel="linear", output=output, pooled=np.empty((1, 1, 3, 4)),
        rows=np.empty((1, 1, 1, 9)), columns=np.empty((1, 1, 2, 3)),
    )
    s = key[0, 0] @ reference[0].T / 0.5
    C = np.exp(s) / np.exp(s).sum(0)
    R = np.exp(s) / np.exp(s).sum(1, keepdims=True)
    result = np.abs(output[0, 0] - R @ (C.T @ value[0, 0])).max()
    """
    assert fresh(code) < 1e-14
