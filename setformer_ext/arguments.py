"""Checks of the public functions' arguments, by the table of the problem.

Each raises one error that names the function, the argument, what was expected and what came. Eager
calls of ``set_attention`` and ``set_pooling`` are checked by the compiled module
(`seen_by_kernels`); `check` then only words the error of what it refused. Values of tensors are
checked where they can be read without waiting for a device (eager CPU tensors).
"""

import math
import sys
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, TypeGuard

import torch
from torch import Tensor

from . import _C
from .problem import KERNELS, OPTIONAL, STORAGE_TYPES, TENSORS, accumulate_dtype

BUILD = _C.build_info()
DEVICES = ("cpu", "meta", "cuda") if BUILD["cuda_runtime"] else ("cpu", "meta")
_PLAIN = (Tensor, torch.nn.Parameter)
QUERY = ("query_mask", "query_positions")  # for cross attention only
POSITIONS = [name for name in TENSORS if name.endswith("positions")]
Given = Mapping[str, Any]  # the arguments of a public function by their names
Shape = tuple[str, ...]  # letters of sizes
# The key is checked first, because it decides what the others must be; the query comes before its
# mask and positions.
FIRST = ("key", "query", "query_mask")
ORDER = (*FIRST, *(name for name in TENSORS if name not in FIRST))


def seen_by_kernels(given: Given) -> bool:
    """Whether the compiled module can check all arguments of ``set_attention`` or ``set_pooling``:
    True for eager calls with plain tensors on one device.

    False when torch traces, transforms or casts, for subclasses of tensors, and for what C++ cannot
    check: whether positions require a gradient and have a bandwidth, the masses of masked tokens,
    and the Python types of options.
    """
    key = given["key"]
    if (
        not isinstance(key, Tensor)
        or key.device.type not in ("cpu", "cuda")
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or autocast_enabled(key.device.type)
    ):
        return False
    for x in given.values():
        if isinstance(x, Tensor) and (type(x) not in _PLAIN or x.device != key.device):
            return False
    without = ["position_bandwidth", *POSITIONS]
    if given.get("query") is None:
        without += QUERY
    if given.get("mask") is not None:
        without.append("token_mass")
    return (
        key.numel() > 0
        and all(given.get(name) is None for name in without)
        and type(given["kernel"]) is str
        and type(given["iterations"]) is int
        and type(given["normalize"]) is bool
        and all(
            x.is_floating_point()
            if isinstance(x, Tensor)
            else type(x) in (int, float) and 1e-30 < x < 1e30  # which float32 holds
            for x in (given["bandwidth"], given["epsilon"])
        )
    )


def check(function: str, given: Given, sequences: int | None = None) -> None:
    """Check the arguments of a public function.

    Args:
        function: its name.
        given: all its arguments by name; those of ``set_attention_varlen`` as they are packed.
        sequences: the number of packed sequences; None for padded tokens.

    Raises:
        ValueError, TypeError: for the first argument that does not fit.
    """
    _Check(function, given, sequences).all()


