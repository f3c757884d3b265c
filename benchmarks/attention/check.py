"""Whether a kernel has become slower than it was.

Where valgrind is, its instructions are counted, which repeat to a part in a thousand; the counts of
each compiler stand in instructions.json. Elsewhere it is the ratio of its time to that of the eager
definition in the same run: ratios.json has them for each instruction set and processor. Times
themselves would tell more about the machine than about the kernels.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from cases import DIRECTIONS, OURS, Case, measure
from instructions import can_count, count

from setformer_ext import _C
from setformer_ext.cli.info import processor_field
from setformer_ext.cli.timing import Shape, keep_memory

FILE = Path(__file__).with_name("ratios.json")
COUNTS = Path(__file__).with_name("instructions.json")
MORE = 1.02  # times the instructions on record: then the check fails
EAGER = "eager, log domain"
SLOWER = 1.3  # times, relative to eager: then the check fails
SLOWER_ELSEWHERE = 2.0  # on a processor without ratios of its own, which are others' at their least
ATTEMPTS = 3  # what else a shared machine does spoils one, but hardly all
SHAPES = {  # small ones of both depths, with few and with many heads
    "deep": Shape(2, 4, 1024, 64, 64, 64),
    "shallow": Shape(8, 6, 196, 32, 32, 49),
}
CASES = {
    f"{name}, {dtype}, {direction}": Case("attention", shape, dtype, gradient, 1)
    for name, shape in SHAPES.items()
    for dtype in ("float32", "bfloat16")
    for direction, gradient in DIRECTIONS.items()
}


def ratio(case: Case, rounds: int = 9) -> float:
    """How many times as long the eager definition takes, in float32, as its fastest."""
    plain = replace(case, dtype="float32")
    fastest = [float("inf")] * 2
    for _ in range(rounds):
        found = [*measure(case, [OURS], 2), *measure(plain, [EAGER], 1)]
        fastest = [min(t, *r.milliseconds) for t, r in zip(fastest, found, strict=True)]
    return fastest[1] / fastest[0]


def check() -> list[str]:
    """What has become slower, in words."""
    counts = _read(COUNTS).get(_compiler())
    if can_count() and counts is not None:
        return check_instructions(counts)
    return check_ratios()


def check_instructions(known: dict[str, int]) -> list[str]:
    problems = []
    for name, found in count_all().items():
        text = f"{name}: {found:,} instructions, {known[name]:,} on record"
        print(text, flush=True)
        if found > MORE * known[name]:
            problems.append(text)
    return problems


def count_all() -> dict[str, int]:
    """Of the cases whose type NumPy has."""
    return {
        name: count(case.shape, case.gradient)
        for name, case in CASES.items()
        if case.dtype == "float32"
    }


def check_ratios() -> list[str]:
    keep_memory()
    recorded, machine = _read(FILE), _machine()
    alike = [ratios for key, ratios in recorded.items() if key.startswith(f"{_C.cpu_isa()},")]
    if not alike:
        print(f"{FILE.name} has no ratios for {_C.cpu_isa()}: nothing to check")
        return []
    known = recorded.get(machine) or {case: min(r[case] for r in alike) for case in CASES}
    slower = SLOWER if machine in recorded else SLOWER_ELSEWHERE
    print(f"{machine}: fails where {slower} times slower than on record")
    problems = []
    for name, case in CASES.items():
        found = 0.0
        for _ in range(ATTEMPTS):
            found = max(found, ratio(case))
            if found * slower >= known[name]:
                break
        print(
            f"{name}: {found:.2f} times as fast as eager, {known[name]:.2f} on record", flush=True
        )
        if found * slower < known[name]:
            problems.append(
                f"{name}: {found:.2f} times as fast as eager, expected {known[name]:.2f}"
            )
    return problems


def record() -> None:
    """Write this machine's ratios for its instruction set, and its compiler's instructions."""
    if can_count():
        _write(COUNTS, {_compiler(): count_all()})
    keep_memory()
    ratios = {name: round(ratio(case), 2) for name, case in CASES.items()}
    _write(FILE, {_machine(): ratios})


def _machine() -> str:
    """The instruction set and the processor's design, as far as Linux tells."""
    design = [processor_field(name) or "?" for name in ("vendor_id", "cpu family", "model")]
    return f"{_C.cpu_isa()}, {' '.join(design)}"


def _compiler() -> str:
    return _C.build_info()["compiler"]


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _write(file: Path, more: dict[str, Any]) -> None:
    file.write_text(json.dumps(_read(file) | more, indent=2) + "\n", encoding="utf-8")
