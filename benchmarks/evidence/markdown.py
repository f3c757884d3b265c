"""Tables as docs/evidence.md has them."""

from __future__ import annotations


def row(*cells: str) -> str:
    """One line."""
    return f"| {' | '.join(cells)} |"
