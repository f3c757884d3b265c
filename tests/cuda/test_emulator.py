"""The emulator itself: instructions against values worked out by hand, the layouts of matrix
fragments against the PTX manual's formulas, and every kind of error that it is there to find."""

from __future__ import annotations

import ctypes
import math
import os
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from emulator.build import build_cuda, build_ptx, cache, digest, find_nvcc, write
from emulator.counting import work
from emulator.device import Emulator
from emulator.ptx import PtxError, parse

NAN = 0x7FFFFFFF
HEADER = ".version 8.0\n.target sm_80\n.address_size 64\n"


# Values of instructions


@dataclass(frozen=True)
class Bits:
    width: int
    value: int


def f32(x: float) -> Bits:
    return Bits(32, struct.unpack("<I", struct.pack("<f", x))[0])


def f64(x: float) -> Bits:
    return Bits(64, struct.unpack("<Q", struct.pack("<d", x))[0])


def b16(x: int) -> Bits:
    return Bits(16, x & 0xFFFF)


def b32(x: int) -> Bits:
    return Bits(32, x & 0xFFFFFFFF)


def b64(x: int) -> Bits:
    return Bits(64, x & 0xFFFFFFFFFFFFFFFF)


TINY = 2.0**-126  # the smallest normal float
F32_NAN = b32(0x7FC00000)

