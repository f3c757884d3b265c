"""Whatever the compiled module is given, it computes or raises: no crash, no write elsewhere."""

import ctypes
import gc
import resource
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from conftest import drawn_by_seed
from setformer_ext import _C

H, N, NQ, D, DV, M, T = 2, 5, 4, 4, 3, 3, 2
OFFSETS, QUERY_OFFSETS = np.array([0, 2, N]), np.array([0, 4, NQ])  # two packed sequences


def shapes(function: str, batch: int, sequences: int, cross: bool) -> dict[str, tuple[int, ...]]:
    """Of all arrays of a call; `batch` is 1 where there are several packed `sequences`."""
    queries = NQ if cross else N
    found = {
        "key": (batch, H, N, D),
        "value": (batch, H, N, DV),
        "reference": (H, M, D),
        "epsilon": (H,),
        "bandwidth": (H,),
        "token_mass": (batch, H, N),
        "reference_mass": (sequences, H, M),
        "token_positions": (N, 2),
        "reference_positions": (M, 2),
        "rows": (batch, H, T + 1, N),
        "columns": (sequences, H, T + 1, M),
    }
    found |= {"output": (batch, H, queries, DV), "pooled": (sequences, H, M, DV)}
    if cross:
        found |= {
            "query": (batch, H, NQ, D),
            "query_positions": (NQ, 2),
            "query_rows": (batch, H, T + 1, NQ),
            "query_columns": (sequences, H, T, M),
        }
    if function == "set_attention_backward":
        found |= {
            "grad_output": (batch, H, queries, DV),
            "grad_key": (batch, H, N, D),
            "grad_value": (batch, H, N, DV),
            "grad_reference": (sequences, H, M, D),
            "grad_bandwidth": (sequences, H),
            "grad_epsilon": (sequences, H),
            "grad_token_mass": (batch, H, N),
            "grad_reference_mass": (sequences, H, M),
        }
        if cross:
            found["grad_query"] = (batch, H, NQ, D)
    return found


DTYPES = ["f4", "f8", "f2", "i8", "i4", "u1", "?", "c8"]
GUARD = 64  # bytes on either side of each array, which nothing may change


class Fenced:
    """An array whose elements lie between bytes of a known value, every other one if `strided`."""

    def __init__(
        self, shape: tuple[int, ...], dtype: str, fill: float, strided: bool = False
    ) -> None:
        spread = tuple(2 * n if strided else n for n in shape)
        size = int(np.prod(spread)) * np.dtype(dtype).itemsize
        self.memory = np.full(size + 2 * GUARD, 0xA5, np.uint8)
        whole = self.memory[GUARD : GUARD + size].view(dtype).reshape(spread)
        self.array = whole[tuple(slice(None, None, 2) for _ in shape)] if strided else whole
        with np.errstate(invalid="ignore"):
            self.array[...] = fill
        self.inside = np.zeros(len(self.memory), bool)
        start = self.array.__array_interface__["data"][0] - self.memory.ctypes.data
        index = np.full(self.array.shape, start)
        for axis, (n, stride) in enumerate(zip(self.array.shape, self.array.strides, strict=True)):
            index += (np.arange(n) * stride).reshape(-1, *(1,) * (self.array.ndim - axis - 1))
        for byte in range(self.array.itemsize):
            self.inside[index + byte] = True

    def is_whole(self) -> bool:
        return bool((self.memory[~self.inside] == 0xA5).all())


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
fills = st.sampled_from([0.5, 1.0, 0.0, -1.0, np.nan, np.inf, 1e30])
arrays = st.tuples(sizes, st.sampled_from(DTYPES), fills)


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
        "normalize": st.sampled_from([True, False, None, 2, "yes"]),
        "position_bandwidth": st.sampled_from([1.0, 0.0, -1.0, float("nan"), float("inf"), None]),
        "stream": st.sampled_from([0, 1, -1, None]),
        "workspace": st.sampled_from([None, 3, lambda size: None]),
        "offsets": st.sampled_from(
            [None, OFFSETS, QUERY_OFFSETS, np.array([0, N]), np.array([N, 0]), np.array([0, -1, N])]
        ),
        "query_offsets": st.sampled_from([None, OFFSETS, QUERY_OFFSETS, np.zeros(3)]),
        "max_seqlen": st.sampled_from([0, 1, N, 2**62, 2**63, -1, None, 1.5]),
        "max_seqlen_query": st.sampled_from([0, 1, N, 2**62, -1, None]),
        "mask": st.sampled_from([None, np.ones((1, N), bool), np.zeros((2, N), bool)]),
        "unknown": st.just(1),
    },
)


@pytest.mark.slow
@pytest.mark.parametrize("function", ["set_attention_forward", "set_attention_backward"])
@drawn_by_seed
@settings(max_examples=1000)
@given(data=st.data())
def test_any_arguments(function: str, data: st.DataObject) -> None:
    packed, cross = (data.draw(st.booleans()) for _ in range(2))
    batch, sequences = (1, 2) if packed else (2, 2)
    fenced = {
        name: Fenced(shape, "f4", 0.5)
        for name, shape in shapes(function, batch, sequences, cross).items()
    }
    arguments: dict[str, Any] = {name: x.array for name, x in fenced.items()} | {"iterations": T}
    if packed:
        arguments["offsets"] = OFFSETS
        if cross:
            arguments["query_offsets"] = QUERY_OFFSETS
    for name in data.draw(st.lists(st.sampled_from(list(fenced)), max_size=3)):
        if data.draw(st.booleans()):
            arguments[name] = data.draw(objects)
            continue
        # Of the right size, and now and then of another type, layout or value.
        dtype = data.draw(st.sampled_from(["f4"] * 4 + DTYPES))
        fill = 1 if np.dtype(dtype).kind in "iu?" else data.draw(fills)
        x = Fenced(fenced[name].array.shape, dtype, fill, data.draw(st.booleans()))
        fenced[name], arguments[name] = x, x.array
    if data.draw(st.booleans()):
        arguments |= data.draw(options)
    if data.draw(st.booleans()):
        for name in data.draw(st.lists(st.sampled_from(list(arguments)), max_size=2)):
            arguments.pop(name, None)
    with suppress(ValueError, TypeError, BufferError, RuntimeError, MemoryError):
        getattr(_C, function)(**arguments)
        event("computed")
    for name, x in fenced.items():
        assert x.is_whole(), f"memory around {name} was written to"


def test_ten_thousand_calls_take_no_memory() -> None:
    """Right and wrong calls, as every argument comes by a capsule of its own."""

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    sizes = shapes("set_attention_forward", 2, 2, cross=False)
    arguments = {name: np.full(shape, 0.5, "f4") for name, shape in sizes.items()}
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
