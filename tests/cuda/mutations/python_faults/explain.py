"""Faults in explanation."""

from __future__ import annotations

from ..seeding import Seeded as Fault

EXPLAIN = (
    Fault(
        "patches shifted by the tokens before them",
        "cli/explain/encoders.py",
        "normalised(plans[:, plans.shape[1] - patches :])",
        "normalised(plans[:, :patches])",
    ),
    Fault(
        "shares of words divided by the wrong sums",
        "cli/explain/sentence.py",
        "shares = (plan / plan.sum(0)).T",
        "shares = (plan / plan.sum(1, keepdim=True)).T",
    ),
    Fault(
        "tokens of the padding are squeezed into the image",
        "cli/explain/__init__.py",
        "        covered=layer.covered,\n",
        "",
    ),
    Fault(
        "reference of a few bright tokens shows noise as bright as those",
        "cli/explain/picture.py",
        "brightest = torch.maximum(drawn.quantile(0.99), drawn.max() / 4)",
        "brightest = drawn.quantile(0.99)",
    ),
    Fault(
        "references of a cropped plan all draw the same mass",
        "cli/explain/plans.py",
        "plans.sum((1, 2), keepdim=True)",
        "plans.sum(1, keepdim=True)",
    ),
)