# Instruction, result, operands. Where the instruction is more than one word it names its operands:
# {d} the result, {0}, {1}, .. the inputs, %p and %q predicates, %t a 32-bit register.
CASES: list[tuple[str, Bits, tuple[Bits, ...]]] = [
    # rounding modes, at the tie 1 + 2^-24
    ("add.f32", f32(1), (f32(1), f32(2**-24))),
    ("add.rn.f32", f32(1 + 2**-22), (f32(1 + 2**-23), f32(2**-24))),
    ("add.rz.f32", f32(1), (f32(1), f32(2**-24))),
    ("add.rm.f32", f32(1), (f32(1), f32(2**-24))),
    ("add.rp.f32", f32(1 + 2**-23), (f32(1), f32(2**-24))),
    ("add.rm.f32", f32(-1 - 2**-23), (f32(-1), f32(-(2**-24)))),
    ("add.rz.f32", f32(-1), (f32(-1), f32(-(2**-24)))),
    ("sub.rp.f32", f32(1), (f32(1), f32(2**-30))),
    ("sub.rm.f32", f32(1 - 2**-24), (f32(1), f32(2**-30))),
    ("mul.rz.f32", f32(1 + 2**-22), (f32(1 + 2**-23), f32(1 + 2**-23))),
    ("mul.rp.f32", f32(1 + 2**-22 + 2**-23), (f32(1 + 2**-23), f32(1 + 2**-23))),
    ("add.rp.f64", f64(1 + 2**-52), (f64(1), f64(2**-60))),
    ("add.rn.f64", f64(1), (f64(1), f64(2**-60))),
    ("div.rn.f32", b32(0x3EAAAAAB), (f32(1), f32(3))),
    ("div.rz.f32", b32(0x3EAAAAAA), (f32(1), f32(3))),
    ("div.full.f32", b32(0x3EAAAAAB), (f32(1), f32(3))),
    ("div.approx.f32", f32(0), (f32(1), f32(2.0**127))),
    ("rcp.rn.f32", b32(0x3EAAAAAB), (f32(3),)),
    ("rcp.rm.f32", b32(0x3EAAAAAA), (f32(3),)),
    ("sqrt.rn.f32", b32(0x3FB504F3), (f32(2),)),
    ("sqrt.rp.f32", b32(0x3FB504F4), (f32(2),)),
    ("sqrt.rn.f64", f64(math.sqrt(2)), (f64(2),)),
    ("fma.rn.f32", f32(2**-24), (f32(1 + 2**-12), f32(1 + 2**-12), f32(-1 - 2**-11))),
    ("fma.rn.f64", f64(2**-60), (f64(1 + 2**-30), f64(1 + 2**-30), f64(-1 - 2**-29))),
    ("fma.rp.f32", f32(1 + 2**-23), (f32(1), f32(1), f32(2**-40))),
    # .ftz: subnormal inputs and results become zero of their sign
    ("add.f32", f32(TINY), (f32(TINY / 2), f32(TINY / 2))),
    ("add.ftz.f32", f32(0), (f32(TINY / 2), f32(TINY / 2))),
    ("mul.f32", f32(-TINY / 2), (f32(-TINY), f32(0.5))),
    ("mul.ftz.f32", f32(-0.0), (f32(-TINY), f32(0.5))),
    ("fma.rn.ftz.f32", f32(1), (f32(TINY / 2), f32(2.0**120), f32(1))),
    ("max.ftz.f32", f32(0), (f32(TINY / 2), f32(-1))),
    ("abs.ftz.f32", f32(0), (f32(-TINY / 2),)),
    ("ex2.approx.ftz.f32", f32(8), (f32(3),)),
    ("ex2.approx.ftz.f32", f32(0), (f32(-127),)),
    ("ex2.approx.f32", f32(TINY / 2), (f32(-127),)),
    ("ex2.approx.f32", f32(0), (f32(-math.inf),)),
    ("lg2.approx.f32", f32(-127), (f32(TINY / 2),)),
    ("lg2.approx.ftz.f32", f32(-math.inf), (f32(TINY / 2),)),
    ("rcp.approx.ftz.f32", f32(math.inf), (f32(TINY / 2),)),
    ("rsqrt.approx.f32", f32(0.25), (f32(16),)),
    ("add.sat.f32", f32(1), (f32(0.75), f32(0.75))),
    ("add.sat.f32", f32(0), (F32_NAN, f32(1))),
    # min and max: numbers win over NaN unless .NaN, -0 < +0
    ("min.f32", f32(1), (F32_NAN, f32(1))),
    ("max.f32", f32(1), (f32(1), F32_NAN)),
    ("min.f32", b32(NAN), (F32_NAN, F32_NAN)),
    ("min.NaN.f32", b32(NAN), (F32_NAN, f32(1))),
    ("max.NaN.f32", f32(2), (f32(2), f32(1))),
    ("min.f32", f32(-0.0), (f32(0.0), f32(-0.0))),
    ("max.f32", f32(0.0), (f32(-0.0), f32(0.0))),
    ("max.f64", f64(3), (f64(3), f64(math.nan))),
    ("neg.f32", f32(-0.0), (f32(0.0),)),
    ("copysign.f32", f32(-2), (f32(-1), f32(2))),
    # integers
    ("add.s32", b32(-(2**31)), (b32(2**31 - 1), b32(1))),
    ("mul.lo.s32", b32(-6), (b32(-2), b32(3))),
    ("mul.hi.s32", b32(-1), (b32(-2), b32(3))),
    ("mul.hi.u32", b32(2), (b32(-2), b32(3))),
    ("mul.wide.s32", b64(-6), (b32(-2), b32(3))),
    ("mul.wide.u32", b64(3 * (2**32 - 2)), (b32(-2), b32(3))),
    ("mul.wide.u16", b32(0xFFFE0001), (b16(0xFFFF), b16(0xFFFF))),
    ("mul.hi.u64", b64(2), (b64(-2), b64(3))),
    ("mad.lo.s32", b32(-5), (b32(-2), b32(3), b32(1))),
    ("mad.wide.s32", b64(-5), (b32(-2), b32(3), b64(1))),
    ("mad.hi.u32", b32(9), (b32(-2), b32(3), b32(7))),
    ("div.s32", b32(-3), (b32(-7), b32(2))),
    ("rem.s32", b32(-1), (b32(-7), b32(2))),
    ("div.u32", b32(0x7FFFFFFC), (b32(-7), b32(2))),
    ("min.s32", b32(-1), (b32(-1), b32(1))),
    ("min.u32", b32(1), (b32(-1), b32(1))),
    ("abs.s32", b32(5), (b32(-5),)),
    ("add.cc.u32 %t, {0}, {0}; addc.u32 {d}, {1}, {1};", b32(7), (b32(-1), b32(3))),
    ("sub.cc.u32 %t, {0}, {1}; subc.u32 {d}, {1}, {0};", b32(0), (b32(1), b32(2))),
    # bits
    ("shl.b32", b32(0), (b32(1), b32(32))),
    ("shl.b32", b32(2), (b32(1), b32(1))),
    ("shr.s32", b32(-1), (b32(-8), b32(40))),
    ("shr.u32", b32(0), (b32(-8), b32(32))),
    ("shr.s32", b32(-2), (b32(-8), b32(2))),
    ("shr.u64", b64(1), (b64(-1), b32(63))),
    ("shf.l.wrap.b32", b32(3), (b32(0x80000000), b32(1), b32(1))),
    ("shf.l.clamp.b32", b32(0x80000000), (b32(0x80000000), b32(1), b32(40))),
    ("shf.r.wrap.b32", b32(5), (b32(5), b32(9), b32(32))),
    ("shf.r.clamp.b32", b32(9), (b32(5), b32(9), b32(32))),
    # a table is what the operation makes of 0xF0, 0xCC and 0xAA
    ("lop3.b32", b32(0x96), tuple(map(b32, (0xF0, 0xCC, 0xAA, 0x96)))),
    ("lop3.b32", b32(0xCACACACA), tuple(map(b32, (0xF0F0F0F0, 0xCCCCCCCC, 0xAAAAAAAA, 0xCA)))),
    ("prmt.b32", b32(0x77553311), (b32(0x33221100), b32(0x77665544), b32(0x7531))),
    ("prmt.b32", b32(0x808080FF), (b32(0x80), b32(0), b32(0x0008))),
    ("bfe.u32", b32(0xD12), (b32(0xABCD1234), b32(8), b32(12))),
    ("bfe.s32", b32(-8), (b32(8), b32(0), b32(4))),
    ("bfe.s32", b32(0), (b32(8), b32(0), b32(0))),
    ("bfi.b32", b32(0xF0), (b32(0xF), b32(0), b32(4), b32(4))),
    ("popc.b64", b32(64), (b64(-1),)),
    ("clz.b32", b32(31), (b32(1),)),
    ("clz.b32", b32(32), (b32(0),)),
    ("brev.b32", b32(0x80000000), (b32(1),)),
    ("bfind.u32", b32(8), (b32(0x100),)),
    ("bfind.shiftamt.u32", b32(23), (b32(0x100),)),
    ("bfind.s32", b32(-1), (b32(-1),)),
    ("not.b32", b32(0xFFFFFFF0), (b32(0xF),)),
    ("mov.b32 {d}, {{{0}, {1}}};", b32(0x00020001), (b16(1), b16(2))),
    ("mov.b64 {{%t, {d}}}, {0};", b32(0x1234), (b64(0x123400005678),)),
    # comparisons
    ("setp.lt.f32 %p, {0}, {1}; selp.u32 {d}, 1, 0, %p;", b32(0), (F32_NAN, f32(1))),
    ("setp.ltu.f32 %p, {0}, {1}; selp.u32 {d}, 1, 0, %p;", b32(1), (F32_NAN, f32(1))),
    ("setp.ne.f32 %p, {0}, {1}; selp.u32 {d}, 1, 0, %p;", b32(0), (F32_NAN, f32(1))),
    ("setp.neu.f32 %p, {0}, {1}; selp.u32 {d}, 1, 0, %p;", b32(1), (F32_NAN, f32(1))),
    ("setp.nan.f32 %p, {0}, {1}; selp.u32 {d}, 1, 0, %p;", b32(1), (F32_NAN, f32(1))),
    ("setp.num.f32 %p, {0}, {1}; selp.u32 {d}, 1, 0, %p;", b32(1), (f32(2), f32(1))),
    ("setp.eq.f32 %p, {0}, {1}; selp.u32 {d}, 1, 0, %p;", b32(1), (f32(0.0), f32(-0.0))),
    ("setp.eq.ftz.f32 %p, {0}, {1}; selp.u32 {d}, 1, 0, %p;", b32(1), (f32(TINY / 2), f32(0))),
    ("setp.lt.s32 %p, {0}, {1}; selp.u32 {d}, 1, 0, %p;", b32(1), (b32(-1), b32(1))),
    ("setp.lo.u32 %p, {0}, {1}; selp.u32 {d}, 1, 0, %p;", b32(0), (b32(-1), b32(1))),
    (
        "setp.ge.s32 %p, {0}, {0}; setp.lt.and.s32 %p|%q, {0}, {1}, %p; "
        "selp.u32 %t, 2, 0, %p; selp.u32 {d}, 1, 0, %q; or.b32 {d}, {d}, %t;",
        b32(1),
        (b32(3), b32(1)),
    ),
    ("slct.u32.s32", b32(2), (b32(1), b32(2), b32(-1))),
    ("slct.u32.f32", b32(1), (b32(1), b32(2), f32(-0.0))),
    # conversions
    ("cvt.rni.s32.f32", b32(2), (f32(2.5),)),
    ("cvt.rni.s32.f32", b32(4), (f32(3.5),)),
    ("cvt.rzi.s32.f32", b32(-2), (f32(-2.7),)),
    ("cvt.rmi.s32.f32", b32(-3), (f32(-2.1),)),
    ("cvt.rpi.s32.f32", b32(3), (f32(2.1),)),
    ("cvt.rzi.s32.f32", b32(0x7FFFFFFF), (f32(1e10),)),
    ("cvt.rzi.s32.f32", b32(0x80000000), (f32(-math.inf),)),
    ("cvt.rzi.u32.f32", b32(0), (f32(-5),)),
    ("cvt.rzi.s32.f32", b32(0), (F32_NAN,)),
    ("cvt.rzi.s64.f64", b64(-(2**62)), (f64(-(2.0**62)),)),
    ("cvt.rni.f32.f32", f32(-0.0), (f32(-0.5),)),
    ("cvt.sat.f32.f32", f32(0), (f32(-3),)),
    ("cvt.s32.s8", b32(-1), (b16(0x01FF),)),
    ("cvt.u32.u16", b32(0xFFFF), (b16(0xFFFF),)),
    ("cvt.s64.s32", b64(-7), (b32(-7),)),
    ("cvt.sat.s8.s32", b32(127), (b32(300),)),
    ("cvt.sat.u8.s32", b32(0), (b32(-300),)),
    ("cvt.rn.f32.s32", f32(16777216), (b32(16777217),)),
    ("cvt.rp.f32.s32", f32(16777218), (b32(16777217),)),
    ("cvt.rn.f32.u64", f32(2.0**64), (b64(-1),)),
    ("cvt.rz.f32.u64", b32(0x5F7FFFFF), (b64(-1),)),
    ("cvt.rn.f32.f64", f32(1 + 2**-23), (f64(1 + 2**-24 + 2**-50),)),
    ("cvt.rz.f32.f64", f32(1), (f64(1 + 2**-24 + 2**-50),)),
    ("cvt.rn.ftz.f32.f64", f32(0), (f64(TINY / 2),)),
    ("cvt.f64.f32", f64(1.5), (f32(1.5),)),
    ("cvt.rn.f16.f32", b16(0x7BFF), (f32(65519),)),
    ("cvt.rn.f16.f32", b16(0x7C00), (f32(65520),)),
    ("cvt.rz.f16.f32", b16(0x7BFF), (f32(65520),)),
    ("cvt.rn.f16.f32", b16(0x0001), (f32(2**-24),)),
    ("cvt.rn.f16.f32", b16(0x0000), (f32(2**-25),)),
    ("cvt.rn.f16.f32", b16(0x0002), (f32(1.5 * 2**-24),)),
    ("cvt.rn.f16.f32", b16(0x8400), (f32(-(2**-14)),)),
    ("cvt.f32.f16", f32(2**-24), (b16(0x0001),)),
    ("cvt.f32.f16", f32(-math.inf), (b16(0xFC00),)),
    ("cvt.f32.f16", f32(-1.5), (b16(0xBE00),)),
    ("cvt.rn.bf16.f32", b16(0x3F80), (f32(1 + 2**-8),)),
    ("cvt.rn.bf16.f32", b16(0x3F82), (f32(1 + 3 * 2**-8),)),
    ("cvt.rn.bf16.f32", b16(0x7FFF), (F32_NAN,)),
    ("cvt.rn.bf16.f32", b16(0x7F80), (b32(0x7F7FFFFF),)),
    ("cvt.rz.bf16.f32", b16(0x7F7F), (b32(0x7F7FFFFF),)),
    ("cvt.rn.bf16x2.f32", b32(0x40003F80), (f32(2), f32(1))),
    ("cvt.rn.f16x2.f32", b32(0x40003C00), (f32(2), f32(1))),
    ("cvt.rn.relu.bf16x2.f32", b32(0x40000000), (f32(2), f32(-1))),
    ("cvt.rna.tf32.f32", f32(1 + 2**-10), (f32(1 + 2**-11),)),
    # half precision
    ("add.f16", b16(0x4200), (b16(0x3C00), b16(0x4000))),
    ("mul.bf16", b16(0x4040), (b16(0x3FC0), b16(0x4000))),
    ("fma.rn.f16", b16(0x0010), (b16(0x3C01), b16(0x3C01), b16(0xBC02))),
    ("fma.rn.bf16x2", b32(0x40403F80), (b32(0x3F803F80), b32(0x40003F80), b32(0x3F800000))),
    ("max.f16x2", b32(0x40003C00), (b32(0x40000000), b32(0x3C003C00))),
    ("neg.bf16x2", b32(0xBF803F80), (b32(0x3F80BF80),)),
]


