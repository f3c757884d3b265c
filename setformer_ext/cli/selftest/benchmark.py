"""Times, compared with those of the definition in plain torch and of softmax attention."""

import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import reference, set_attention
from ..timing import DTYPES, SHAPES, Shape, inputs, milliseconds, step
from .outcome import SPEED, Task, Timing

QUICK = {"small": Shape(1, 2, 49, 8, 8, 16)}
ROUNDS = 7
CALLS = 3  # in a row in each round

COMPETITORS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "setformer_ext": lambda key, value, y: set_attention(None, key, value, y, normalize=False),
    "definition": lambda key, value, y: reference.set_attention(
        None, key, value, y, normalize=False
    ),
    "softmax": lambda key, value, y: F.scaled_dot_product_attention(key, key, value),
}


def tasks(device: torch.device, quick: bool) -> list[Task]:
    """One measurement for each shape, type and direction."""
    dtypes = ("float32",) if quick or device.type == "cpu" else ("float32", "bfloat16")
    shapes = QUICK if quick else SHAPES
    if device.type == "cpu":
        shapes = {name: shape for name, shape in shapes.items() if shape.tokens <= 1024}
    return [
        Task(
            f"time of {name}, {dtype}, forward{' + backward' if gradient else ''}",
            partial(_measure, shape, dtype, gradient),
            SPEED,
            needs=(DTYPES[dtype],),
            backward=gradient,
        )
        for name, shape in shapes.items()
        for dtype in dtypes
        for gradient in (False, True)
    ]


def _measure(shape: Shape, dtype: str, gradient: bool, device: torch.device) -> list[Timing]:
    """Medians over rounds, in each of which all competitors run in turn."""
    tensors = inputs(shape, dtype=DTYPES[dtype], device=device, gradient=gradient)
    steps = {}
    for name, attention in COMPETITORS.items():
        try:
            call = step(attention, tensors, gradient)
            milliseconds(call, device, 1)
        except RuntimeError:  # mostly for lack of memory
            if name == "setformer_ext":
                raise
        else:
            steps[name] = call
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, call in steps.items():
            times[name] += milliseconds(call, device, CALLS)
    label = f"{shape}, {dtype}, forward{' + backward' if gradient else ''}"
    return [Timing(label, {name: statistics.median(x) for name, x in times.items()})]
