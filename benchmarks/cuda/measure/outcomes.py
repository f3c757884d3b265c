"""What `setformer selftest` has written of its checks and of the suite, as far as it came."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

SHOWN = 3  # of a check's comparisons that failed
OUT_OF_TIME = ("ended after", "no time was left")  # as setformer_ext/cli/selftest/suite.py has it


def outcomes(path: Path) -> list[dict[str, Any]]:
    """How many ended how, and each that failed; nothing where it has written nothing."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        verdict = report.get("verdict", "not finished")
        counts = Counter(task["status"] for task in report["tasks"])
        failed = [task for task in report["tasks"] if task["status"] == "FAILED"]
        return [
            {"kind": "outcomes", **counts, "verdict": verdict},
            *({"kind": "failed check", "check": x["name"], "why": why(x)} for x in failed),
            *(of_suite(report["suite"]) if "suite" in report else []),
        ]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        told = f"{path.name} is not what was expected: {type(error).__name__}: {error}"
        return [{"kind": "outcomes", "verdict": told}]


def of_suite(suite: dict[str, Any]) -> list[dict[str, Any]]:
    """The same of its tests, and how many were collected."""
    tests = suite["tests"]
    counts = Counter(test["outcome"] for test in tests.values())
    failed = {name: test for name, test in tests.items() if test["outcome"] == "failed"}
    return [
        {"kind": "suite", **counts, "of": suite["collected"], "error": suite["error"]},
        *({"kind": "failed test", "test": x, "why": last(failed[x]["why"])} for x in failed),
    ]


def out_of_time(path: Path) -> str:
    """That the suite was cut short, where nothing else keeps the selftest from having passed."""
    found = outcomes(path)
    failed = {"failed check", "failed test"} & {result["kind"] for result in found}
    error = next((str(x["error"]) for x in found if x["kind"] == "suite"), "")
    return error if error.startswith(OUT_OF_TIME) and not failed else ""


def why(task: dict[str, Any]) -> str:
    """The error, or the comparisons that failed."""
    if task["error"]:
        return last(task["error"])
    failed = [x for x in task["comparisons"] if not x["passed"]]
    shown = [f"{x['name']}: error {x['error']}, allowed {x['allowed']}" for x in failed[:SHOWN]]
    return "; ".join(shown) + f" and {len(failed) - SHOWN} more" * (len(failed) > SHOWN)


def last(text: str) -> str:
    """Of its lines."""
    return (text.strip().splitlines() or [""])[-1]