def scalar_kernel() -> str:
    """One kernel that stores the result of every case, 8 bytes each."""
    lines = [
        HEADER,
        ".visible .entry cases(.param .u64 out) {",
        ".reg .b64 %out; ld.param.u64 %out, [out]; cvta.to.global.u64 %out, %out;",
    ]
    for i, (text, result, operands) in enumerate(CASES):
        # A result of 8 bits lies in a register of 16 or 32.
        lines.append(f"{{ .reg .pred %p, %q; .reg .b32 %t; .reg .b{result.width} %d;")
        for j, operand in enumerate(operands):
            lines.append(
                f".reg .b{operand.width} %i{j}; mov.b{operand.width} %i{j}, {operand.value};"
            )
        names = [f"%i{j}" for j in range(len(operands))]
        if ";" in text:
            lines.append(text.format(*names, d="%d"))
        else:
            lines.append(f"{text} {', '.join(['%d', *names])};")
        lines.append(f"st.global.b{result.width} [%out+{8 * i}], %d; }}")
    return "\n".join([*lines, "ret; }"])


@pytest.fixture(scope="module")
def results() -> np.ndarray:
    emulator = Emulator(build_ptx(scalar_kernel()))
    out = np.zeros(len(CASES), np.uint64)
    assert emulator.run("cases", ctypes.c_uint64(out.ctypes.data), block=1) == 0
    return out


