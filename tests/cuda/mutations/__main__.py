"""Prints how each seeded fault was found. Fails if one was not, or if a check objects to the
kernels as they are.

    cd tests/cuda && python -m mutations [WORD ...]     # whose name, file or problem has a word
"""

from __future__ import annotations

import sys
import time

from .faults import FAULTS
from .run import CLEAN, Row, run_all

COLUMNS = "{:<56} {:<20} {:<38} {:<36} {:>7}"


def line(row: Row) -> str:
    found = row.found_by or ("nothing, as it should be" if row.fault == CLEAN else "NOTHING")
    return COLUMNS.format(row.fault, row.file, row.problem, found, f"{row.seconds:.0f} s").rstrip()


def main() -> int:
    words = sys.argv[1:]
    faults = [fault for fault in FAULTS if fault.is_meant(words, fault.problem)]
    start = time.perf_counter()
    print(COLUMNS.format("fault", "file", "problem", "found by", "time"))
    wrong = []
    for row in run_all(faults):
        print(line(row), flush=True)
        if not row.as_expected:
            wrong.append(row)
    print(f"{len(faults)} faults in {time.perf_counter() - start:.0f} s")
    for row in wrong:
        print(f"\nnot as expected: {row.fault}, {row.problem}: {row.words or 'nothing objected'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
