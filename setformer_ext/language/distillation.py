"""Fit SeT attention inside a trained model to the softmax attention that it replaces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..reference import zero_invalid
from .references import References

Batch = Mapping[str, Tensor]
Seen = TypeVar("Seen")
# Called with a module's References, the arguments of their forward, and softmax attention's output.
Observer = Callable[[References, tuple[Any, ...], Tensor], Seen]

_QUERIES_PER_REFERENCE = 32  # number of queries to cluster
_CLUSTERING_STEPS = 8


def distill_attention(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    steps: int = 200,
    lr: float = 0.2,
    initialize: bool = True,
) -> list[float]:
    """Train the references of a model to answer as softmax attention does, and nothing else.

    Every attention module sees what it sees in the original model: softmax attention goes on
    through the layers, and beside it SeT attention learns its outputs from the same queries, keys
    and values. This is how to start from a pretrained model, before all of it is trained on a task.
    Dropout is off meanwhile, and frozen references are not.

    Args:
        model: a model of transformers with ``attn_implementation="set_attention"``, also one that
            peft or torch.compile has wrapped: the references that it calls are trained.
        batches: arguments of the model's forward, such as input_ids and attention_mask, on its
            device. They are used again until there are enough steps.
        steps: of Adam, >= 1, one batch each.
        lr: its learning rate at the start, which falls to 0 along a cosine.
        initialize: start from cluster centres of the first batches' queries, not from the present
            references.

    Returns:
        Of every step the error sum |O - softmax's O|^2 / sum |softmax's O|^2 over the batch's valid
        tokens, the mean of all attention modules.

    Raises:
        ValueError: fewer than one step, a model without SeT attention, no batches, or fewer valid
            tokens than references in all of them.
    """
    if steps < 1:
        raise ValueError(f"distill_attention: steps must be at least 1, got {steps}")
    layers = _layers(model)
    parameters = [p for layer in layers for p in layer.parameters()]
    optimizer = torch.optim.Adam(parameters, lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for layer in layers:  # no checkpoint has the values that follow
        layer.stored = False
    with _learning(model, parameters), torch.compiler.set_stance("force_eager"):
        if initialize:
            _start_from_queries(model, batches)
        for batch in islice(_endlessly(batches), steps):
            loss = _error(model, batch)
            # Only references that were called get a gradient, and nothing else.
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.detach())
    return torch.stack(losses).tolist()


def _error(model: nn.Module, batch: Batch) -> Tensor:
    @torch.enable_grad()
    def error(references: References, arguments: tuple[Any, ...], softmax: Tensor) -> Tensor:
        target = softmax.float()
        norm = target.square().sum().clamp(min=torch.finfo(target.dtype).tiny)
        output = references.forward(*arguments).float()
        return (output - target).square().sum() / norm

    return torch.stack(_softmax_calls(model, batch, error)).mean()


def _start_from_queries(model: nn.Module, batches: Iterable[Batch]) -> None:
    """References become centres of clusters: each stands for queries that are like it."""
    queries: dict[References, list[Tensor]] = {}  # only of references that are called

    def missing(references: References) -> int:
        wanted = _QUERIES_PER_REFERENCE * references.reference.shape[1]
        return wanted - sum(map(len, queries[references]))

    def collect(references: References, arguments: tuple[Any, ...], _: Tensor) -> None:
        query, mask = arguments[0].transpose(1, 2), arguments[3]  # [B, N, H, D], [B, N]
        valid = query.flatten(0, 1) if mask is None else query[mask]
        queries.setdefault(references, [])
        chosen = torch.randperm(len(valid))[: missing(references)]
        queries[references].append(valid[chosen])

    for batch in batches:
        _softmax_calls(model, batch, collect)
        if not any(map(missing, queries)):
            break
    for layer, points in (queries or {layer: [] for layer in _layers(model)}).items():
        count = layer.reference.shape[1]
        found = sum(map(len, points))
        if found < count:
            raise ValueError(
                f"distill_attention: batches must hold at least num_references={count} valid "
                f"tokens, got {found}; give more, or initialize=False"
            )
        centres = _centres(torch.cat(points).transpose(0, 1).float(), count)
        layer.reset_parameters()
        with torch.no_grad():
            layer.reference.copy_(centres)
            if layer.mass_point is not None:
                layer.mass_point.copy_(_centres(centres, layer.mass_point.shape[1]))


def _centres(points: Tensor, count: int) -> Tensor:  # [H, P, D] -> [H, M, D]
    """k-means of each head, from ``count`` of its points; empty clusters stay where they are."""
    centres = points[:, torch.randperm(points.shape[1])[:count]]
    for _ in range(_CLUSTERING_STEPS):
        members = F.one_hot(torch.cdist(points, centres).argmin(-1), count).to(points.dtype)
        sizes = members.sum(1).unsqueeze(-1)  # [H, M, 1]
        means = members.mT @ points / sizes.clamp(min=1)
        centres = torch.where(sizes > 0, means, centres)
    return centres


@torch.no_grad()
def _softmax_calls(model: nn.Module, batch: Batch, observe: Observer[Seen]) -> list[Seen]:
    """Run the model with softmax attention; returns what `observe` gives for each call of
    References."""
    calls: list[Seen] = []

    def replace(references: References, arguments: tuple[Any, ...], _: Tensor) -> Tensor:
        softmax = _softmax_attention(*arguments)
        calls.append(observe(references, arguments, softmax))
        return softmax

    handles = [layer.register_forward_hook(replace) for layer in _layers(model)]
    try:
        model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    if not calls:
        raise ValueError(
            "distill_attention: the model must have attn_implementation='set_attention', but its "
            "references were not called; switch it by model.set_attn_implementation"
        )
    return calls


def _softmax_attention(
    query: Tensor,  # [B, H, N, D]
    key: Tensor,  # [B, H, N, D]
    value: Tensor,  # [B, H, N, Dv]
    mask: Tensor | None,  # [B, N] bool
    scaling: float,
) -> Tensor:  # [B, H, N, Dv], 0 where not valid
    allowed = None if mask is None else mask[:, None, None]
    output = F.scaled_dot_product_attention(query, key, value, allowed, scale=scaling)
    return zero_invalid(output, mask)


def _layers(model: nn.Module) -> list[References]:
    layers = [module for module in model.modules() if isinstance(module, References)]
    if not layers:
        raise ValueError(
            f"distill_attention: model must have SeT attention, got {type(model).__name__} without "
            'references; switch it by model.set_attn_implementation("set_attention")'
        )
    return layers


def _endlessly(batches: Iterable[Batch]) -> Iterator[Batch]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError(
                "distill_attention: batches must hold at least one, and be an iterable that can be "
                "gone through again (a list or a DataLoader, no generator)"
            )


@contextmanager
def _learning(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """In evaluation mode, with these parameters trained and without old gradients.

    Afterwards every module has the mode that it had, and what was frozen is frozen again.
    """
    modes = [(module, module.training) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in parameters]
    try:
        model.eval()
        for parameter in parameters:
            parameter.requires_grad_(True).grad = None
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