@pytest.mark.parametrize(
    "index",
    range(len(CASES)),
    ids=[f"{i}-{text.split()[0]}" for i, (text, _, _) in enumerate(CASES)],
)
def test_instruction(results: np.ndarray, index: int) -> None:
    text, expected, operands = CASES[index]
    assert hex(int(results[index])) == hex(expected.value), (text, operands)


# What is refused


@pytest.mark.parametrize(
    ("instruction", "reason"),
    [
        ("frobnicate.b32 %r0, %r1", "unknown instruction"),
        ("wgmma.fence.sync.aligned", "unknown instruction"),
        ("add.rn.f32x2 %d0, %d1, %d2", "expected one of"),
        ("add.rn.sideways.f32 %f0, %f1, %f2", "sideways"),
        ("add.rz.f16 %h0, %h1, %h2", "only .rn"),
        ("fma.f32 %f0, %f1, %f2, %f3", "rounding mode"),
        ("cvt.f32.f64 %f0, %d0", "needs a rounding mode"),
        ("cvt.rn.f64.f32 %d0, %f0", "exact"),
        ("cvt.rn.satfinite.e4m3x2.f32 %h0, %f0, %f1", "expected one of"),
        ("cvt.rzi.f32.s32 %f0, %r0", "rounding mode"),
        ("sqrt.approx.f64 %d0, %d1", "expected one of"),
        ("ex2.approx.ftz.f64 %d0, %d1", "expected one of"),
        ("max.xorsign.abs.f32 %f0, %f1, %f2", "xorsign"),
        ("setp.lo.f32 %p0, %f0, %f1", "integers"),
        ("ld.global.b128 %d0, [%d1]", "expected one of"),
        ("ld.global.L3::maybe.b32 %r0, [%d1]", "L3::maybe"),
        ("atom.global.frob.b32 %r0, [%d1], %r1", "expected one of"),
        ("cp.async.cg.shared.global [%r0], [%d0], 8", "does not copy 8 bytes"),
        ("cp.async.bulk.commit_group", "expected one of"),
        ("bar.sync.sometimes 0", "sometimes"),
        ("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r0}, {%r1}, {%r2}, {%r3}", "m16n8k32"),
        ("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r0}, {%r1}, {%r2}, {%r3}", "f16"),
        ("call (%r0), vprintf, (%d0, %d1)", "printf"),
        ("add.s32 %r0, %r1, %nonsense", "unknown operand"),
        ("add.f32 %f0, %f1, %d0, %d1", "operands"),
    ],
)
def test_the_unknown_stops_the_translation(instruction: str, reason: str) -> None:
    registers = (
        ".reg .pred %p<2>; .reg .b16 %h<4>; .reg .b32 %r<4>; .reg .f32 %f<4>; .reg .b64 %d<4>;"
    )
    text = f"{HEADER}.visible .entry k() {{\n{registers}\n{instruction};\nret; }}"
    with pytest.raises(PtxError) as error:
        build_ptx(text)
    message = str(error.value)
    assert instruction in message
    assert ".ptx:6: " in message
    assert reason in message


# Matrices: formulas from the PTX manual, "Warp Level Matrix Multiply-Accumulate Instructions"


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def a_places(lane: int, shape: str) -> list[tuple[int, int]]:
    """(row, column) of elements a0, a1, .. of a lane."""
    group, thread = lane >> 2, lane % 4
    if shape == "m16n8k16":
        rows = [group if i < 2 or 4 <= i < 6 else group + 8 for i in range(8)]
        columns = [thread * 2 + (i & 1) + (8 if i >= 4 else 0) for i in range(8)]
    elif shape == "m16n8k8":
        rows = [group if i < 2 else group + 8 for i in range(4)]
        columns = [thread * 2 + (i & 1) for i in range(4)]
    else:  # m16n8k8 of tf32
        rows = [group if i in (0, 2) else group + 8 for i in range(4)]
        columns = [thread if i < 2 else thread + 4 for i in range(4)]
    return list(zip(rows, columns, strict=True))


