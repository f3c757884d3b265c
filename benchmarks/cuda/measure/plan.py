"""The steps of a run in their order, and what each may take of its time."""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from . import ROOT

END = "{end}"  # in a command: when it must have ended, as time.monotonic() has it
FIRST = "machine"  # tells the others what they are about
USUAL = 600.0  # seconds of a run, for which the limits below are made
PATIENCE = 45.0  # seconds until the next result of a step that tells them one by one


@dataclass(frozen=True)
class Step:
    """One process, or several: where `items` are told, one lost over an item is replaced."""

    name: str
    command: tuple[str, ...]
    least: float  # seconds that earlier steps leave for it
    most: float  # seconds that it may take
    needs: tuple[str, ...] = ()  # steps without which it cannot run
    items: bool = False  # its process takes --start and may leave items out
    patience: float = math.inf  # seconds until its next result
    outcomes: Path | None = None  # JSON of `setformer selftest`

    @property
    def tells_as_it_goes(self) -> bool:
        """So that less than the least time is worth something too."""
        return self.items or self.outcomes is not None


def steps(output: Path, device: str, package: Path | None, seconds: float) -> list[Step]:
    """All of them, for a run of so many seconds; a package that is there is not built again."""
    built = () if package else ("build",)

    def python(name: str, *arguments: str) -> tuple[str, ...]:
        common = ("--device", device, "--end", END)
        return (sys.executable, "-m", f"measure.{name}", *common, *arguments)

    def one(name: str, least: float, most: float, needs: tuple[str, ...] = built) -> Step:
        return Step(name, python(name), least, most, needs)

    def many(
        name: str,
        least: float,
        most: float,
        needs: tuple[str, ...] = built,
        patience: float = PATIENCE,
    ) -> Step:
        return Step(name, python(name), least, most, needs, items=True, patience=patience)

    def selftest(name: str, least: float, most: float, *options: str) -> Step:
        text = output / f"{name}.txt"
        command = python("selftest", "--output", str(text), *options)
        return Step(name, command, least, most, built, outcomes=text.with_suffix(".json"))

    def sanitize(tool: str, least: float, most: float) -> Step:
        return Step(tool, python("sanitize", "--tool", tool), least, most, built)

    planned = [
        one(FIRST, 10, 60, ()),
        *([] if package else [one("build", 30, 300, ())]),
        selftest("smoke", 30, 90, "--only", "smoke"),
        many("ceilings", 20, 70, ()),
        many("table", 80, 170),
        many("knobs", 50, 100),
        selftest("selftest", 40, 150, "--only", "checks"),
        selftest("suite", 30, 120, "--only", "suite", "--suite", str(ROOT / "tests")),
        many("kernels", 15, 30),
        many("profiles", 40, 150, patience=2 * PATIENCE),
        sanitize("memcheck", 30, 120),
        sanitize("racecheck", 25, 120),
        sanitize("synccheck", 25, 120),
    ]
    more = max(1.0, seconds / USUAL)
    return [replace(step, most=more * step.most) for step in planned]