class _Check:
    def __init__(self, function: str, given: Given, sequences: int | None):
        self.function, self.given, self.packed = function, given, sequences is not None
        self.key: Tensor = given["key"]
        self.sizes: dict[str, int] = {} if sequences is None else {"S": sequences}

    def all(self) -> None:
        if not isinstance(self.key, Tensor):
            raise self.type_error("key", "a tensor", type(self.key).__name__)
        self.distributed = is_dtensor(self.key)
        # Autocast does not convert float64.
        self.autocast = autocast_enabled(self.key.device.type) and self.key.dtype != torch.float64
        self.accumulate = accumulate_dtype(self.key.dtype)
        if self.key.dtype not in STORAGE_TYPES:
            raise self.type_error(
                "key", "float32, float64, bfloat16 or float16", _name(self.key.dtype)
            )
        if self.key.device.type not in DEVICES:
            expected = _expected_device(self.key.device.type)
            raise self.value_error("key", expected, self.key.device)
        if self.given.get("query") is None:
            for name in QUERY:
                if (x := self.given.get(name)) is not None:
                    both = (
                        "token_positions serve" if self.packed else "mask and token_positions serve"
                    )
                    expected = f"None in self attention ({both} both sides)"
                    raise self.value_error(name, expected, type(x).__name__)
        self.positions()
        for name in ORDER:
            if name in ("bandwidth", "epsilon"):
                self.positive(name, self.given[name])
            elif name in self.given and (self.given[name] is not None or name not in OPTIONAL):
                self.tensor(name, self.given[name])
        self.options()

    def value_error(self, name: str, expected: str, got: object) -> ValueError:
        return ValueError(refusal(self.function, name, expected, got))

    def type_error(self, name: str, expected: str, got: object) -> TypeError:
        return TypeError(refusal(self.function, name, expected, got))

    def tensor(self, name: str, x: object) -> None:
        about = TENSORS[name]
        if about.type == "bool":
            self.is_mask(name, x)
        elif not isinstance(x, Tensor):
            raise self.type_error(name, "a tensor", type(x).__name__)
        elif about.type == "storage":
            # Autocast will convert all to one type.
            if not (x.dtype in STORAGE_TYPES if self.autocast else x.dtype == self.key.dtype):
                expected = f"{_name(self.key.dtype)} as the key is"
                raise self.type_error(name, expected, _name(x.dtype))
        elif not x.is_floating_point():
            raise self.type_error(name, "a floating-point tensor", _name(x.dtype))
        assert isinstance(x, Tensor)
        self.device(name, x)
        self.shape(name, x, *self.shapes(name))
        if name.endswith("mass") and readable(x) and x.numel() > 0:
            least, zero = x.to(self.accumulate).min().item(), name == "token_mass"
            if least < 0 or (least == 0 and not zero):
                raise self.value_error(name, f"{'>=' if zero else '>'} 0 everywhere", least)
        if name in POSITIONS and x.requires_grad:
            expected = "without gradient, for there is none (call .detach())"
            raise self.value_error(name, expected, "requires_grad=True")

    def is_mask(self, name: str, x: object) -> None:
        if not isinstance(x, Tensor):
            raise self.type_error(name, "a bool tensor", type(x).__name__)
        if x.dtype != torch.bool:
            remedy = "; of 0 and 1: .bool(); added to scores, of 0 and -inf elsewhere: x == 0"
            got = f"{_name(x.dtype)}{remedy}"
            raise self.type_error(name, "a bool tensor (True = valid)", got)

    def shapes(self, name: str) -> list[Shape]:
        """The shapes that a tensor may have; packed, tokens come first and S stands for B."""
        about = TENSORS[name]
        letters = about.letters
        if self.packed and {"N", "Nq"} & set(letters) and letters[0] == "B":
            _, heads, tokens, *depth = letters
            letters = (tokens, heads, *depth)
        elif self.packed:
            letters = tuple("S" if letter == "B" else letter for letter in letters)
        return [letters[1:], letters] if about.shared else [letters]

    def shape(self, name: str, x: Tensor, *shapes: Shape) -> None:
        """Require one of these shapes. Sizes that are known must agree; the others become known."""
        for shape in shapes:
            if len(shape) == x.dim() and all(
                self.sizes.get(letter, size) == size
                for letter, size in zip(shape, x.shape, strict=True)
            ):
                break
        else:
            expected = " or ".join(map(self.described, shapes))
            raise self.value_error(name, expected, f"{list(x.shape)}{self.hint(name, x)}")
        for letter, size in zip(shape, x.shape, strict=True):
            self.sizes.setdefault(letter, size)
            if letter in ("D", "Dv", "M") and size < 1:
                expected = f"[{', '.join(shape)}] with {letter} >= 1"
                raise self.value_error(name, expected, list(x.shape))
            if letter == "P" and size not in (1, 2, 3):
                raise self.value_error(name, "[.., P] with P = 1, 2 or 3", list(x.shape))

    def described(self, shape: Shape) -> str:
        sizes = (f"{x}={self.sizes[x]}" if x in self.sizes else x for x in shape)
        return f"[{', '.join(sizes)}]"

    def hint(self, name: str, x: Tensor) -> str:
        """Advice if tokens seem to come before heads, as in flash-attention and transformers."""
        rows = "[B, N, H, D]: heads come before tokens here, so give"
        if self.packed:
            return ""
        if name in ("query", "value") and x.dim() == 4:
            swapped = (x.shape[0], x.shape[2], x.shape[1], x.shape[3])
            letters = TENSORS[name].letters
            fits = all(
                self.sizes.get(letter, size) == size
                for letter, size in zip(letters, swapped, strict=True)
            )
            # If query and key both have them swapped, their dimensions 2, the heads, agree instead.
            alike = name == "query" and x.shape[2] == self.key.shape[2] != x.shape[1]
            if fits or alike:
                return f"; {name} or key looks like {rows} its .transpose(1, 2)"
            return ""
        heads = x.shape[-3] if name == "reference" and x.dim() in (3, 4) else None
        if heads is not None and heads == self.key.shape[2] != self.key.shape[1]:
            return f"; key looks like {rows} key.transpose(1, 2), and query and value likewise"
        return ""

    def device(self, name: str, x: Tensor) -> None:
        # Positions may be plain tensors: they have no gradient for the processes to add up.
        plain_will_do = self.distributed and name in POSITIONS
        if is_dtensor(x) != self.distributed and not plain_will_do:
            kind = "a DTensor" if self.distributed else "a plain tensor"
            raise self.type_error(name, f"{kind} as the key is", type(x).__name__)
        if x.device != self.key.device:
            raise self.value_error(name, f"on the key's device, {self.key.device}", x.device)
        if x.layout != torch.strided:
            raise self.value_error(name, "a dense tensor (call .to_dense())", x.layout)

    def positive(self, name: str, x: object) -> None:
        """A number or a tensor (scalar or [H]), finite and > 0."""
        if not isinstance(x, Tensor):
            if not is_number(x):
                raise self.type_error(name, "a number or a tensor", type(x).__name__)
            self.in_range(name, x)
            limits = torch.finfo(self.accumulate)
            if not limits.smallest_normal <= float(x) <= limits.max:
                raise self.value_error(name, f"> 0 and finite as {_name(self.accumulate)}", x)
            return
        if not x.is_floating_point():
            raise self.type_error(name, "a floating-point tensor", _name(x.dtype))
        self.device(name, x)
        if x.dim() > 0 and x.shape != (1,):
            self.shape(name, x, ("H",))
        if readable(x):
            numbers = x.to(self.accumulate)
            if (bad := ~((numbers > 0) & numbers.isfinite())).any():
                raise self.value_error(name, "> 0 and finite", x[bad][0].item())

    def in_range(self, name: str, x: float) -> None:
        if not 0 < x < math.inf:
            raise self.value_error(name, "> 0 and finite", x)

    def positions(self) -> None:
        """token_positions and reference_positions together, query_positions where wanted."""
        bandwidth = self.given["position_bandwidth"]
        if bandwidth is not None:
            if not is_number(bandwidth):
                raise self.type_error("position_bandwidth", "a number", type(bandwidth).__name__)
            self.in_range("position_bandwidth", bandwidth)
        there = [name for name in POSITIONS if self.given.get(name) is not None]
        if not there:
            return
        for name in ("token_positions", "reference_positions"):
            if name not in there:
                expected = f"given together with {', '.join(there)}"
                raise self.value_error(name, expected, None)
        if bandwidth is None:
            raise self.value_error("position_bandwidth", "given together with positions", None)

    def options(self) -> None:
        if self.given["kernel"] not in KERNELS:
            got = repr(self.given["kernel"])
            raise self.value_error("kernel", "'gaussian' or 'linear'", got)
        iterations = self.given["iterations"]
        if not is_integer(iterations):
            raise self.type_error("iterations", "an int", type(iterations).__name__)
        if not 0 <= iterations < 2**31:
            raise self.value_error("iterations", ">= 0 and < 2^31", iterations)
        if not isinstance(self.given["normalize"], bool):
            got = type(self.given["normalize"]).__name__
            raise self.type_error("normalize", "a bool", got)