def b_places(lane: int, shape: str) -> list[tuple[int, int]]:
    group, thread = lane >> 2, lane % 4
    if shape == "m16n8k16":
        return [(thread * 2 + (i & 1) + (8 if i >= 2 else 0), group) for i in range(4)]
    if shape == "m16n8k8":
        return [(thread * 2 + i, group) for i in range(2)]
    return [(thread + 4 * i, group) for i in range(2)]


def c_places(lane: int) -> list[tuple[int, int]]:
    group, thread = lane >> 2, lane % 4
    return [(group if i < 2 else group + 8, thread * 2 + (i & 1)) for i in range(4)]


MATRIX_KINDS = {
    "bf16": ("m16n8k16", "m16n8k16", 16),
    "f16": ("m16n8k16", "m16n8k16", 16),
    "bf16-k8": ("m16n8k8", "m16n8k8", 8),
    "f16-k8": ("m16n8k8", "m16n8k8", 8),
    "tf32": ("m16n8k8", "tf32", 8),
}


def matrix_kernels() -> str:
    """Each lane loads its fragments from a[lane][..], b[lane][..], c[lane][..]."""
    text = HEADER
    for kind, (shape, layout, _) in MATRIX_KINDS.items():
        element = kind.split("-")[0]
        per_register = 1 if element == "tf32" else 2
        a, b = len(a_places(0, layout)) // per_register, len(b_places(0, layout)) // per_register
        loads = "".join(
            f"mad.wide.u32 %p{n}, %lane, {4 * count}, %p{n};"
            + "".join(f"ld.global.b32 %{n}{i}, [%p{n}+{4 * i}];" for i in range(count))
            for n, count in (("a", a), ("b", b), ("c", 4))
        )
        names = {n: ", ".join(f"%{n}{i}" for i in range(k)) for n, k in (("a", a), ("b", b))}
        c, d = ", ".join(f"%c{i}" for i in range(4)), ", ".join(f"%d{i}" for i in range(4))
        text += (
            f".visible .entry mma_{kind.replace('-', '_')}(.param .u64 a, .param .u64 b, "
            ".param .u64 c, .param .u64 d) {\n"
            ".reg .b32 %lane, %a<8>, %b<4>; .reg .f32 %c<4>, %d<4>; .reg .b64 %pa, %pb, %pc, %pd;\n"
            "ld.param.u64 %pa, [a]; ld.param.u64 %pb, [b]; ld.param.u64 %pc, [c];\n"
            f"ld.param.u64 %pd, [d]; mov.u32 %lane, %tid.x; {loads}\n"
            f"mma.sync.aligned.{shape}.row.col.f32.{element}.{element}.f32 "
            f"{{{d}}}, {{{names['a']}}}, {{{names['b']}}}, {{{c}}};\n"
            "mad.wide.u32 %pd, %lane, 16, %pd;\n"
            "st.global.v4.f32 [%pd], {%d0, %d1, %d2, %d3};\nret; }\n"
        )
    for count in (1, 2, 4):
        for trans in ("", ".trans"):
            registers = ", ".join(f"%m{i}" for i in range(count))
            stores = "".join(f"st.global.b32 [%out+{4 * i}], %m{i};" for i in range(count))
            text += (
                f".visible .entry ldmatrix_x{count}{trans.replace('.', '_')}(.param .u64 out) {{\n"
                ".shared .align 16 .b8 tile[512];\n"
                ".reg .b32 %lane, %at, %m<4>, %v; .reg .b64 %out;\n"
                "ld.param.u64 %out, [out]; mov.u32 %lane, %tid.x; mov.u32 %at, tile;\n"
                # row r holds 8 r, 8 r + 1, .. and lies where lane r says: at 16 r
                "mad.lo.u32 %at, %lane, 16, %at; mul.lo.u32 %v, %lane, 0x00080008;"
                "add.u32 %v, %v, 0x00010000; st.shared.b32 [%at], %v;"
                "add.u32 %v, %v, 0x00020002; st.shared.b32 [%at+4], %v;"
                "add.u32 %v, %v, 0x00020002; st.shared.b32 [%at+8], %v;"
                "add.u32 %v, %v, 0x00020002; st.shared.b32 [%at+12], %v; bar.warp.sync -1;\n"
                f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [%at];\n"
                f"mad.wide.u32 %out, %lane, {4 * count}, %out; {stores} ret; }}\n"
            )
    text += (
        ".visible .entry movmatrix(.param .u64 out) {\n"
        ".reg .b32 %lane, %v; .reg .b64 %out; ld.param.u64 %out, [out]; mov.u32 %lane, %tid.x;\n"
        "mul.lo.u32 %v, %lane, 0x00020002; add.u32 %v, %v, 0x00010000;"
        "movmatrix.sync.aligned.m8n8.trans.b16 %v, %v;\n"
        "mad.wide.u32 %out, %lane, 4, %out; st.global.b32 [%out], %v; ret; }\n"
    )
    return text


@pytest.fixture(scope="module")
def matrices() -> Emulator:
    return Emulator(build_ptx(matrix_kernels()))


def address(array: np.ndarray) -> ctypes.c_uint64:
    return ctypes.c_uint64(array.ctypes.data)


