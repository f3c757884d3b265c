"""Checks of the public functions' arguments.

Each raises one error that names the function, the argument, what was expected and what came.
Shapes, types and devices are checked always, also when tracing; values of tensors only where they
can be read without waiting for a device (eager CPU tensors).
"""

import math
import sys
from collections.abc import Sequence
from numbers import Integral, Real
from typing import TypeGuard

import torch
from torch import Tensor

from . import _C

STORAGE_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
KERNELS = ("gaussian", "linear")
BUILD = _C.build_info()
DEVICES = ("cpu", "meta", "cuda") if BUILD["cuda_runtime"] else ("cpu", "meta")
Dimension = tuple[str, int | None]


class Arguments:
    """Checks arguments of `function` against the key, which decides device and type."""

    def __init__(self, function: str, key: Tensor, packed: bool = False):
        self.function, self.packed = function, packed
        if not isinstance(key, Tensor):
            raise TypeError(f"{function}: key must be a tensor, got {type(key).__name__}")
        self.key = key
        self.distributed = _is_dtensor(key)
        self.autocast = _autocast_enabled(key.device.type)
        if key.dtype not in STORAGE_TYPES:
            raise self.type_error("key", "float32, float64, bfloat16 or float16", _name(key.dtype))
        if key.device.type not in DEVICES:
            raise self.value_error("key", _expected_device(key.device.type), key.device)
        self.device("key", key)
        self.shape("key", key, [("B", None), ("H", None), ("N", None), ("D", None)])
        if key.shape[3] < 1:
            raise self.value_error("key", "[B, H, N, D] with D >= 1", list(key.shape))

    @property
    def storage_type(self) -> torch.dtype:
        """What keys, queries, values and references are taken in: autocast's type, or theirs."""
        if self.autocast and self.key.dtype != torch.float64:
            return torch.get_autocast_dtype(self.key.device.type)
        return self.key.dtype

    def value_error(self, name: str, expected: str, got: object) -> ValueError:
        return ValueError(f"{self.function}: {name} must be {expected}, got {got}")

    def type_error(self, name: str, expected: str, got: object) -> TypeError:
        return TypeError(f"{self.function}: {name} must be {expected}, got {got}")

    def shape(self, name: str, x: Tensor, *shapes: Sequence[Dimension]) -> None:
        """One of these shapes, each a sequence of (letter, size or None for any)."""
        for shape in shapes:
            if len(shape) == x.dim() and all(
                size is None or size == given
                for (_, size), given in zip(shape, x.shape, strict=True)
            ):
                return
        expected = " or ".join(
            "[" + ", ".join(k if size is None else f"{k}={size}" for k, size in shape) + "]"
            for shape in shapes
        )
        got = f"{list(x.shape)}{self._hint(name, x, shapes)}"
        raise self.value_error(name, expected, got)

    def _hint(self, name: str, x: Tensor, shapes: Sequence[Sequence[Dimension]]) -> str:
        """Where tokens come before heads, as in flash-attention and in transformers' models."""
        rows = "[B, N, H, D]: heads come before tokens here, so give"
        if self.packed:
            return ""
        if name in ("query", "value") and x.dim() == 4:
            swapped = [x.shape[0], x.shape[2], x.shape[1], x.shape[3]]
            sizes = [size for _, size in shapes[0]]
            fits = all(size in (None, s) for size, s in zip(sizes, swapped, strict=True))
            # Where both are so, what the heads should be agrees instead.
            alike = name == "query" and x.shape[2] == self.key.shape[2] != x.shape[1]
            if fits or alike:
                return f"; {name} or key looks like {rows} its .transpose(1, 2)"
            return ""
        heads = x.shape[-3] if name == "reference" and x.dim() in (3, 4) else None
        if heads is not None and heads == self.key.shape[2] != self.key.shape[1]:
            return f"; key looks like {rows} key.transpose(1, 2), and query and value likewise"
        return ""

    def device(self, name: str, x: Tensor) -> None:
        # Positions have no gradient, which all processes would add up: a plain tensor will do.
        plain_will_do = self.distributed and name.endswith("positions")
        if _is_dtensor(x) != self.distributed and not plain_will_do:
            kind = "a DTensor" if self.distributed else "a plain tensor"
            raise self.type_error(name, f"{kind} as the key is", type(x).__name__)
        if x.device != self.key.device:
            raise self.value_error(name, f"on the key's device, {self.key.device}", x.device)
        if x.layout != torch.strided:
            raise self.value_error(name, "a dense tensor (call .to_dense())", x.layout)

    def storage(self, name: str, x: Tensor, *shapes: Sequence[Dimension]) -> None:
        """A tensor of the key's type, or of any type that autocast will make the same."""
        if not isinstance(x, Tensor):
            raise self.type_error(name, "a tensor", type(x).__name__)
        same = x.dtype in STORAGE_TYPES if self.autocast else x.dtype == self.key.dtype
        if not same:
            expected = f"{_name(self.key.dtype)} as the key is"
            raise self.type_error(name, expected, _name(x.dtype))
        self.device(name, x)
        self.shape(name, x, *shapes)

    def floating(self, name: str, x: Tensor, *shapes: Sequence[Dimension]) -> None:
        """A tensor of any floating type: masses, positions, bandwidth and epsilon."""
        if not isinstance(x, Tensor):
            raise self.type_error(name, "a tensor", type(x).__name__)
        if not x.is_floating_point():
            raise self.type_error(name, "a floating-point tensor", _name(x.dtype))
        self.device(name, x)
        self.shape(name, x, *shapes)

    def mask(self, name: str, x: Tensor | None, shape: Sequence[Dimension]) -> None:
        if x is None:
            return
        if not isinstance(x, Tensor):
            raise self.type_error(name, "a bool tensor", type(x).__name__)
        if x.dtype != torch.bool:
            remedy = "; of 0 and 1: .bool(); added to scores, of 0 and -inf elsewhere: x == 0"
            got = f"{_name(x.dtype)}{remedy}"
            raise self.type_error(name, "a bool tensor (True = valid)", got)
        self.device(name, x)
        self.shape(name, x, shape)

    def mass(self, name: str, x: Tensor | None, *shapes: Sequence[Dimension], zero: bool) -> None:
        """Masses >= 0, or > 0 where zero is not allowed."""
        if x is None:
            return
        self.floating(name, x, *shapes)
        if _readable(x) and x.numel() > 0:
            least = x.min().item()
            if least < 0 or (least == 0 and not zero):
                raise self.value_error(name, f"{'>=' if zero else '>'} 0 everywhere", least)

    def positive(self, name: str, x: object, heads: int) -> None:
        """A number or a tensor (scalar or [H]), finite and > 0."""
        if isinstance(x, Tensor):
            self.floating(name, x, [], [("H", 1)] if x.numel() == 1 else [("H", heads)])
            if not _readable(x) or x.numel() == 0:
                return
            bad = ~((x > 0) & x.isfinite())
            if bad.any():
                raise self.value_error(name, "> 0 and finite", x[bad][0].item())
            return
        if not is_number(x):
            raise self.type_error(name, "a number or a tensor", type(x).__name__)
        if not 0 < x < math.inf:
            raise self.value_error(name, "> 0 and finite", x)

    def iterations(self, x: object) -> None:
        if not is_integer(x):
            raise self.type_error("iterations", "an int", type(x).__name__)
        if not 0 <= x < 2**31:
            raise self.value_error("iterations", ">= 0 and < 2^31", x)

    def flag(self, name: str, x: object) -> None:
        if not isinstance(x, bool):
            raise self.type_error(name, "a bool", type(x).__name__)

    def kernel(self, x: object) -> None:
        if x not in KERNELS:
            raise self.value_error("kernel", "'gaussian' or 'linear'", repr(x))

    def positions(
        self,
        positions: dict[str, tuple[Tensor | None, Dimension]],
        bandwidth: float | None,
    ) -> None:
        """token_positions and reference_positions together, query_positions where wanted."""
        if bandwidth is not None:
            if not is_number(bandwidth):
                raise self.type_error("position_bandwidth", "a number", type(bandwidth).__name__)
            if not 0 < bandwidth < math.inf:
                raise self.value_error("position_bandwidth", "> 0 and finite", bandwidth)
        if all(x is None for x, _ in positions.values()):
            return
        for name in ("token_positions", "reference_positions"):
            if positions[name][0] is None:
                given = ", ".join(other for other, (x, _) in positions.items() if x is not None)
                raise self.value_error(name, f"given together with {given}", None)
        coordinates = None
        for name, (x, rows) in positions.items():
            if x is None:
                continue
            self.floating(name, x, [rows, ("P", coordinates)])
            if x.shape[1] not in (1, 2, 3):
                raise self.value_error(name, "[.., P] with P = 1, 2 or 3", list(x.shape))
            if x.requires_grad:
                expected = "without gradient, for there is none (call .detach())"
                raise self.value_error(name, expected, "requires_grad=True")
            coordinates = x.shape[1]
        if bandwidth is None:
            raise self.value_error("position_bandwidth", "given together with positions", None)


