"""What could be used in place of the compiled operation, each as it would be written in torch.

The first two compute what set_attention does; the others are attentions of the same shape. The
packages of `OPTIONAL` are in the extra `benchmark`.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON, ITERATIONS = 0.1, 5  # of every competitor that has them; other iterations can be given
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def log_domain(
    key: Tensor,  # [B, H, N, D]
    value: Tensor,  # [B, H, N, Dv]
    references: Tensor,  # [H, M, D]
    iterations: int = ITERATIONS,
) -> Tensor:  # [B, H, N, Dv]
    """The definition as one would write it: no masks or masses, uniform marginals."""
    s = similarity(key, references) / EPSILON  # [B, H, N, M]
    log_a, log_b = -math.log(s.shape[-2]), -math.log(s.shape[-1])
    g = torch.zeros_like(s[..., :1, :])
    for _ in range(iterations):
        f = log_a - torch.logsumexp(s + g, dim=-1, keepdim=True)
        g = log_b - torch.logsumexp(s + f, dim=-2, keepdim=True)
    pooled = torch.softmax(s + f, dim=-2).mT @ value
    return torch.softmax(s + g, dim=-1) @ pooled


def similarity(key: Tensor, references: Tensor) -> Tensor:
    """exp(-|k - y|^2 / 2): [B, H, N, D], [H, M, D] -> [B, H, N, M]."""
    norms = key.square().sum(-1, keepdim=True) + references.square().sum(-1).unsqueeze(-2)
    return torch.exp(key @ references.mT - norms / 2)


def scaling(
    key: Tensor,  # [B, H, N, D]
    value: Tensor,  # [B, H, N, Dv]
    references: Tensor,  # [H, M, D]
    iterations: int = ITERATIONS,
) -> Tensor:  # [B, H, N, Dv]
    """The same in scaling form: K = exp(S / epsilon) is formed once, the steps are products."""
    tokens, count = key.shape[-2], references.shape[-2]
    kernel = torch.exp(similarity(key, references) / EPSILON)  # [B, H, N, M]
    w = torch.ones_like(kernel[..., :1, :]).mT  # [B, H, M, 1]
    for _ in range(iterations):
        u = 1 / (tokens * (kernel @ w))  # [B, H, N, 1]
        columns = kernel.mT @ u
        w = 1 / (count * columns)
    pooled = (kernel.mT @ (u * value)) / columns
    return (kernel @ (w * pooled)) / (kernel @ w)


def softmax_attention(key: Tensor, value: Tensor, _references: Tensor) -> Tensor:
    """Every token looks at every other: O(N^2)."""
    return F.scaled_dot_product_attention(key, key, value)


def pool_and_scatter(key: Tensor, value: Tensor, references: Tensor) -> Tensor:
    """Softmax attention of the references to the tokens, and of the tokens to the references."""
    references = references.expand(key.shape[0], -1, -1, -1)
    pooled = F.scaled_dot_product_attention(references, key, value)
    return F.scaled_dot_product_attention(key, references, pooled)


def linear_attention(key: Tensor, value: Tensor, _references: Tensor) -> Tensor:
    """Katharopoulos et al., Transformers are RNNs, ICML 2020, eq. 5 with elu(x) + 1."""
    features = F.elu(key) + 1  # [B, H, N, D]
    numerator = features @ (features.mT @ value)
    return numerator / (features @ features.sum(-2, keepdim=True).mT)


def performer(key: Tensor, value: Tensor, references: Tensor) -> Tensor:
    """Choromanski et al., Rethinking Attention with Performers, ICLR 2021, positive features; the
    references stand for the random directions, as many as there are."""
    scaled = key / key.shape[-1] ** 0.25
    logits = scaled @ references.mT - scaled.square().sum(-1, keepdim=True) / 2  # [B, H, N, M]
    features = torch.exp(logits - logits.amax(dim=(-2, -1), keepdim=True))
    numerator = features @ (features.mT @ value)
    return numerator / (features @ features.sum(-2, keepdim=True).mT)


def otke(key: Tensor, value: Tensor, references: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """Mialon et al., A Trainable Optimal Transport Embedding, ICLR 2021, eqs. 4 to 6: the plan of
    tokens and references pools the values, [B, H, M, Dv]; nothing goes back to the tokens."""
    s = key @ references.mT / EPSILON  # [B, H, N, M]
    log_a, log_b = -math.log(s.shape[-2]), -math.log(s.shape[-1])
    g = torch.zeros_like(s[..., :1, :])
    for _ in range(iterations):
        f = log_a - torch.logsumexp(s + g, dim=-1, keepdim=True)
        g = log_b - torch.logsumexp(s + f, dim=-2, keepdim=True)
    return math.sqrt(references.shape[-2]) * torch.exp(s + f + g).mT @ value


def pot(key: Tensor, value: Tensor, references: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """The plan of POT's batched solver in the log domain, at as many steps as the others take."""
    from ot.batch import solve_batch

    cost = 1 - similarity(key, references).flatten(0, 1)  # [BH, N, M]
    uniform = [cost.new_full((len(cost), n), 1 / n) for n in cost.shape[1:]]
    steps = {"max_iter": iterations, "tol": 0, "method": "log_sinkhorn", "grad": "autodiff"}
    plan = solve_batch(cost, EPSILON, *uniform, **steps).plan
    return _distributed(plan.view(*key.shape[:3], -1), value)


def geomloss(
    key: Tensor, value: Tensor, references: Tensor, iterations: int = ITERATIONS
) -> Tensor:
    """GeomLoss's plan after as many steps, whose gradient is that of the last."""
    from geomloss.ot import solve_batch

    cost = 1 - similarity(key, references).flatten(0, 1)  # [BH, N, M]
    plan = solve_batch(cost, reg=EPSILON, max_iter=iterations).plan
    return _distributed(plan.view(*key.shape[:3], -1), value)


def _distributed(plan: Tensor, value: Tensor) -> Tensor:
    """Pool values into the references and give them back: [B, H, N, M], [B, H, N, Dv]."""
    pooled = plan.mT @ value / plan.sum(-2).unsqueeze(-1)
    return plan @ pooled / plan.sum(-1, keepdim=True)


OPTIONAL = {"POT": "ot", "GeomLoss": "geomloss"}
PEERS: dict[str, Callable[..., Tensor]] = {
    "eager, log domain": log_domain,
    "eager, scaling": scaling,
    "torch.compile, log domain": log_domain,
    "torch.compile, scaling": scaling,
    "POT": pot,
    "GeomLoss": geomloss,
    "OTKE": otke,
    "SDPA, N x N": softmax_attention,
    "SDPA, pool and scatter": pool_and_scatter,
    "Performer": performer,
    "linear attention": linear_attention,
}


def available() -> list[str]:
    """The peers whose packages are installed."""
    missing = {
        name for name, package in OPTIONAL.items() if importlib.util.find_spec(package) is None
    }
    return [name for name in PEERS if name not in missing]


def peer(name: str, iterations: int = ITERATIONS) -> Attention:
    """A peer by its name, compiled anew for every shape where its name says so."""
    attention = PEERS[name]
    if "iterations" in inspect.signature(attention).parameters:
        attention = partial(attention, iterations=iterations)
    if name.startswith("torch.compile"):
        torch._dynamo.config.cache_size_limit = 64
        return torch.compile(attention, dynamic=False)
    return attention