@pytest.mark.parametrize("kind", MATRIX_KINDS)
def test_mma(matrices: Emulator, kind: str) -> None:
    _, layout, depth = MATRIX_KINDS[kind]
    random = np.random.default_rng(0)
    # Small integers: exact in every format, and any two elements differ enough to tell them apart.
    a = random.integers(-30, 30, (16, depth)).astype(np.float32)
    b = random.integers(-30, 30, (depth, 8)).astype(np.float32)
    c = random.integers(-1000, 1000, (16, 8)).astype(np.float32)
    encode = {
        "bf16": to_bfloat16,
        "f16": lambda x: x.astype(np.float16).view(np.uint16),
        "tf32": lambda x: x.view(np.uint32),
    }[kind.split("-")[0]]

    def fragments(matrix: np.ndarray, places: list[list[tuple[int, int]]]) -> np.ndarray:
        return np.array([[matrix[place] for place in lane] for lane in places])

    lanes = range(32)
    a_fragments = fragments(encode(a), [a_places(lane, layout) for lane in lanes])
    b_fragments = fragments(encode(b), [b_places(lane, layout) for lane in lanes])
    c_fragments = fragments(c, [c_places(lane) for lane in lanes])
    d = np.zeros((32, 4), np.float32)
    name = f"mma_{kind.replace('-', '_')}"
    assert matrices.run(name, *map(address, (a_fragments, b_fragments, c_fragments, d))) == 0
    assert (d == fragments(a @ b + c, [c_places(lane) for lane in lanes])).all()


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(matrices: Emulator, count: int, transposed: bool) -> None:
    out = np.zeros((32, count, 2), np.uint16)
    assert matrices.run(f"ldmatrix_x{count}{'_trans' * transposed}", address(out)) == 0
    tiles = np.arange(count * 64).reshape(count, 8, 8)
    if transposed:
        tiles = tiles.transpose(0, 2, 1)
    for lane in range(32):
        expected = tiles[:, lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2]
        assert (out[lane] == expected).all()


def test_movmatrix(matrices: Emulator) -> None:
    out = np.zeros((32, 2), np.uint16)
    assert matrices.run("movmatrix", address(out)) == 0
    assert (out.reshape(8, 8) == np.arange(64).reshape(8, 8).T).all()


# CUDA C++: what threads do together, and what goes wrong

SOURCE = (Path(__file__).parent / "emulator" / "samples.cu").read_text(encoding="utf-8")
SUCCESS, INVALID_VALUE, INVALID_CONFIGURATION, ILLEGAL_ADDRESS = 0, 1, 9, 700
INVALID_HANDLE, OUT_OF_RESOURCES, MISALIGNED, LAUNCH_FAILURE = 400, 701, 716, 719


@pytest.fixture(scope="module")
def library() -> Path:
    if find_nvcc() is None:
        pytest.skip("needs nvcc, see tests/cuda/emulator/build.py")
    return build_cuda(SOURCE)


@pytest.fixture
def emulator(library: Path) -> Emulator:
    emulator = Emulator(library)
    emulator.configure()
    emulator.clear_errors()
    emulator.clear_launches()
    return emulator


def launch(emulator: Emulator, name: str, *arguments: object) -> int:
    values = [ctypes.c_void_p(x.ctypes.data) if isinstance(x, np.ndarray) else x for x in arguments]
    return int(getattr(emulator.library, f"launch_{name}")(*values))


ORDERS = [("forward", 1), ("reverse", 1), ("random", 1), ("random", 2)]


@pytest.mark.slow
@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_warp_functions(emulator: Emulator, order: str, seed: int) -> None:
    out = np.zeros((32, 10), np.uint32)
    with emulator.configured(order, seed):  # type: ignore[arg-type]
        assert launch(emulator, "warp_functions", out) == SUCCESS
    for i, row in enumerate(out):
        assert row[0] == (i - 3 if i % 8 >= 3 else i)
        assert row[1] == (i + 3 if i % 16 < 13 else i)
        assert row[2] == i ^ 5
        assert row[3] == i // 16 * 16 + (i + 9) % 16
        assert row[4] == sum(1 << j for j in range(0, 32, 3))
        assert row[5] == 1 + 4
        assert row[6] == 0x11111111 << i % 4
        assert row[7] == 31 * 16
        assert row[8] == 31
        assert row[9] == (i ^ 1 if i < 8 else i ^ 2)


@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_block_functions(emulator: Emulator, order: str, seed: int) -> None:
    out = np.zeros(96, np.int32)
    with emulator.configured(order, seed):  # type: ignore[arg-type]
        assert launch(emulator, "block_functions", out) == SUCCESS
    assert (out == 32 + 1000 + 10000).all()


def test_atomics(emulator: Emulator) -> None:
    out = np.zeros(4, np.int32)
    assert launch(emulator, "atomics", out) == SUCCESS
    assert list(out[:3]) == [2 * 63 * 32, 63, 1]
    assert out.view(np.float32)[3] == 64


def test_order_of_threads(emulator: Emulator) -> None:
    orders = {}
    for order, seed in ORDERS:
        out = np.zeros(65, np.int32)
        with emulator.configured(order, seed):  # type: ignore[arg-type]
            assert launch(emulator, "thread_order", out) == SUCCESS
        orders[order, seed] = list(out[:64])
        assert sorted(out[:64]) == list(range(64))
    assert orders["forward", 1] == list(range(64))
    assert orders["reverse", 1] == list(range(63, -1, -1))
    assert len({tuple(order) for order in orders.values()}) == 4


