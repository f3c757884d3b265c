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
    Fault(
        "--background is ignored for texts",
        "cli/explain/__init__.py",
        "        options.output,\n        options.background,\n",
        "        options.output,\n",
    ),
    Fault(
        "light pictures have the colours of light on black",
        "cli/explain/picture.py",
        'flip = (lambda x: 1 - x) if background == "light"',
        'flip = (lambda x: x) if background == "light"',
    ),
    Fault(
        "panels of wide images as high as those of tall ones",
        "cli/explain/picture.py",
        "panel = min(PANEL[0] * aspect, PANEL[1])",
        "panel = PANEL[1]",
    ),
    Fault(
        "rows as bright as the brightest place of all",
        "cli/explain/sentence.py",
        "vmin=0, vmax=row.max()",
        "vmin=0, vmax=shares.max()",
    ),
    Fault(
        "words below other columns",
        "cli/explain/sentence.py",
        "rows[-1].set_xticks(places, words,",
        "rows[-1].set_xticks(places, words[::-1],",
    ),
    Fault(
        "--background is ignored for images",
        "cli/explain/__init__.py",
        "background=options.background,",
        'background="dark",',
    ),
)
