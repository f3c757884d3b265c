"""The command `setformer` with the kernels on emulated devices, in the processes it starts too.

python -m emulator.command selftest --only smoke        # from tests/cuda/

To its options a device is the CPU. EMULATOR_FAULT makes kernels fail, see runtime/cudart.cpp.
After EMULATOR_PATIENCE seconds a smoke check is taken to hang, and then all is given up.
EMULATOR_LIBRARY is a library that `python -m emulator.build` has named: no look for changes then.
"""

import os
import sys
from pathlib import Path

import torch

from setformer_ext import cli, ops
from setformer_ext.cli.selftest import runner, tasks, worker
from setformer_ext.cli.selftest.outcome import SMOKE

from .build import emulated_library, load


def main(arguments: list[str]) -> int:
    library = os.environ.get("EMULATOR_LIBRARY") or str(emulated_library())
    here = str(Path(__file__).resolve().parents[1])
    own = worker.code

    def code(device: torch.device, quick: bool) -> str:
        return (
            f"import sys; sys.path.insert(0, {here!r}); from setformer_ext import ops; "
            f"from emulator.build import load; ops._C = load({library!r}); {own(device, quick)}"
        )

    worker.code = code
    if patience := os.environ.get("EMULATOR_PATIENCE"):
        tasks.SECONDS[SMOKE] = float(patience)
        runner.MOST_SECONDS_WITHOUT_SUCCESS = 0
    ops._C = load(Path(library))
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
