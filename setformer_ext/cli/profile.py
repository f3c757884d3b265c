"""``setformer profile``: one shape in a loop, for Nsight Systems and Nsight Compute to look at."""

import argparse
import contextlib
import statistics
from collections.abc import Callable
from dataclasses import fields, replace

import torch

from .. import set_attention
from .timing import DTYPES, SHAPES, Shape, describe, find_device, inputs, milliseconds, step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options: a named shape, and what to change of it."""
    parser.add_argument(
        "--shape",
        choices=SHAPES,
        default="v1",
        help="; ".join(f"{name} is {shape}" for name, shape in SHAPES.items())
        + " (default: %(default)s). The options below change single sizes of it",
    )
    for name in (field.name for field in fields(Shape)):
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=_at_least(1), metavar="SIZE", help=f"{name} of the shape")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    parser.add_argument(
        "--kernel", choices=("gaussian", "linear"), default="gaussian", help="default: %(default)s"
    )
    parser.add_argument(
        "--iterations",
        type=_at_least(0),
        default=5,
        metavar="T",
        help="Sinkhorn steps (default: %(default)s)",
    )
    parser.add_argument(
        "--backward",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="forward and backward, or forward alone (default: both)",
    )
    parser.add_argument(
        "--device", metavar="NAME", help="cpu, cuda or cuda:N (default: cuda if it can be used)"
    )
    parser.add_argument(
        "--warmup",
        type=_at_least(0),
        default=3,
        metavar="CALLS",
        help="calls before the measured ones (default: %(default)s)",
    )
    parser.add_argument(
        "--repeats",
        type=_at_least(1),
        default=20,
        metavar="CALLS",
        help="measured calls, on a GPU between cudaProfilerStart and cudaProfilerStop"
        " (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> None:
    """Run the loop and print the time per call."""
    device = find_device(options.device)
    shape = chosen_shape(options)
    of_gpu = device.type == "cuda"
    with torch.cuda.device(device) if of_gpu else contextlib.nullcontext():
        tensors = inputs(
            shape, dtype=DTYPES[options.dtype], device=device, gradient=options.backward
        )
        call = step(
            lambda *tensors: set_attention(
                None,
                *tensors,
                kernel=options.kernel,
                iterations=options.iterations,
                normalize=False,  # the kernels alone; the keys are of unit length
            ),
            tensors,
            options.backward,
        )
        print(
            f"set_attention, forward{' and backward' if options.backward else ''}, {shape}, "
            f"{options.dtype}, {options.kernel} kernel, T={options.iterations}, "
            f"on {describe(device)}",
            flush=True,
        )
        milliseconds(call, device, options.warmup)
        times = _profiled(call, device, options.repeats)
    print(
        f"{statistics.median(times):.4g} ms per call: median of {options.repeats} after "
        f"{options.warmup} to warm up, from {min(times):.4g} to {max(times):.4g}"
    )


def chosen_shape(options: argparse.Namespace) -> Shape:
    """The named shape with the given sizes; value_depth is the given depth if not given itself."""
    given = {field.name: getattr(options, field.name) for field in fields(Shape)}
    if given["value_depth"] is None:
        given["value_depth"] = given["depth"]
    return replace(
        SHAPES[options.shape], **{name: size for name, size in given.items() if size is not None}
    )


def _profiled(call: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Milliseconds of each call, in the range that profilers capture."""
    if device.type != "cuda":
        return milliseconds(call, device, repeats)
    torch.cuda.synchronize()
    with torch.cuda.profiler.profile():  # cudaProfilerStart, cudaProfilerStop
        times = milliseconds(call, device, repeats)
        torch.cuda.synchronize()
    return times


def _at_least(least: int) -> Callable[[str], int]:
    """A converter of an option's text that says what was expected."""

    def convert(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(
                f"must be an integer of at least {least}, got {text!r}"
            )
        return number

    return convert
