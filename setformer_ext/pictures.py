"""What the package's pictures share: their colours, and which head is worth drawing."""

from __future__ import annotations

import torch
from torch import Tensor

# Bright on black, and told apart also by people who see no red or no green.
COLOURS = ["#56b4e9", "#e69f00", "#2ee6a0", "#f0e442", "#ff6ec7", "#d55e00", "#9d8cff", "#ffffff"]


def mutual_information(plans: Tensor) -> Tensor:  # [..., N, M] -> [...]
    """How much a token says about the reference: sum_ij P_ij log(P_ij / (a_i b_j)), in nats.

    It is 0 where every reference draws alike, which leaves nothing to see.
    """
    independent = plans.sum(-1, keepdim=True) * plans.sum(-2, keepdim=True)
    return torch.xlogy(plans, plans / independent.clamp_min(1e-30)).sum((-1, -2))
