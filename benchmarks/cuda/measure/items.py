"""A step's process that works through items: each is told when it begins and when it is done."""

import argparse
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from .results import tell

LAST = 4  # of the calls in a traceback


class SkippedError(Exception):
    """Raised by an item where neither it nor any later one can be measured; says why."""


@dataclass(frozen=True)
class Item:
    """What is measured, as a label of the report's row, and how."""

    label: dict[str, Any]
    measure: Callable[[], dict[str, Any]]
    kind: str = field(default="row")


def options(*more: str) -> argparse.Namespace:
    """Of the process: those that plan.py gives to all, and required ones of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--end", type=float, default=math.inf, help="as time.monotonic() has it")
    for name in more:
        parser.add_argument(name, required=True)
    return parser.parse_args()


def work(items: Iterable[Item], start: int, end: float, usable: Callable[[], bool]) -> None:
    """From `start` on, until the time is up; ends the process where the device is lost."""
    listed = list(items)
    longest = 0.0
    for i, item in enumerate(listed[start:], start):
        began = time.monotonic()
        if began + longest > end:
            tell("left out", rows=len(listed) - i, why="no time")
            return
        tell("begin", item=i, **item.label)
        try:
            values = item.measure()
        except SkippedError as reason:
            tell("skipped", note=str(reason))
            return
        except Exception as error:
            text = "".join(traceback.format_exception(error, limit=-LAST))
            print(text, flush=True)
            tell(item.kind, item=i, **item.label, error=text.strip().splitlines()[-1][:300])
            if not usable():
                sys.exit("the device is lost")
        else:
            tell(item.kind, item=i, **item.label, **values)
        longest = max(longest, time.monotonic() - began)
