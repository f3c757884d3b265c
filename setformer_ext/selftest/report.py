"""The report: facts of the machine, a line a check, times, what failed, a verdict."""

import shutil
import subprocess
from collections.abc import Sequence

import torch

from .. import info
from ..errors import first_line
from ..timing import why_no_cuda
from .benchmark import COMPETITORS
from .outcome import Outcome, Timing

COLUMNS = "{:<8} {:<44} {:>15} {:>6}  {}"


def facts(device: torch.device) -> str:
    """What `setformer info` says, and the device of this run."""
    try:
        lines = [info.report()]
    except Exception as error:
        lines = [f"setformer info: {type(error).__name__}: {first_line(error)}"]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        lines.append(
            f"this run on {device}: {properties.name}, capability {properties.major}."
            f"{properties.minor}, {properties.multi_processor_count} multiprocessors"
        )
        lines.append(_driver())
    else:
        lines.append(f"this run on the CPU; a GPU: {why_no_cuda() or 'found, but not asked for'}")
    return "\n".join(lines)


def _driver() -> str:
    """The driver's version and the clocks, where nvidia-smi tells them."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "nvidia-smi not found"
    query = "index,name,driver_version,pstate,clocks.sm,clocks.max.sm,power.limit,memory.used"
    try:
        done = subprocess.run(
            [tool, f"--query-gpu={query}", "--format=csv"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi: {first_line(error)}"
    return (done.stdout + done.stderr).strip()


def heading() -> str:
    """Above the lines."""
    return COLUMNS.format("", "check", "error / allowed", "s", "of")


def line(outcome: Outcome) -> str:
    """The check and the one of its comparisons that is nearest to its tolerance, or beyond it.

    The error is told as a share of the tolerance: what is small differs from check to check.
    """
    tightest = outcome.tightest
    error, of = "", outcome.skipped
    if outcome.error:
        of = "raised an error, see below"
    elif tightest is not None:
        error = f"{100 * tightest.share:.2g}%"
        of = f"{tightest.name} (of {len(outcome.result.comparisons)})"
    text = COLUMNS.format(outcome.status, outcome.name, error, f"{outcome.seconds:.1f}", of)
    return text.rstrip()


def failures(outcomes: Sequence[Outcome]) -> str:
    """Every comparison that failed and every error."""
    lines = []
    for outcome in outcomes:
        if outcome.status == "FAILED":
            lines.append(f"FAILED {outcome.name}")
            lines += [f"  {comparison}" for comparison in outcome.failures]
            lines += [f"  {text}" for text in outcome.error.splitlines()]
    return "\n".join(lines)


def times(outcomes: Sequence[Outcome]) -> str:
    """Medians, ours in milliseconds and the others as multiples of ours."""
    timings = [timing for outcome in outcomes for timing in outcome.result.timings]
    if not timings:
        return ""
    ours, *others = COMPETITORS
    layout = "{:<66}" + " {:>13}" * len(COMPETITORS)
    lines = [
        "times: ours in ms, the others as multiples of ours: the definition in plain torch, and",
        "torch's softmax attention (scaled_dot_product_attention); medians",
        layout.format("", ours, *others),
    ]
    for timing in timings:
        lines.append(
            layout.format(
                timing.label,
                f"{timing.milliseconds[ours]:.4g}",
                *(_multiple(timing, name) for name in others),
            )
        )
    return "\n".join(lines)


def _multiple(timing: Timing, name: str) -> str:
    milliseconds = timing.milliseconds.get(name)
    if milliseconds is None:
        return "failed"
    return f"{milliseconds / timing.milliseconds['setformer_ext']:.2f}"


def verdict(outcomes: Sequence[Outcome], suite_passed: bool | None) -> str:
    """One line."""
    count = {
        status: sum(outcome.status == status for outcome in outcomes)
        for status in ("ok", "FAILED", "skipped")
    }
    failed = count["FAILED"] > 0 or suite_passed is False
    seconds = sum(outcome.seconds for outcome in outcomes)
    suite = "" if suite_passed is None else f", the suite {'passed' if suite_passed else 'FAILED'}"
    return (
        f"{'FAILED' if failed else 'PASSED'}: {count['ok']} ok, {count['FAILED']} failed, "
        f"{count['skipped']} skipped in {seconds:.0f} s{suite}"
    )
