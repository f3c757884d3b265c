"""Counts what the CUDA kernels execute for one head in half precision: the table executed.csv.

    python benchmarks/cuda/executed.py            # print it anew
    python benchmarks/cuda/executed.py --write    # replace it
    python benchmarks/cuda/executed.py --check    # its first head against one counted anew
    python benchmarks/cuda/executed.py --scaling  # what scaling to unit length adds
    python benchmarks/cuda/executed.py --float32  # print the same of forward in float32

The emulator tells how often warps execute each stretch of nvcc's PTX, and so what passes the
tensor cores, the special-function units and the memories. What a multiprocessor issues is counted
in the SASS for sm_80, of what differs with 9.0 in that for sm_90: a line of the source has so many
instructions there, and as many trips as its PTX has on average. "shared" and "global" count 128
bytes each; blocks are those of all launches. All is of bfloat16, the Gaussian kernel and epsilon =
0.1, without masks and masses.

Needs nvcc, the extension installed with sm_80 and, but for --check, sm_90 (CUDAARCHS="80;90") of
the same sources, and
pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
"""

import argparse
import csv
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from functools import cache
from pathlib import Path
from typing import TextIO

import sass
import torch
from budget import installed_extension
from model import EXECUTED as TABLE
from torch.nn.functional import normalize

import setformer_ext
from setformer_ext import ops

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "cuda"))

from emulator.build import SOURCES, compile_kernels, emulated_module
from emulator.counting import stretches, work
from emulator.device import Emulator
from emulator.ptx import Function, parse

ARCHITECTURE = 80  # of the emulated PTX, too
CLUSTERS = 90  # the first that has them
KINDS = ("tensor", "special", "shuffle", "shared", "global")
COLUMNS = (
    *(
        "capability",
        "tokens",
        "depth",
        "references",
        "steps",
        "pass",
        "kernel",
        "launches",
        "blocks",
        "issued",
    ),
    *KINDS,
)
HEADS = (
    (49, 32, 49),
    (196, 32, 49),
    (784, 32, 49),
    (3136, 32, 49),
    (512, 64, 64),
    (16384, 64, 128),
)
ON_CHIP = (HEADS[0], HEADS[1], HEADS[2], HEADS[4])
AT_CLUSTERS = ((3136, 32, 49, "forward"), (16384, 64, 128, "backward"))  # what differs there
STEPS = (1, 2, 5)  # between the last two model.py interpolates
SLACK = 0.02
MOST_UNKNOWN = 0.01  # of a kernel's SASS, of lines that its PTX does not have


def main() -> None:
    """Prints or writes the table."""
    parser = argparse.ArgumentParser(description="Instructions that the kernels execute.")
    parser.add_argument("--write", action="store_true", help="replace executed.csv")
    parser.add_argument("--check", action="store_true", help="hold it against what is now")
    parser.add_argument("--scaling", action="store_true", help="the share of normalize=True")
    parser.add_argument("--float32", action="store_true", help="print forward in float32")
    options = parser.parse_args()
    counted = Counted(installed_extension())
    if options.scaling:
        print(scaling(counted))
        return
    if options.float32:
        forward = [
            row
            for head in HEADS
            for steps in STEPS
            for row in counted.head(*head, steps, dtype=torch.float32, only=("forward",))
        ]
        write(forward, sys.stdout)
        return
    if options.check:
        now = [list(map(str, row)) for row in counted.head(*HEADS[0], STEPS[0])]
        problems = differences(table()[: len(now)], now)
        print(*problems, sep="\n")
        print(f"a head of {HEADS[0]} against {TABLE.name}: {len(problems)} problems")
        raise SystemExit(bool(problems))
    rows = [row for head in HEADS for steps in STEPS for row in counted.head(*head, steps)]
    rows += [
        row
        for *head, only in AT_CLUSTERS
        for steps in STEPS
        for row in counted.head(*head, steps, CLUSTERS)
        if row[COLUMNS.index("pass")] == only
    ]
    if options.write:
        with TABLE.open("w", newline="", encoding="utf-8") as file:
            write(rows, file)
    else:
        write(rows, sys.stdout)


def table() -> list[list[str]]:
    """The rows of executed.csv."""
    with TABLE.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))[1:]


def differences(known: list[list[str]], now: list[list[str]]) -> list[str]:
    """What of a head's kernels is more than SLACK from the table."""
    labels = COLUMNS.index("launches")
    if [row[:labels] for row in known] != [row[:labels] for row in now]:
        return [f"expected the kernels of {known}, got {now}"]
    return [
        f"{row[labels - 1]}, {name}: expected {before}, got {after}"
        for row, anew in zip(known, now, strict=True)
        for name, before, after in zip(COLUMNS[labels:], row[labels:], anew[labels:], strict=True)
        if abs(int(after) - int(before)) > SLACK * int(before)
    ]


def write(rows: list[tuple[str | int, ...]], file: TextIO) -> None:
    """As CSV."""
    csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])


