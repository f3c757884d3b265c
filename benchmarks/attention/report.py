"""Results as tables in Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from cases import OURS, Result
from limits import Rates

HEADER = (
    "| operation | B, H, N, D, M | dtype | direction | threads | competitor | ms, median "
    "| ± quartiles | times ours | MiB | of the limit |\n"
    "| --- | --- | --- | --- | --: | --- | --: | --: | --: | --: | --: |"
)


def rows(results: Sequence[Result], rates: dict[int, Rates]) -> list[str]:
    """A line for each competitor of one case, ours first where it took part."""
    ours = next((result.median for result in results if result.competitor == OURS), None)
    lines = []
    for result in results:
        case, shape = result.case, result.case.shape
        sizes = (shape.batch, shape.heads, shape.tokens, shape.depth, shape.references)
        limit = share_of_limit(result, rates)
        cells = [
            case.operation,
            ", ".join(map(str, sizes)),
            case.dtype,
            case.direction,
            str(case.threads),
            result.competitor,
            f"{result.median:.3g}" if result.median < 100 else f"{result.median:.0f}",
            f"{result.spread:.0%}",
            f"{result.median / ours:.2f}" if ours else "",
            "" if result.peak is None else f"{result.peak:.0f}",
            "" if limit is None else f"{limit:.0%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def slopes(results: Sequence[Result], lengths: int = 4) -> list[str]:
    """By which power of N each competitor's time grew over the longest problems it took part in."""
    series: dict[tuple[str, ...], list[tuple[int, float]]] = {}
    for result in results:
        case = result.case
        name = (case.operation, case.dtype, case.direction, result.competitor)
        series.setdefault(name, []).append((case.shape.tokens, result.median))
    lines = ["| operation | dtype | direction | competitor | tokens | time grows as N to the |"]
    lines += ["| --- | --- | --- | --- | --- | --: |"]
    for name, points in series.items():
        tokens, times = zip(*sorted(points)[-lengths:], strict=True)
        if len(tokens) < 2:
            continue
        logs = [list(map(math.log, tokens)), list(map(math.log, times))]
        slope = statistics.linear_regression(*logs).slope
        lines.append(f"| {' | '.join(name)} | {tokens[0]} to {tokens[-1]} | {slope:.2f} |")
    return lines


def share_of_limit(result: Result, rates: dict[int, Rates]) -> float | None:
    """The limit's time over that of ours; None for others, and where no rates were measured."""
    case = result.case
    if result.competitor != OURS or case.operation != "attention" or case.threads not in rates:
        return None
    return 1e3 * case.work.seconds(rates[case.threads]) / result.median