def _is_dtensor(x: Tensor) -> bool:
    """Without importing what DTensors are made of, which takes its time, where nobody has it."""
    if type(x) in (Tensor, torch.nn.Parameter):
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def is_integer(x: object) -> TypeGuard[int]:
    """Of Python, NumPy or a trace; True and False are none."""
    return isinstance(x, (Integral, torch.SymInt)) and not isinstance(x, bool)


def is_number(x: object) -> TypeGuard[float]:
    """Of Python or NumPy; True and False are none."""
    return isinstance(x, Real) and not isinstance(x, bool)


def _expected_device(given: str) -> str:
    if given != "cuda":
        return "on the CPU or a CUDA device, where the kernels are"
    return (
        f"on the CPU, for this build has no CUDA kernels ({BUILD['cuda']}; install again with "
        "SETFORMER_CUDA=on in the environment and nvcc in PATH)"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _autocast_enabled(device: str) -> bool:
    # torch.amp.is_autocast_available(device) would break the graph of torch 2.9.
    return device in ("cpu", "cuda") and torch.is_autocast_enabled(device)


def _readable(x: Tensor) -> bool:
    """Can values be looked at here? Not when tracing or vmapping, nor without waiting for a GPU."""
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and not torch._C._are_functorch_transforms_active()
        and type(x) in (Tensor, torch.nn.Parameter)  # not of FakeTensor or DTensor
    )