@cache
def functions(ptx: Path) -> dict[str, Function]:
    """Of a PTX file, by their symbols."""
    return parse(ptx).functions


@cache
def issued_by_line(compiled: Path | None, architecture: int) -> dict[str, Counter[sass.Line]]:
    """sass.instructions_by_line(), of nothing where nothing is compiled."""
    return sass.instructions_by_line(compiled, architecture) if compiled else {}


class Counted:
    """The kernels of half types: PTX, SASS by lines, and the emulated device that runs them."""

    def __init__(self, compiled: Path | None) -> None:
        """`compiled`: the extension with the SASS. Of a kernel that it lacks 0 are issued."""
        self.compiled = compiled
        self.module = emulated_module(ARCHITECTURE)
        self.emulator = Emulator(self.module.__file__ or "")
        sources = sorted((SOURCES / "cuda").glob("*.cu"))
        self.ptx = [compile_kernels(source, ARCHITECTURE, SOURCES)[1] for source in sources]

    def kernel(self, name: str) -> Function:
        """By its symbol."""
        entry = re.compile(rf"\.entry {re.escape(name)}\(")
        ptx = next(path for path in self.ptx if entry.search(path.read_text(encoding="utf-8")))
        return functions(ptx)[name]

    def head(
        self,
        tokens: int,
        depth: int,
        references: int,
        steps: int,
        capability: int = ARCHITECTURE,
        is_scaled: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        only: Collection[str] = ("forward", "backward"),
    ) -> Iterator[tuple[str | int, ...]]:
        """Rows of one head's forward and backward."""
        torch.manual_seed(0)
        key, value, points = (
            normalize(torch.randn(size), dim=-1).to(dtype).requires_grad_()
            for size in ((1, 1, tokens, depth), (1, 1, tokens, depth), (1, references, depth))
        )
        output: list[torch.Tensor] = []
        before, ops._C = ops._C, self.module

        def forward() -> None:
            options = {"epsilon": 0.1, "iterations": steps, "normalize": is_scaled}
            output.append(setformer_ext.set_attention(None, key, value, points, **options))

        passes: dict[str, Callable[[], None]] = {
            "forward": forward,
            "backward": lambda: output[0].backward(torch.ones_like(output[0])),
        }
        sizes = (capability, tokens, depth, references, steps)
        try:
            with self.emulator.of_capability(capability):
                for name in only:
                    run = passes[name]
                    yield from ((*sizes, name, *row) for row in self.launches(run, capability))
        finally:
            ops._C = before

    def launches(self, run: Callable[[], None], capability: int) -> Iterator[tuple[str | int, ...]]:
        """A row for each kernel that run() launches, without sizes."""
        self.emulator.clear_launches()
        self.emulator.clear_executed()
        with self.emulator.configured(mode="count"):
            run()
        launches, executed = self.emulator.launches(), self.emulator.executed()
        short = sass.short_names({*executed})
        for name, times in executed.items():
            grids = [launch.grid for launch in launches if launch.kernel == name]
            counts = work(self.kernel(name), times)
            blocks = sum(x * y * z for x, y, z in grids)
            issued = round(self.issued(name, times, capability))
            kernel = short[name].partition("<")[0]
            yield kernel, len(grids), blocks, issued, *(counts[kind] for kind in KINDS)

    def issued(self, name: str, times: dict[int, int], capability: int) -> float:
        """Instructions of SASS: those of each line times its trips."""
        by_line = issued_by_line(self.compiled, capability).get(name, Counter())
        trips: Counter[sass.Line] = Counter()
        static: Counter[sass.Line] = Counter()
        for i, stretch in enumerate(stretches(self.kernel(name))):
            for instruction in stretch:
                line = sass.line_of(*instruction.source)
                static[line] += 1
                trips[line] += times.get(i, 0)
        unknown = sum(count for line, count in by_line.items() if line not in static)
        if unknown > MOST_UNKNOWN * by_line.total():
            raise SystemExit(
                f"{name}: {unknown} of its {by_line.total()} instructions are of lines that its "
                "PTX does not have: is the extension installed from these sources?"
            )
        return sum(n * trips[line] / static[line] for line, n in by_line.items() if static[line])


def scaling(counted: Counted) -> str:
    """What scaling to unit length adds to the instructions that are issued, in Markdown."""
    lines = ["| tokens | depth | references | T | forward | backward |", "| --: " * 6 + "|"]
    issued = COLUMNS.index("issued")
    for head in ON_CHIP:
        for steps in (STEPS[0], STEPS[-1]):
            totals = (Counter[str](), Counter[str]())
            for total, is_scaled in zip(totals, (False, True), strict=True):
                for row in counted.head(*head, steps, is_scaled=is_scaled):
                    total[str(row[COLUMNS.index("pass")])] += int(row[issued])
            shares = [
                f"{totals[1][name] / totals[0][name] - 1:.0%}" for name in ("forward", "backward")
            ]
            lines.append(f"| {' | '.join(map(str, (*head, steps, *shares)))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
