"""All tasks in their order, and how long each may take."""

from collections.abc import Collection

import torch

from ..._C import build_info
from . import behaviour_checks, benchmark, cuda_checks, definition_checks
from .outcome import CHECKS, SECTIONS, SMOKE, SPEED, Task

# For a GPU whose code is in the build. The definition, on the CPU, takes longest.
SECONDS = {SMOKE: 8, SPEED: 60, CHECKS: 120}
# For a GPU whose code is not in the build: the driver compiles the kernels of a type at their first
# call. And for a CPU, where kernels do not hang, but measuring may take minutes.
SECONDS_TO_COMPILE = SECONDS_ON_CPU = 600


def all_tasks(
    device: torch.device, quick: bool, sections: Collection[str] = SECTIONS
) -> list[Task]:
    """Every task of the sections for this device, the same list in every process."""
    tasks = [
        *definition_checks.smoke_tasks(),
        *benchmark.tasks(device, quick),
        *definition_checks.tasks(quick),
        *behaviour_checks.tasks(quick),
        *(cuda_checks.tasks() if device.type == "cuda" else []),
    ]
    return [task for task in tasks if task.section in sections]


def deadline(section: str, device: torch.device) -> float:
    """Seconds after which a task of the section is taken to hang."""
    if device.type == "cpu":
        return SECONDS[SMOKE] if section == SMOKE else SECONDS_ON_CPU
    architectures = build_info()["cuda_architectures"]
    if has_code(architectures, torch.cuda.get_device_capability(device)):
        return SECONDS[section]
    return SECONDS_TO_COMPILE


def has_code(architectures: str, capability: tuple[int, int]) -> bool:
    """Is there machine code for the capability among CMake's architectures, as "80-real;90;90a"?

    A GPU runs code of its own major version, up to its minor one; code for 90a runs on 9.0 only.
    """
    for architecture in filter(None, architectures.split(";")):
        number, _, form = architecture.partition("-")
        major, minor = divmod(int(number.rstrip("af")), 10)
        exact = number.endswith("a")
        if form == "virtual" or major != capability[0]:
            continue
        if minor == capability[1] or (minor < capability[1] and not exact):
            return True
    return False
