"""Builds the emulated module with the kernels of one storage type alone, from changed sources."""

from __future__ import annotations

import re
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from emulator import build

if TYPE_CHECKING:
    from .checks import Regime

TYPES = {
    "float32": "float",
    "float64": "double",
    "bfloat16": "__nv_bfloat16",
    "float16": "__half",
}
HALVES = ("bfloat16", "float16")
IN_PARTS = ("on_chip_", "on_chip_shares_")  # what there is in float32 as well
DIRECTIONS = ("forward", "backward")
# Of kernels on chip, those that the problems need: blocks of references, strips, warps.
SHAPES = (
    *("Li4ELi7ELi2E", "Li7ELi4ELi1E", "Li4ELi1ELi4E", "Li7ELi1ELi1E", "Li4ELi7EEE"),
    *("Li8ELi1ELi4E", "Li16ELi1ELi8E", "Li4ELi6E"),
)

FORWARD_ON_CHIP: dict[Regime, str] = {
    "on chip": "on_chip_",
    "cluster": "on_chip_cluster_",
    "shares": "on_chip_shares_",
}
# Of backward's other kernels, those that a problem needs.
BESIDE: dict[Regime, Regime] = {
    **dict.fromkeys(FORWARD_ON_CHIP, "resident"),
    "backward on shares": "streaming",
}
BACKWARD_ON_CHIP: dict[Regime, str] = {
    "on chip": "on_chip_backward_",
    "backward on shares": "on_chip_shares_backward_",
}
ON_CHIP = {*FORWARD_ON_CHIP, *BACKWARD_ON_CHIP}

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
ABSENT_ON_CHIP = {
    "on_chip_": """\
template <> bool OnChipForward<{type}>::run(const ForwardParams&, Stream&) {{ return false; }}""",
    "on_chip_cluster_": """\
template <> bool OnClusterForward<{type}>::run(const ForwardParams&, Stream&) {{
  return false;
}}""",
    "on_chip_shares_": """\
template <> int64_t SharedForward<{type}>::workspace(const ForwardParams&) {{ return 0; }}
template <> bool SharedForward<{type}>::run(const ForwardParams&, float*, Stream&) {{
  return false;
}}""",
    "on_chip_backward_": """\
template <> bool OnChipBackward<{type}>::run(
    const BackwardParams&, const BackwardWorkspace&, void*, Stream&) {{ return false; }}""",
    "on_chip_shares_backward_": """\
template <> bool SharedBackward<{type}>::begin(
    const BackwardParams&, const BackwardWorkspace&, float*, Stream&) {{ return false; }}
template <> void SharedBackward<{type}>::run(
    const BackwardParams&, const BackwardWorkspace&, float*, Pass, bool, int64_t, Stream&) {{}}""",
}


def build_module(
    sources: Path, storage: str, regime: Regime, backward: bool, architecture: int = 80
) -> Path:
    """The module _C with one regime's kernels of one type, of `sources`, a copy of csrc/.

    Kernels that a change leaves as they were come from the emulator's cache.
    Raises: BuildError, PtxError.
    """
    wanted: dict[str, Regime] = {f"forward_{storage}": regime}
    on_chip = FORWARD_ON_CHIP.get(regime)
    if storage in HALVES or on_chip is not None:
        wanted = {} if on_chip is None else {on_chip + storage: regime}
        wanted[f"forward_{storage}"] = "streaming"
    if backward:
        wanted[f"backward_{storage}"] = BESIDE.get(regime, regime)
        if regime in BACKWARD_ON_CHIP:
            wanted[BACKWARD_ON_CHIP[regime] + storage] = regime
    objects = build.extension_objects(build.SOURCES)
    for name in ("launch.cu", "device.cu"):
        host, _ = build.compile_cuda(sources / "cuda" / name, architecture, [sources])
        objects.append(host)
    for name, kernels in wanted.items():
        source = sources / "cuda" / f"{name}.cu"
        host, ptx = build.compile_kernels(source, architecture, sources)
        objects += [host, *translated_kernels(ptx, kernels)]
    objects.append(absent_kernels(set(wanted)))
    objects += build.runtime_objects(architecture, with_cudart=True)
    name = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    return build.link(objects, name, ["-fopenmp", "-ldl", "-Wl,-z,undefs"])


def translated_kernels(ptx: Path, regime: Regime) -> list[Path]:
    """Objects of one regime's kernels, and of small ones in files with them: no others can be
    launched."""

    def is_of_regime(kernel: str) -> bool:
        if any(name in kernel for name in ("merge_shares", "scale_rank", "shared_heads")):
            return True
        if "on_chip" in kernel:
            return regime in ON_CHIP and any(shape in kernel for shape in SHAPES)
        return "unit_length" in kernel or ("resident" in kernel) == (regime == "resident")

    def is_wanted(source: Path) -> bool:
        kernels = re.findall(
            r'const Kernel kKernel\{\s*"(\w+)"', source.read_text(encoding="utf-8")
        )
        return not kernels or any(map(is_of_regime, kernels))

    return build.compile_translated(list(filter(is_wanted, build.translated_sources(ptx))))


def absent_kernels(present: set[str]) -> Path:
    """Definitions in place of the sources that are not compiled."""
    definitions = [
        ABSENT_DIRECTION.format(type=type_, Direction=direction.title())
        for direction in DIRECTIONS
        for name, type_ in TYPES.items()
        if f"{direction}_{name}" not in present
    ]
    definitions += [
        definition.format(type=TYPES[name])
        for prefix, definition in ABSENT_ON_CHIP.items()
        for name in (*HALVES, *["float32"] * (prefix in IN_PARTS))
        if prefix + name not in present
    ]
    text = ABSENT.format(definitions="\n".join(definitions))
    source = build.write(build.cache() / "generated" / f"absent-{build.digest(text)}.cpp", text)
    flags = ("-std=c++17", "-O0", "-w", f"-isystem{build.cuda_include()}")
    return build.compile_cpp(source, flags, [build.SOURCES])