def test_double_functions(emulator: Emulator) -> None:
    """Code that nvcc takes from libdevice, with calls of functions."""
    x = np.array([0.3, -1.7, 3.5, 1e-3, -20, 1e6, 123456789.0, 1e-300])
    out = np.zeros((len(x), 8))
    assert launch(emulator, "double_functions", x, out, len(x)) == SUCCESS
    absolute = np.abs(x)
    with np.errstate(over="ignore"):
        expected = [np.exp2(x), np.log2(absolute), np.exp(x), 1 / x, np.sqrt(absolute), np.sin(x)]
    expected += [2 * x, absolute**0.3]
    np.testing.assert_allclose(out, np.stack(expected, 1), rtol=1e-15, atol=0)


def test_big_parameter(emulator: Emulator) -> None:
    numbers = np.arange(150) * 10**12
    out = np.zeros(150, np.int64)
    assert launch(emulator, "big_parameter", numbers, out) == SUCCESS
    assert (out == numbers).all()


@pytest.mark.parametrize("source_bytes", [16, 8, 5, 0])
def test_copies_arrive_when_waited_for(emulator: Emulator, source_bytes: int) -> None:
    data = np.arange(1, 129, dtype=np.int32) * 0x01010101
    out = np.zeros(192, np.int32)
    assert launch(emulator, "copies", data, out, source_bytes) == SUCCESS
    assert (out[:32] == -1).all()  # NaN, until the copy is waited for
    expected = data.copy().view(np.uint8).reshape(32, 16)
    expected[:, source_bytes:] = 0
    # The second copy has overwritten the first element's place with what reads as NaN; the first
    # one, which is waited for, puts its own bytes there.
    assert (out[32:160].view(np.uint8).reshape(32, 16) == expected).all()
    assert (out[160:] == data[0]).all()


FAULTS = {
    "no_barrier": ("nothing orders", "st.shared"),
    "no_syncwarp": ("nothing orders", "st.shared"),
    "write_after_read": ("nothing orders this write after the read", "st.shared"),
    "race_of_blocks": ("nothing orders", "st.global"),
    "read_of_another_block": ("nothing orders", "ld.global"),
    "no_wait": ("cp.async has not delivered", "ld.shared"),
    "uninitialised": ("nobody has written", "ld.shared"),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_races(emulator: Emulator, name: str, order: str, seed: int) -> None:
    data = np.ones(256, np.float32)
    with emulator.configured(order, seed, mode="race"):  # type: ignore[arg-type]
        assert launch(emulator, name, data) == LAUNCH_FAILURE
    assert emulator.errors > 0
    assert FAULTS[name][0] in emulator.last_message
    assert name in emulator.last_message
    assert "source.cu:" in emulator.last_message


@pytest.mark.parametrize("name", ["barrier", "syncwarp", "blocks_apart", "blocks_atomic"])
def test_no_race(emulator: Emulator, name: str) -> None:
    data = np.ones(256, np.float32)
    with emulator.configured(mode="race"):
        assert launch(emulator, name, data) == SUCCESS
    assert emulator.errors == 0


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("misaligned", MISALIGNED, "misaligned access of 16 bytes"),
        ("beyond_shared", ILLEGAL_ADDRESS, "shared memory byte 256 of 256"),
        ("divergent_barrier", LAUNCH_FAILURE, "divergent barrier"),
        ("divergent_shuffle", LAUNCH_FAILURE, "left the kernel"),
        ("missing_warp", LAUNCH_FAILURE, "deadlock"),
        ("null_pointer", ILLEGAL_ADDRESS, "at 0x8"),
        ("trapped", LAUNCH_FAILURE, "trap"),
    ],
)
def test_errors(emulator: Emulator, name: str, status: int, message: str) -> None:
    data = np.ones(256, np.float32)
    assert launch(emulator, name, data) == status
    assert message in emulator.last_message
    assert name in emulator.last_message
    assert "source.cu:" in emulator.last_message
    assert emulator.errors == 1
    # One failed launch leaves the next one alone.
    assert launch(emulator, "barrier", data) == SUCCESS


def test_uninitialised_shared_memory_is_nan(emulator: Emulator) -> None:
    data = np.ones(256, np.float32)
    assert launch(emulator, "uninitialised", data) == SUCCESS
    assert list(np.flatnonzero(np.isnan(data))) == [63]


def test_end_of_a_shared_array(emulator: Emulator) -> None:
    data = np.ones(256, np.float32)
    with emulator.configured(mode="race"):
        assert launch(emulator, "beyond_array", data, 0) == SUCCESS
        assert launch(emulator, "beyond_array", data, 1) == ILLEGAL_ADDRESS
    assert "beyond an array" in emulator.last_message


ADDRESS_SCRIPT = """
import sys
from emulator.device import Emulator
import numpy as np, test_emulator
emulator = Emulator(sys.argv[1])
emulator.configure(mode="address")
print(test_emulator.launch(emulator, "beyond_global", np.ones(65, np.float32)), emulator.errors)
print(test_emulator.launch(emulator, "beyond_global", np.ones(64, np.float32)), emulator.errors)
print(emulator.last_message)
"""


