"""Whatever the compiled module is given, it computes or raises: no crash, no write elsewhere."""

import ctypes
import gc
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from setformer_ext import _C

B, H, N, D, DV, M, T = 2, 2, 5, 4, 3, 3, 2
SIZES = {
    "key": (B, H, N, D),
    "value": (B, H, N, DV),
    "reference": (H, M, D),
    "epsilon": (H,),
    "bandwidth": (H,),
    "token_mass": (B, H, N),
    "reference_mass": (H, M),
    "token_positions": (N, 2),
    "reference_positions": (M, 2),
}
RESULTS = {
    "output": (B, H, N, DV),
    "pooled": (B, H, M, DV),
    "rows": (B, H, T + 1, N),
    "columns": (B, H, T + 1, M),
}
GRADIENTS = {
    "grad_key": (B, H, N, D),
    "grad_value": (B, H, N, DV),
    "grad_reference": (B, H, M, D),
    "grad_bandwidth": (B, H),
    "grad_epsilon": (B, H),
    "grad_token_mass": (B, H, N),
    "grad_reference_mass": (B, H, M),
}
DTYPES = ["f4", "f8", "f2", "i8", "i4", "u1", "?", "c8"]
GUARD = 64  # bytes on either side of each array, which nothing may change


class Fenced:
    """An array between bytes whose value is known."""

    def __init__(self, shape: tuple[int, ...], dtype: str, fill: float) -> None:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.memory = np.full(size + 2 * GUARD, 0xA5, np.uint8)
        self.array = self.memory[GUARD : GUARD + size].view(dtype).reshape(shape)
        self.array[...] = fill

    def is_whole(self) -> bool:
        return bool((self.memory[:GUARD] == 0xA5).all() and (self.memory[-GUARD:] == 0xA5).all())


class Broken:
    """Says that it is an array, and is none."""

    def __init__(self, answer: object) -> None:
        self.answer = answer

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)

    def __dlpack__(self, **_: Any) -> object:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def wrong_capsule() -> object:
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = (
        ctypes.py_object,
        [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p],
    )
    return new(ctypes.addressof(_MEMORY), b"something else", None)


_MEMORY = ctypes.create_string_buffer(256)

sizes = st.lists(st.integers(0, 6), max_size=5).map(tuple)
arrays = st.tuples(sizes, st.sampled_from(DTYPES), st.sampled_from([0, 1, -1, np.nan, np.inf]))


@st.composite
def views(draw: st.DrawFn) -> np.ndarray:
    """Any array: of any shape and type, turned, cut, expanded, read-only, unaligned."""
    shape, dtype, fill = draw(arrays)
    with np.errstate(invalid="ignore"):
        x = (
            np.full(shape, 1, dtype)
            if np.dtype(dtype).kind in "iu?"
            else np.full(shape, fill, dtype)
        )
    change = draw(
        st.sampled_from(["none", "reverse", "flip", "every other", "expand", "read-only"])
    )
    if change == "reverse":
        x = x.transpose()
    elif change == "flip" and x.ndim:
        x = x[::-1]
    elif change == "every other" and x.ndim:
        x = x[..., ::2]
    elif change == "expand":
        x = np.broadcast_to(x, (3, *x.shape))
    elif change == "read-only":
        x.flags.writeable = False
    return x


objects = st.one_of(
    views(),
    st.sampled_from([None, 0, -1.5, float("nan"), "text", b"", [], {}, object()]),
    st.builds(wrong_capsule),
    st.builds(Broken, st.sampled_from([None, 7, "capsule", RuntimeError("no"), _MEMORY])),
)
options = st.fixed_dictionaries(
    {},
    optional={
        "kernel": st.sampled_from(["gaussian", "linear", "", "cosine", None, 3]),
        "iterations": st.sampled_from([0, 1, T, 3, -1, 2**31, 2**63, 1.5, None, "2"]),
        "position_bandwidth": st.sampled_from([1.0, 0.0, -1.0, float("nan"), float("inf"), None]),
        "stream": st.sampled_from([0, 1, -1, None]),
        "workspace": st.sampled_from([None, 3, lambda size: None]),
        "offsets": st.sampled_from([None, np.array([0, N]), np.array([0, 2, N]), np.array([N, 0])]),
        "unknown": st.just(1),
    },
)


def valid(function: str) -> dict[str, Fenced]:
    names = SIZES | RESULTS
    if function == "set_attention_backward":
        names = names | GRADIENTS | {"grad_output": RESULTS["output"]}
    if function == "transport_plan":
        names = {n: s for n, s in names.items() if n not in ("value", "output", "pooled")}
        names["plan"] = (B, H, N, M)
    return {name: Fenced(shape, "f4", 0.5) for name, shape in names.items()}


@pytest.mark.parametrize(
    "function", ["set_attention_forward", "set_attention_backward", "transport_plan"]
)
@settings(max_examples=1000)
@given(data=st.data())
def test_any_arguments(function: str, data: st.DataObject) -> None:
    fenced = valid(function)
    arguments: dict[str, Any] = {name: x.array for name, x in fenced.items()} | {"iterations": T}
    for name in data.draw(st.lists(st.sampled_from(list(fenced)), max_size=3)):
        arguments[name] = data.draw(objects)
        if data.draw(st.booleans()):  # of the right size after all
            x = Fenced(fenced[name].array.shape, data.draw(st.sampled_from(DTYPES)), 1)
            fenced[name], arguments[name] = x, x.array
    arguments |= data.draw(options)
    for name in data.draw(st.lists(st.sampled_from(list(arguments)), max_size=2)):
        arguments.pop(name, None)
    with suppress(ValueError, TypeError, BufferError, RuntimeError, MemoryError):
        getattr(_C, function)(**arguments)
    for name, x in fenced.items():
        assert x.is_whole(), f"memory around {name} was written to"


def test_ten_thousand_calls_take_no_memory() -> None:
    """Right and wrong calls, as every argument comes by a capsule of its own."""

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    arguments = {name: x.array for name, x in valid("set_attention_forward").items()}
    wrong = arguments | {"value": arguments["value"][:, :1]}

    def calls(count: int) -> None:
        for _ in range(count):
            _C.set_attention_forward(**arguments, iterations=T)
            with pytest.raises(ValueError, match="value must be"):
                _C.set_attention_forward(**wrong, iterations=T)

    calls(500)
    gc.collect()
    before = resident()
    calls(5000)
    gc.collect()
    # A leak of one capsule or of the smallest array's 100 bytes a call would be 10 MB or 1 MB.
    assert resident() - before < 2**19
