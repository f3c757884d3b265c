"""Builds the emulated module with the kernels of one storage type alone, from changed sources."""

from __future__ import annotations

import re
import sysconfig
from pathlib import Path

from emulator import build

TYPES = {
    "float32": "float",
    "float64": "double",
    "bfloat16": "__nv_bfloat16",
    "float16": "__half",
}
DIRECTIONS = ("forward", "backward")

# What launch.cu refers to beside, and no check calls.
ABSENT = """\
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdlib>

#include "cuda/kernels.h"

namespace setformer::cuda {{
{definitions}
}}
"""
ABSENT_DIRECTION = """\
template <> {Direction}Workspace {Direction}Kernels<{type}>::workspace(const {Direction}Params&) {{
  std::abort();
}}
template <> void {Direction}Kernels<{type}>::run(const {Direction}Params&, void*, Stream&) {{
  std::abort();
}}"""


def build_module(
    sources: Path, storage: str, resident: bool, backward: bool, architecture: int = 80
) -> Path:
    """The module _C with one regime's kernels of one type, of `sources`, a copy of csrc/.

    Kernels that a change leaves as they were come from the emulator's cache.
    Raises: BuildError, PtxError.
    """
    directions = DIRECTIONS if backward else DIRECTIONS[:1]
    objects = build.extension_objects(build.SOURCES)
    for name in ("launch.cu", "device.cu"):
        host, _ = build.compile_cuda(sources / "cuda" / name, architecture, [sources])
        objects.append(host)
    for direction in directions:
        source = sources / "cuda" / f"{direction}_{storage}.cu"
        host, ptx = build.compile_cuda(source, architecture, [sources])
        objects += [host, *translated_kernels(ptx, resident)]
    objects.append(absent_kernels(storage, directions))
    objects += build.runtime_objects(architecture, with_cudart=True)
    name = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    return build.link(objects, name, ["-fopenmp", "-ldl", "-Wl,-z,undefs"])


def translated_kernels(ptx: Path, resident: bool) -> list[Path]:
    """Objects of one regime's kernels, and of small ones in files with them: no others can be
    launched."""

    def is_wanted(source: Path) -> bool:
        kernels = re.findall(
            r'const Kernel kKernel\{\s*"(\w+)"', source.read_text(encoding="utf-8")
        )
        return not kernels or any(("resident" in kernel) == resident for kernel in kernels)

    return build.compile_translated(list(filter(is_wanted, build.translated_sources(ptx))))


def absent_kernels(storage: str, directions: tuple[str, ...]) -> Path:
    definitions = []
    for direction in DIRECTIONS:
        for name, type_ in TYPES.items():
            if name == storage and direction in directions:
                continue
            definitions.append(ABSENT_DIRECTION.format(type=type_, Direction=direction.title()))
    text = ABSENT.format(definitions="\n".join(definitions))
    source = build.write(build.cache() / "generated" / f"absent-{build.digest(text)}.cpp", text)
    flags = ("-std=c++17", "-O0", "-w", f"-isystem{build.cuda_include()}")
    return build.compile_cpp(source, flags, [build.SOURCES])
