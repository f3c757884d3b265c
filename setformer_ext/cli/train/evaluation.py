"""Measures a model on evaluation data, during a training and after it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import nn

from .task import Batch, DataError, Metrics


def measure(
    model: nn.Module,
    metrics: Metrics,
    batches: Iterable[tuple[Batch | None, list[str]]],
    accelerator: Accelerator,
    note: Callable[[list[str]], None],
    guard: Callable[[Callable[[], object]], AbstractContextManager[object]] = nullcontext,
) -> dict[str, float]:
    """The figures of all batches of all processes, by name.

    Args:
        model: complete in each process, in eval mode, on its device.
        metrics: compute the figures.
        batches: the results of Collate: a batch or None, and the samples that could not be read.
        accelerator: the processes and their precision.
        note: called with the samples that could not be read.
        guard: is given the function that measures a batch, and makes the context in which it runs.

    Raises:
        DataError: if there is no batch at all.
    """
    metrics.to(accelerator.device)
    read = 0
    with torch.no_grad(), accelerator.autocast():
        for batch, failures in batches:
            note(failures)
            if batch is not None:
                update = partial(metrics.update, model, send_to_device(batch, accelerator.device))
                with guard(update):
                    update()
                read += 1
    if not sum(gather_object([read])):
        raise DataError("no evaluation sample can be read")
    return metrics.compute()
