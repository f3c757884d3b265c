"""What `setformer selftest` has written of its checks, as far as it came."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

SHOWN = 3  # of a check's comparisons that failed


def outcomes(path: Path) -> list[dict[str, Any]]:
    """How many ended how, and each that failed; nothing where it has written nothing."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        tasks = report["tasks"]
        counts = Counter(task["status"] for task in tasks)
        verdict = report.get("verdict", "not finished")
        failed = [task for task in tasks if task["status"] == "FAILED"]
        return [
            {"kind": "outcomes", **counts, "verdict": verdict},
            *({"kind": "failed check", "check": x["name"], "why": why(x)} for x in failed),
        ]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        told = f"{path.name} is not what was expected: {type(error).__name__}: {error}"
        return [{"kind": "outcomes", "verdict": told}]


def why(task: dict[str, Any]) -> str:
    """The error, or the comparisons that failed."""
    if task["error"]:
        return str(task["error"].strip().splitlines()[-1])
    failed = [x for x in task["comparisons"] if not x["passed"]]
    shown = [f"{x['name']}: error {x['error']}, allowed {x['allowed']}" for x in failed[:SHOWN]]
    return "; ".join(shown) + f" and {len(failed) - SHOWN} more" * (len(failed) > SHOWN)
