"""How many blocks of a kernel fit on one multiprocessor, from what the kernel takes.

Limits: CUDA C++ Programming Guide, "Compute Capabilities", table "Technical Specifications per
Compute Capability". What is handed out in which units is in NVIDIA's cuda_occupancy.h (CUDA 13.0),
whose arithmetic this follows.
"""

from dataclasses import dataclass

WARP = 32
REGISTER_UNIT = 256  # registers are handed to a warp in multiples of this
MAX_REGISTERS = 255  # of a thread
SCHEDULERS = 4  # each owns a quarter of the registers


@dataclass(frozen=True)
class Architecture:
    """One compute capability; memory in bytes, the rest per multiprocessor."""

    blocks: int
    warps: int
    shared: int  # with the L1 cache at its smallest
    shared_block: int  # what one block may take after cudaFuncSetAttribute
    shared_unit: int = 128
    reserved: int = 1024  # of every block, by the driver
    registers: int = 65536


KIB = 1024
ARCHITECTURES = {
    75: Architecture(16, 32, 64 * KIB, 64 * KIB, shared_unit=256, reserved=0),
    80: Architecture(32, 64, 164 * KIB, 163 * KIB),
    86: Architecture(16, 48, 100 * KIB, 99 * KIB),
    89: Architecture(24, 48, 100 * KIB, 99 * KIB),
    90: Architecture(32, 64, 228 * KIB, 227 * KIB),
    100: Architecture(32, 64, 228 * KIB, 227 * KIB),
    120: Architecture(24, 48, 100 * KIB, 99 * KIB),
}


@dataclass(frozen=True)
class Occupancy:
    """Resident blocks, resident warps over the most there can be, and what sets the limit."""

    blocks: int
    fraction: float
    limit: str


def occupancy(arch: int, threads: int, registers: int, shared: int) -> Occupancy:
    """Of blocks of `threads`, `registers` a thread, and `shared` bytes (static and dynamic)."""
    limits = ARCHITECTURES[arch]
    warps = -(-threads // WARP)
    by = {
        "blocks": limits.blocks,
        "warps": limits.warps // warps,
        "registers": _by_registers(limits, warps, registers),
        "shared memory": _by_shared(limits, shared),
    }
    limit = min(by, key=lambda name: by[name])
    return Occupancy(by[limit], by[limit] * warps / limits.warps, limit)


def _by_registers(limits: Architecture, warps: int, registers: int) -> int:
    if registers > MAX_REGISTERS:
        return 0
    per_warp = _round_up(max(registers, 1) * WARP, REGISTER_UNIT)
    if per_warp * _round_up(warps, SCHEDULERS) > limits.registers:
        return 0
    return limits.registers // SCHEDULERS // per_warp * SCHEDULERS // warps


def _by_shared(limits: Architecture, shared: int) -> int:
    if shared > limits.shared_block:
        return 0
    taken = _round_up(shared + limits.reserved, limits.shared_unit)
    return limits.shared // taken if taken else limits.blocks


def _round_up(count: int, unit: int) -> int:
    return -(-count // unit) * unit
