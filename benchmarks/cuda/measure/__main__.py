"""The command: `bash benchmarks/cuda/measure.sh OUTPUT`."""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from emulator.build import find_nvcc

from . import PACKAGE, ROOT
from .execute import execute
from .plan import FIRST, USUAL, steps
from .record import Record

EXIT_STATUS = {
    "ok": 0,
    "skipped": 3,
    "timed out": 4,
    "hung": 5,
    "failed": 5,
}  # 1 and 2 are Python's own


def main() -> int:
    """Runs all steps and returns what their worst end is: see EXIT_STATUS."""
    options = parse()
    output = options.output.resolve()
    if not options.seconds > 0:
        sys.exit(f"measure: --seconds must be above 0, got {options.seconds}")
    if options.package and not options.package.exists():
        sys.exit(f"measure: --package must be what was built before, got {options.package}")
    plan = steps(output, options.device, options.package, options.seconds)
    if options.only:
        unknown = set(options.only) - {step.name for step in plan}
        if unknown:
            sys.exit(f"measure: --only must name steps of {[s.name for s in plan]}, got {unknown}")
        wanted = {FIRST, *options.only}
        plan = [step for step in plan if step.name in wanted]
    try:
        output.mkdir(parents=True, exist_ok=True)
        if (output / "report.json").exists():
            sys.exit(f"measure: OUTPUT must be a folder without a report, got {output}")
        if options.package:
            (output / PACKAGE).symlink_to(options.package.resolve())
        (output / "report.json").touch()  # what cannot be written shows before the work
        record = Record(output, options.seconds, device=options.device)
    except OSError as error:
        sys.exit(f"measure: OUTPUT must be a folder that can be written to, got {output}: {error}")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupted)
    ends = execute(plan, record, environment(output))
    return max(EXIT_STATUS[end] for end in ends)


def parse() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(prog="measure.sh", description=__doc__)
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder of the report")
    parser.add_argument(
        "--seconds",
        type=float,
        default=USUAL,
        help="that all steps may take (default: %(default)s)",
    )
    parser.add_argument("--only", nargs="+", metavar="STEP", help=f"these and {FIRST} only")
    parser.add_argument(
        "--package", type=Path, metavar="FOLDER", help="built before: OUTPUT/package of another run"
    )
    parser.add_argument(
        "--device", choices=("cuda", "emulated"), default="cuda", help="default: %(default)s"
    )
    return parser.parse_args()


def environment(output: Path) -> dict[str, str]:
    """Of the steps: this package and the one that was built come first."""
    paths = [str(output / PACKAGE), str(ROOT / "benchmarks" / "cuda")]
    changed = {"PYTHONUNBUFFERED": "1", "PYTHONPATH": joined(*paths, os.environ.get("PYTHONPATH"))}
    nvcc = find_nvcc()
    if nvcc is not None:  # ncu and compute-sanitizer lie beside it
        changed["PATH"] = joined(os.environ.get("PATH"), str(nvcc.parent))
    return os.environ | changed


def joined(*paths: str | None) -> str:
    """As PATH has them."""
    return os.pathsep.join(filter(None, paths))


def interrupted(*_: object) -> NoReturn:
    """Ends the step's process too, by the exception's way through run()."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