def refusal(function: str, name: str, expected: str, got: object) -> str:
    """The words of every refusal."""
    return f"{function}: {name} must be {expected}, got {got}"


def require(function: str, condition: bool, name: str, expected: str, got: object) -> None:
    """Raise a ValueError in those words, unless the condition holds."""
    if not condition:
        raise ValueError(refusal(function, name, expected, got))


def is_dtensor(x: Tensor) -> bool:
    """Whether x is a DTensor. Does not import their module, which is slow and often not needed."""
    if type(x) in _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def is_integer(x: object) -> TypeGuard[int]:
    """An integer of Python, NumPy or a trace, but not True or False."""
    return isinstance(x, (Integral, torch.SymInt)) and not isinstance(x, bool)


def is_number(x: object) -> TypeGuard[float]:
    """Of Python or NumPy; True and False are none."""
    return isinstance(x, Real) and not isinstance(x, bool)


def autocast_enabled(device: str) -> bool:
    # torch.amp.is_autocast_available(device) would break the graph of torch 2.9.
    return device in ("cpu", "cuda") and torch.is_autocast_enabled(device)


def storage_type(key: Tensor) -> torch.dtype:
    """The type of keys, queries, values and references in the computation: autocast's or their
    own."""
    if key.dtype != torch.float64 and autocast_enabled(key.device.type):
        return torch.get_autocast_dtype(key.device.type)
    return key.dtype


def _expected_device(given: str) -> str:
    if given != "cuda":
        return "on the CPU or a CUDA device, where the kernels are"
    return (
        f"on the CPU, for this build has no CUDA kernels ({BUILD['cuda']}; install again with "
        "SETFORMER_CUDA=on in the environment and nvcc in PATH)"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def readable(x: Tensor) -> bool:
    """Can values be read now? Not when tracing or vmapping, nor on a GPU, without waiting for
    it."""
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and not torch._C._are_functorch_transforms_active()
        and type(x) in _PLAIN  # not of FakeTensor or DTensor
    )
