"""The static budget: what each compiled kernel takes, against the table budget.csv.

    python benchmarks/cuda/budget.py             # print the table of the installed extension
    python benchmarks/cuda/budget.py --check     # compare it with budget.csv
    python benchmarks/cuda/budget.py --write     # replace budget.csv

"dynamic" is the shared memory that a launch asks for: at D = Dv = M = 64; of resident kernels at
D = Dv = 32, M = 49 and 49 tokens, a window of 7 x 7; of on-chip kernels at D = Dv = 32 and
the fewest tokens that a shape is for, in clusters one; of steps backward in the one that collects.
The columns after "limit" count instructions of the SASS, however often they run.
Needs cuobjdump and nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
"""

import argparse
import csv
import re
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from layout import STORAGES, OnChip, OnChipBackward, Problem, dynamic_shared
from occupancy import occupancy
from sass import INSTRUCTIONS, Kernel, read_kernels

TABLE = Path(__file__).with_name("budget.csv")
KEY = ["kernel", "arch"]
RESOURCES = ["threads", "registers", "shared", "dynamic", "blocks", "occupancy", "limit"]
COLUMNS = [*KEY, "ptxas", *RESOURCES, *INSTRUCTIONS]
NOT_LAUNCHED = {"probe"}  # device.cu only asks the driver about it

# How far a figure may be from the table's before --check complains, as a part of it. What is not
# here must be equal: one barrier or tensor-core instruction more or less is a different kernel.
SLACK = dict.fromkeys(["LDG", "LDS", "MUFU", "FFMA", "DFMA", "all"], 0.05) | {"registers": 0.03}
SLACK["local"] = 0.2


def is_on_chip(name: str) -> bool:
    """Whose entries take nearly all registers: once a head, not once an entry, it spills others."""
    return any(place in name for place in ("on_chip", "on_cluster", "on_shares"))


Row = dict[str, str]


def main() -> None:
    """Prints, checks or writes the table."""
    parser = argparse.ArgumentParser(description="Registers, shared memory, occupancy and SASS.")
    parser.add_argument("--check", action="store_true", help="compare with budget.csv")
    parser.add_argument("--write", action="store_true", help="replace budget.csv")
    parser.add_argument("--architectures", type=int, nargs="*", help="only these: 80 90")
    parser.add_argument("files", nargs="*", type=Path, help="objects or libraries")
    options = parser.parse_args()
    rows = unique(
        row_of(kernel)
        for file in options.files or [installed_extension()]
        for kernel in read_kernels(file, options.architectures)
        if kernel.name not in NOT_LAUNCHED
        # empty, and not launched either
        and not (is_on_chip(kernel.name) and kernel.arch < 80)
        and not ("on_cluster" in kernel.name and kernel.arch < 90)
    )
    if not rows:
        raise SystemExit("no kernel found: was the extension compiled with CUDA?")
    if options.write:
        with TABLE.open("w", newline="", encoding="utf-8") as file:
            write(rows, file)
    elif options.check:
        with TABLE.open(newline="", encoding="utf-8") as file:
            problems = compare(list(csv.DictReader(file)), rows)
        print(*problems, sep="\n")
        print(f"{len(rows)} compiled kernels against {TABLE.name}: {len(problems)} problems")
        raise SystemExit(bool(problems))
    else:
        write(rows, sys.stdout)


def installed_extension() -> Path:
    """The compiled module of the installed package."""
    from setformer_ext import _C

    return Path(_C.__file__)


def row_of(kernel: Kernel) -> Row:
    """The line of the table."""
    if kernel.threads == 0:
        raise SystemExit(f"{kernel.name} has no __launch_bounds__, which tell its occupancy")
    base, *types = re.split(r"[<>, ]+", kernel.name)
    if is_on_chip(kernel.name):
        blocks, strips, *rest = map(int, filter(None, types[2:]))
        storage = STORAGES[types[1]]
        one = Problem(1, 1, tokens=1, depth=32, references=1, steps=1, storage=storage)
        if "backward" in base:
            dynamic = OnChipBackward(blocks, rest[0]).shared(one)
        elif "on_cluster" in base:
            dynamic = OnChip(blocks, strips, 8, ranks=2).shared(one)
        elif "on_shares" in base:
            dynamic = dynamic_shared(base, replace(one, references=8 * blocks))
        else:
            shape = OnChip(blocks, strips, *rest)
            fewer = shape.tokens * 2 // shape.warps if shape.warps > 2 else 0
            dynamic = shape.shared(replace(one, tokens=fewer + 1))
    else:
        storage = STORAGES[types[0]]
        problem = Problem(1, 1, tokens=1024, depth=64, references=64, storage=storage)
        if "resident" in base:
            problem = replace(problem, tokens=49, depth=32, references=49)
        collects = base == "sinkhorn_step_backward_kernel"
        dynamic = dynamic_shared(base, problem, kernel.arch, collects)
    fit = occupancy(kernel.arch, kernel.threads, kernel.registers, kernel.shared + dynamic)
    values = [
        kernel.name,
        kernel.arch,
        kernel.ptxas,
        kernel.threads,
        kernel.registers,
        kernel.shared,
        dynamic,
        fit.blocks,
        f"{fit.fraction:.2f}",
        fit.limit,
        *kernel.counts.values(),
    ]
    return dict(zip(COLUMNS, map(str, values), strict=True))


def unique(rows: Iterable[Row]) -> list[Row]:
    """Once each, in order: templates of float are instantiated in several objects."""
    found: dict[str, Row] = {}
    for row in rows:
        if found.setdefault(name(row), row) != row:
            raise SystemExit(f"{name(row)} was compiled twice, and not alike")
    return sorted(found.values(), key=lambda row: (row["kernel"], int(row["arch"])))


def write(rows: list[Row], file: TextIO) -> None:
    """As CSV."""
    table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)


def compare(table: list[Row], rows: list[Row]) -> list[str]:
    """One line for each difference beyond SLACK; architectures that were not compiled are left out.

    Figures of another ptxas are not comparable: there only local memory is a difference.
    """
    expected = {name(row): row for row in table}
    compiled = {name(row): row for row in rows}
    archs = {row["arch"] for row in rows}
    problems = [
        f"{key}: {row['local']} accesses of local memory (spills), must be 0"
        for key, row in compiled.items()
        if row["local"] != "0" and not is_on_chip(key)
    ]
    problems += [
        f"{key}: not one block fits a multiprocessor ({row['limit']})"
        for key, row in compiled.items()
        if row["blocks"] == "0"
    ]
    for key, row in expected.items():
        if key in compiled:
            problems += differences(key, row, compiled[key])
        elif row["arch"] in archs:
            problems.append(f"{key}: in {TABLE.name}, not compiled")
    problems += [f"{key}: not in {TABLE.name}" for key in compiled if key not in expected]
    return problems


def differences(key: str, expected: Row, compiled: Row) -> list[str]:
    """Of one kernel."""
    if expected["ptxas"] != compiled["ptxas"]:
        return []
    return [
        f"{key}: {column} {compiled[column]}, was {expected[column]}"
        for column in [*RESOURCES, *INSTRUCTIONS]
        if not close(column, expected[column], compiled[column])
    ]


def close(column: str, expected: str, compiled: str) -> bool:
    """Equal, or within the column's slack."""
    if column not in SLACK:
        return expected == compiled
    return abs(int(compiled) - int(expected)) <= SLACK[column] * int(expected)


def name(row: Row) -> str:
    """As in `distribute_kernel<__half> sm_90`."""
    return f"{row['kernel']} sm_{row['arch']}"


if __name__ == "__main__":
    main()
