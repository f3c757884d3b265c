"""ONNX export: the operations written out by their definition in the operators of ONNX."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import reference as definition
from .problem import Problem, Solution, accumulate_dtype


def export(
    model: nn.Module,
    args: tuple[Any, ...],
    file: Any = None,
    *,
    dynamic_shapes: Any = None,
    **options: Any,
) -> Any:
    """Export a model with SeT attention to ONNX; otherwise as ``torch.onnx.export(dynamo=True)``.

    ONNX has no SeT attention, so each becomes :mod:`setformer_ext.reference`'s equations with T
    unrolled steps, in float32 at least. Any runtime can run them, and gives the same answers to
    rounding; but unlike the kernels here it stores N x M matrices. ONNX lacks the eigenvectors that
    Nystrom anchors need.

    Args:
        model: in eval mode, unless training mode is meant.
        args: example inputs.
        file: where the model is written; None to only return it.
        dynamic_shapes: which sizes may change, as ``torch.export.export`` takes them.
        options: of ``torch.onnx.export``.

    Returns:
        The ``torch.onnx.ONNXProgram``.

    Raises:
        ModuleNotFoundError: if the packages onnx and onnxscript are not installed.
    """
    _require_packages()
    program = torch.export.export(model, args, dynamic_shapes=dynamic_shapes)
    program = program.run_decompositions(
        torch.export.default_decompositions()
        | {
            torch.ops.setformer_ext.set_attention.default: _set_attention,
            torch.ops.aten.adaptive_avg_pool2d.default: _adaptive_average,
            torch.ops.aten._adaptive_avg_pool2d.default: _adaptive_average,
        }
    )
    return torch.onnx.export(program, args, file, dynamo=True, **options)


def export_traced(
    model: nn.Module, args: tuple[Any, ...], file: Any, *, dynamic_axes: Any, **options: Any
) -> None:
    """Export a model by torch's older way, for what :func:`export` refuses: loops and conditions on
    values, as torchvision's detectors have them.

    Every condition keeps the result that it has for the example. Arguments are those of
    ``torch.onnx.export`` with ``dynamo=False``.

    Raises:
        ModuleNotFoundError: if the packages onnx and onnxscript are not installed.
    """
    _require_packages()
    with _WrittenOut():
        torch.onnx.export(model, args, file, dynamo=False, dynamic_axes=dynamic_axes, **options)


class _WrittenOut(TorchFunctionMode):
    """Calls the definition in place of the operation, and transposes in place of ``mT``."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        operations = torch.ops.setformer_ext
        if func in (operations.set_attention, operations.set_attention.default):
            with self:
                return _set_attention(*args)
        if func == torch.Tensor.mT.__get__:  # type: ignore[attr-defined]
            return args[0].transpose(-1, -2)
        return func(*args, **(kwargs or {}))


def _require_packages() -> None:
    for package in ("onnx", "onnxscript"):
        if find_spec(package) is None:
            raise ModuleNotFoundError(
                f"setformer_ext.onnx.export: needs the packages onnx and onnxscript, but {package} "
                "is not installed: pip install onnx onnxscript",
                name=package,
            )


def _adaptive_average(x: Tensor, output_size: list[int]) -> Tensor:  # [..., H, W] -> [..., h, w]
    """Means over areas as products of matrices: in ONNX all windows of a pool have one size."""
    rows, columns = (
        _shares(x, axis, bins) for axis, bins in zip((-2, -1), output_size, strict=True)
    )
    return rows @ x @ columns.mT


def _shares(x: Tensor, axis: int, bins: int) -> Tensor:  # -> [bins, x.shape[axis]]
    """The weight of each position along an axis in the mean of each bin."""
    length = x.shape[axis]
    bin_ = torch.arange(bins, device=x.device).unsqueeze(1)
    first = bin_ * length // bins
    last = ((bin_ + 1) * length + bins - 1) // bins  # one past it
    place = torch.arange(length, device=x.device)
    inside = ((place >= first) & (place < last)).to(x.dtype)
    return inside / (last - first)


def _set_attention(*arguments: Any) -> Solution:
    """The operation's results; those that only backward reads stay empty."""
    problem = Problem(*arguments)
    if problem.offsets is not None:
        raise ValueError(
            "set_attention_varlen: packed sequences cannot go to ONNX: pad them, with a mask"
        )
    storage = problem.key.dtype
    problem = problem.in_storage_type(accumulate_dtype(storage))
    unread = problem.key.new_empty(0)
    results = dict.fromkeys(Solution._fields, unread)
    if problem.distribute:
        results["output"] = definition.set_attention(**problem.arguments()).to(storage)
    else:
        results["pooled"] = definition.set_pooling(**problem.arguments(of_queries=False))
    return Solution(**results)
