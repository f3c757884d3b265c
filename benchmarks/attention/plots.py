"""Results as plots: time against N, the roofline, and threads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cases import OURS, Result
from limits import Rates
from matplotlib.figure import Figure


def draw_lengths(results: Sequence[Result], path: Path) -> None:
    """Milliseconds against tokens on logarithmic axes, a line for each competitor."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    for axes, gradient in zip(figure.subplots(1, 2, sharey=True), (False, True), strict=True):
        chosen = [result for result in results if result.case.gradient == gradient]
        for name in dict.fromkeys(result.competitor for result in chosen):
            points = [(r.case.shape.tokens, r.median) for r in chosen if r.competitor == name]
            width = 2.5 if name == OURS else 1.0
            axes.loglog(*zip(*points, strict=True), marker="o", ms=3, lw=width, label=name)
        axes.set(xlabel="tokens N", title="forward + backward" if gradient else "forward")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("milliseconds, median")
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=110)


def draw_roofline(results: Sequence[Result], rates: Rates, path: Path) -> None:
    """What ours reaches against operations per byte, under what the processor can do.

    An exponential counts as the operations that multiply-adds do in its time.
    """
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    weight = rates.sgemm / rates.exponential
    intensities = []
    for result in results:
        if result.competitor != OURS or result.case.operation != "attention":
            continue
        case = result.case
        needed = case.work
        operations = needed.operations + weight * needed.exponentials
        intensity = operations / needed.bytes
        intensities.append(intensity)
        reached = operations / (1e-3 * result.median) / 1e9
        axes.plot(intensity, reached, "o" if case.gradient else "s", color="C0")
        shape = case.shape
        label = f"{shape.batch}, {shape.heads}, {shape.tokens}, {case.dtype}"
        axes.annotate(
            label, (intensity, reached), fontsize=7, xytext=(4, -8), textcoords="offset points"
        )
    span = [min(intensities) / 4, max(intensities) * 2]
    for rate, name in ((rates.sgemm, "sgemm"), (rates.multiply_add, "multiply-adds")):
        ridge = min(max(rate / rates.copy, span[0]), span[1])
        roof = [span[0], ridge, span[1]]
        axes.plot(roof, [min(rate, x * rates.copy) / 1e9 for x in roof], label=name)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="Gflop/s")
    axes.set_title("squares: forward, discs: forward + backward (B, H, N)", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def draw_threads(results: Sequence[Result], path: Path) -> None:
    """Speed against threads, as a multiple of one thread's, beside what would be perfect."""
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    most = max(result.case.threads for result in results)
    axes.plot([1, most], [1, most], "--", color="grey", label="perfect")
    series: dict[str, list[tuple[int, float]]] = {}
    for result in results:
        shape = result.case.shape
        name = f"{shape.batch}, {shape.heads}, {shape.tokens}, {result.case.direction}"
        series.setdefault(name, []).append((result.case.threads, result.median))
    for name, points in series.items():
        first = dict(points)[1]
        axes.plot(*zip(*((n, first / t) for n, t in points), strict=True), marker="o", label=name)
    axes.set(xlabel="threads", ylabel="times the speed of one")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