@pytest.mark.slow
def test_address_sanitizer(library: Path) -> None:
    """One element past an allocation of exactly 64 floats."""
    compiler = os.environ.get("CXX", "g++")
    runtime = subprocess.run(
        [compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, encoding="utf-8"
    ).stdout.strip()
    if not os.path.isabs(runtime):
        pytest.skip(f"{compiler} has no libasan.so")
    environment = {
        **os.environ,
        "LD_PRELOAD": os.path.realpath(runtime),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    command = [sys.executable, "-c", ADDRESS_SCRIPT, str(library)]
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, encoding="utf-8"
    )
    lines = result.stdout.splitlines()
    assert lines[:2] == [f"{SUCCESS} 0", f"{ILLEGAL_ADDRESS} 1"], result.stdout + result.stderr
    assert "access beyond an allocation of 4 bytes" in lines[2]
    assert "thread (63, 0, 0)" in lines[3]


def test_address_mode_needs_the_sanitizer(emulator: Emulator) -> None:
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("it is loaded")
    with emulator.configured(mode="address"):
        assert launch(emulator, "blocks_apart", np.ones(256, np.float32)) == ILLEGAL_ADDRESS
    assert "LD_PRELOAD" in emulator.last_message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "status"),
    [
        ((1, 64, 256, 0), SUCCESS),
        ((1, 1024, 4096, 0), SUCCESS),
        ((1, 1025, 8192, 0), INVALID_CONFIGURATION),
        ((1, 0, 256, 0), INVALID_CONFIGURATION),
        ((0, 64, 256, 0), INVALID_CONFIGURATION),
        ((65536, 64, 256, 0), INVALID_CONFIGURATION),
        ((1, 64, 48 << 10, 0), SUCCESS),
        ((1, 64, (48 << 10) + 4, 0), INVALID_VALUE),
        ((1, 64, 163 << 10, 163 << 10), SUCCESS),
        ((1, 64, 100 << 10, 99 << 10), INVALID_VALUE),
        ((1, 64, 256, (163 << 10) + 1), INVALID_VALUE),
    ],
)
def test_limits_of_a_launch(library: Path, sizes: tuple[int, ...], status: int) -> None:
    # What cudaFuncSetAttribute allows stays for the process: each case has one of its own.
    script = (
        "import sys, numpy as np, test_emulator; from emulator.device import Emulator; "
        "out = np.zeros(4, np.float32); "
        f"print(test_emulator.launch(Emulator(sys.argv[1]), 'sized', out, *{sizes}))"
    )
    command = [sys.executable, "-c", script, str(library)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, encoding="utf-8"
    )
    assert result.stdout.strip() == str(status), result.stderr


def test_launch_bounds(emulator: Emulator) -> None:
    data = np.zeros(4, np.float32)
    assert launch(emulator, "bounded", data, 64) == SUCCESS
    assert launch(emulator, "bounded", data, 96) == OUT_OF_RESOURCES
    assert emulator.library.last_error() == SUCCESS


def test_devices_and_streams(emulator: Emulator) -> None:
    emulator.library.stream_of.restype = ctypes.c_void_p
    stream = emulator.library.stream_of(1)
    data = np.zeros(64, np.float32)
    assert launch(emulator, "on", data, 1, ctypes.c_void_p(stream)) == SUCCESS
    assert launch(emulator, "on", data, 0, ctypes.c_void_p(stream)) == INVALID_HANDLE
    first, second = emulator.launches()
    assert (first.device, first.stream, first.status) == (1, stream, SUCCESS)
    assert (second.device, second.status) == (0, INVALID_HANDLE)
    assert "barrier" in first.kernel
    assert (first.grid, first.block, first.shared_bytes) == ((1, 1, 1), (64, 1, 1), 0)


def test_bank_conflicts_and_sectors(emulator: Emulator) -> None:
    emulator.clear_trace()
    memory = np.zeros(256 + 32, np.float32)
    sector = -memory.ctypes.data % 128 // 4
    with emulator.configured(mode="trace"):
        assert launch(emulator, "column_access", memory[sector : sector + 256]) == SUCCESS
    counts = {(c.space, c.access): c for c in emulator.trace() if c.access == "read"}
    # a column of 32 rows of 32 floats: all in one bank
    assert (counts["shared", "read"].requests, counts["shared", "read"].cost) == (1, 32)
    stores = [c for c in emulator.trace() if (c.space, c.access) == ("shared", "write")]
    assert sum(c.requests for c in stores) == sum(c.cost for c in stores) == 32
    costs = sorted(c.cost for c in emulator.trace() if c.space == "global")
    assert costs == [4, 32]  # 128 bytes in a row; one float of every 32 bytes


def test_executed_instructions() -> None:
    """Lane l goes round the loop l % 4 + 1 times, so that its warp does so 4 times."""
    text = (
        HEADER
        + """
.visible .entry loop(.param .u64 to)
{
 .reg .b32 %r<3>; .reg .f32 %f<2>; .reg .pred %p; .reg .b64 %rd<2>;
 .shared .align 8 .b8 place[8];
 ld.param.u64 %rd0, [to];
 cvta.to.global.u64 %rd1, %rd0;
 mov.u32 %r0, %tid.x;
 and.b32 %r1, %r0, 3;
 mov.f32 %f0, 0f3F800000;
again:
 ex2.approx.ftz.f32 %f1, %f0;
 st.shared.v2.f32 [place], {%f1, %f1};
 sub.s32 %r1, %r1, 1;
 setp.ge.s32 %p, %r1, 0;
 @%p bra again;
 shfl.sync.bfly.b32 %r2, %r0, 1, 31, -1;
 st.global.u32 [%rd1], %r2;
 ret;
}
"""
    )
    emulator = Emulator(build_ptx(text))
    emulator.clear_executed()
    out = np.zeros(1, np.uint32)
    with emulator.configured(mode="count"):
        address = ctypes.c_uint64(out.ctypes.data)
        assert emulator.run("loop", address, grid=3, block=64) == SUCCESS
    warps, loops = 3 * 2, 4
    kernel = parse(write(cache() / "ptx" / f"{digest(text)}.ptx", text)).functions["loop"]
    counted = emulator.executed()
    assert work(kernel, counted["loop"]) == {
        "all": warps * (1 + loops * 5 + 3),
        "special": warps * loops,
        "shuffle": warps,
        "shared": warps * loops * 2,  # 256 bytes each
        "global": warps,
    }
    assert emulator.run("loop", address, grid=3, block=64) == SUCCESS
    assert emulator.executed() == counted  # mode plain counts nothing
