"""The report: facts of the machine, a line a check, times, what failed, a verdict; and as JSON."""

import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ...errors import first_line
from .. import info
from ..timing import why_no_cuda
from .benchmark import COMPETITORS
from .outcome import Outcome
from .processes import output
from .suite import Suite

COLUMNS = "{:<8} {:<44} {:>15} {:>6}  {}"
MOST_OF_ERROR = 100  # characters in the line of a check
SECONDS_OF_NVIDIA_SMI = 5
STATUSES = ("ok", "FAILED", "skipped", "not run")


def facts(device: torch.device) -> dict[str, str]:
    """The facts of `setformer info`, and the device of this run."""
    try:
        found = info.collect()
    except Exception as error:
        found = {"setformer info": f"{type(error).__name__}: {first_line(error)}"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["this run on"] = (
            f"{device}: {properties.name}, capability {properties.major}.{properties.minor}, "
            f"{properties.multi_processor_count} multiprocessors"
        )
        found["nvidia-smi"] = _driver()
    else:
        found["this run on"] = f"the CPU; a GPU: {why_no_cuda() or 'found, but not asked for'}"
    return found


def _driver() -> str:
    """The driver's version and the clocks, where nvidia-smi tells them."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "not found"
    query = "index,name,driver_version,pstate,clocks.sm,clocks.max.sm,power.limit,memory.used"
    try:
        return output([tool, f"--query-gpu={query}", "--format=csv"], SECONDS_OF_NVIDIA_SMI).strip()
    except (OSError, TimeoutError) as error:
        return first_line(error)


def heading(section: str) -> str:
    """The line above those of a section."""
    return COLUMNS.format("", section, "error / allowed", "s", "of")


def line(outcome: Outcome) -> str:
    """The line of a check: its comparison that is nearest to the tolerance, or furthest beyond it.

    The error is given as a share of the tolerance, because checks differ in what is a small error.
    """
    tightest = outcome.tightest
    error, of = "", outcome.skipped or outcome.not_run
    if outcome.error:
        lines = outcome.error.splitlines()
        of = lines[-1 if lines[0].startswith("Traceback") else 0][:MOST_OF_ERROR] + ", see below"
    elif tightest is not None:
        error = f"{100 * tightest.share:.2g}%"
        of = f"{tightest.name} (of {len(outcome.comparisons)})"
    if outcome.note:
        of += f"; {outcome.note}"
    seconds = "" if outcome.not_run else f"{outcome.seconds:.1f}"
    text = COLUMNS.format(outcome.status, outcome.name, error, seconds, of)
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
    """Medians: ours in milliseconds, the others as multiples of ours."""
    timings = [timing for outcome in outcomes for timing in outcome.timings]
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
        found = timing.milliseconds
        multiples = [
            f"{found[name] / found[ours]:.2f}" if name in found else "failed" for name in others
        ]
        lines.append(layout.format(timing.label, f"{found[ours]:.4g}", *multiples))
    return "\n".join(lines)


def verdict(outcomes: Sequence[Outcome], suite: Suite | None, seconds: float) -> str:
    """One line."""
    count = [f"{sum(x.status == status for x in outcomes)} {status.lower()}" for status in STATUSES]
    passed = all(outcome.passed for outcome in outcomes) and (suite is None or suite.passed)
    of_suite = "" if suite is None else f"; {suite.verdict}"
    return f"{'PASSED' if passed else 'FAILED'}: {', '.join(count)} in {seconds:.0f} s{of_suite}"


def path_beside(text: Path) -> Path:
    """The path of the JSON: report.json for report.txt.

    Raises: ValueError if the text itself has that name.
    """
    path = text.with_suffix(".json")
    if path == text:
        raise ValueError(
            f"--output must be the text's name, beside which the JSON is written, got {text}: "
            f"try {text.with_suffix('.txt')}"
        )
    return path


def as_json(outcome: Outcome) -> dict[str, Any]:
    """All fields of an outcome, and whether it and each of its comparisons passed."""
    fields = asdict(outcome) | {"status": outcome.status}
    for comparison, x in zip(fields["comparisons"], outcome.comparisons, strict=True):
        comparison["passed"] = x.passed
    return fields


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Written under another name first: a reader always finds a whole file.

    Numbers that JSON has no word for are the strings nan, inf and -inf.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(_speakable(record), indent=1), encoding="utf-8")
    part.replace(path)


def _speakable(x: Any) -> Any:
    if isinstance(x, dict):
        return {key: _speakable(value) for key, value in x.items()}
    if isinstance(x, list):
        return [_speakable(value) for value in x]
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x
