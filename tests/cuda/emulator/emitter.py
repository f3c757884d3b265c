"""What every instruction's translation uses: its modifiers, taken one by one, and its operands.

A translation takes the modifiers it honours; one that nobody took stops the translation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from .ptx import SIZES, Instruction, PtxError, Variable

# An instruction looks at a register's bits as a value of its own type.
CPP_TYPES = {
    "b8": "uint8_t", "u8": "uint8_t", "s8": "int8_t",
    "b16": "uint16_t", "u16": "uint16_t", "s16": "int16_t", "f16": "Half", "bf16": "Bfloat16",
    "b32": "uint32_t", "u32": "uint32_t", "s32": "int32_t", "f32": "float",
    "f16x2": "Pair<Half>", "bf16x2": "Pair<Bfloat16>",
    "b64": "uint64_t", "u64": "uint64_t", "s64": "int64_t", "f64": "double",
    "pred": "bool",
}  # fmt: skip

FLOATS = ("f32", "f64")


def register_type(type_: str) -> str:
    """Of C++: what nvcc declares as floating point is mostly used as such, the rest are bits."""
    return CPP_TYPES[type_ if type_ in (*FLOATS, "pred") else f"b{8 * SIZES[type_]}"]


def is_integer(type_: str) -> bool:
    return type_[0] in "us" or (type_[0] == "b" and not type_.startswith("bf"))


SPECIAL_REGISTERS = {
    **{f"%{name}.{axis}": f"thread.{name}.{axis}" for name in ("tid", "ctaid") for axis in "xyz"},
    **{
        f"%{name}.{axis}": f"thread.launch.{field}.{axis}"
        for name, field in (("ntid", "block"), ("nctaid", "grid"))
        for axis in "xyz"
    },
    "%cluster_ctarank": "thread.rank",
    "%cluster_ctaid.x": "thread.rank",
    "%cluster_nctarank": "thread.launch.ranks",
    "%cluster_nctaid.x": "thread.launch.ranks",
    "%clusterid.x": "(thread.ctaid.x / thread.launch.ranks)",
    "%nclusterid.x": "(thread.launch.grid.x / thread.launch.ranks)",
    "%laneid": "thread.lane",
    "%warpid": "thread.warp",
    "%lanemask_eq": "(1u << thread.lane)",
    "%lanemask_lt": "((1u << thread.lane) - 1)",
    "%lanemask_le": "((2u << thread.lane) - 1)",
    "%lanemask_gt": "~((2u << thread.lane) - 1)",
    "%lanemask_ge": "~((1u << thread.lane) - 1)",
    "%dynamic_smem_size": "thread.launch.dynamic_shared_bytes",
    "%clock": "uint32_t(clock_ticks())",
    "%clock64": "clock_ticks()",
    "WARP_SZ": "32u",
}


class Names:
    """What a name means inside a function."""

    def __init__(self) -> None:
        self.registers: dict[str, str] = {}  # PTX name to type
        self.addresses: dict[str, tuple[str, str]] = {}  # variable to space and C++ address
        self.parameters: dict[str, Variable] = {}
        self.branch_targets: dict[str, list[str]] = {}
        self.functions: dict[str, str] = {}  # .func to C++ name


def register_name(name: str) -> str:
    return "r_" + re.sub(r"\W", "_", name.lstrip("%"))


def label_name(name: str) -> str:
    return "label_" + re.sub(r"\W", "_", name)


class Emitter:
    """One instruction on its way to C++."""

    def __init__(self, instruction: Instruction, names: Names, site: str) -> None:
        self.instruction = instruction
        self.names = names
        self.site = site
        self.modifiers = list(instruction.modifiers)
        self.operands = instruction.operands

    def error(self, message: str) -> PtxError:
        return PtxError(message)

    # Modifiers

    def take(self, *allowed: str) -> str:
        """The first modifier where it is one of these, which is thereby honoured; else ''."""
        if self.modifiers and self.modifiers[0] in allowed:
            return self.modifiers.pop(0)
        return ""

    def need(self, *allowed: str) -> str:
        found = self.take(*allowed)
        if not found:
            got = "." + self.modifiers[0] if self.modifiers else "nothing"
            raise self.error(f"expected one of .{', .'.join(allowed)}, got {got}")
        return found

    def skip(self, *allowed: str) -> None:
        """Modifiers that change no value: cache hints, scopes."""
        while self.take(*allowed):
            pass

    def type(self, *allowed: str) -> str:
        return self.need(*allowed)

    def finish(self) -> None:
        if self.modifiers:
            raise self.error(f"modifier .{self.modifiers[0]} is not translated here")

    # Operands

    def count(self, *allowed: int) -> None:
        if len(self.operands) not in allowed:
            raise self.error(f"expected {allowed} operands, got {len(self.operands)}")

    def value(self, index: int, type_: str) -> str:
        """C++ for operand `index`, seen as a value of that type."""
        return self.read(self.operands[index], type_)

    def read(self, operand: str, type_: str) -> str:
        if type_ == "pred":
            if operand.startswith("!"):
                return "!" + self.read(operand[1:], type_)
            if operand in ("0", "1", "-1"):  # constants
                return "false" if operand == "0" else "true"
            if self.names.registers.get(operand) != "pred":
                raise self.error(f"expected a predicate, got {operand}")
            return register_name(operand)
        cpp = CPP_TYPES[type_]
        if operand in self.names.registers:
            declared = self.names.registers[operand]
            if declared == "pred" or SIZES[declared] < SIZES[type_]:
                raise self.error(f"register {operand} is .{declared}, expected .{type_}")
            name = register_name(operand)
            if register_type(declared) == cpp:
                return name
            if is_integer(type_) and declared not in FLOATS:
                return f"{cpp}({name})"
            if SIZES[declared] == SIZES[type_]:
                return f"__builtin_bit_cast({cpp}, {name})"  # a template would compile for longer
            return f"as<{cpp}>({name})"
        if operand in SPECIAL_REGISTERS:
            return f"{cpp}({SPECIAL_REGISTERS[operand]})"
        number = re.fullmatch(r"0([fFdD])([0-9a-fA-F]+)", operand)
        if number:
            width = 4 if number[1] in "fF" else 8
            if len(number[2]) != 2 * width or SIZES[type_] != width:
                raise self.error(f"{operand} is no .{type_}")
            return f"__builtin_bit_cast({cpp}, 0x{number[2]}{'u' if width == 4 else 'ull'})"
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", operand):
            if type_[0] == "f" or type_.startswith("bf"):
                raise self.error(f"integer {operand} where .{type_} is expected")
            value = int(operand.rstrip("U"), 0) & (1 << 8 * SIZES[type_]) - 1
            return f"{cpp}({value:#x}u{'ll' if value >> 32 else ''})"
        if operand in self.names.addresses:
            return f"{cpp}(uint64_t({self.names.addresses[operand][1]}))"
        raise self.error(f"unknown operand {operand}")

    def assign(self, operand: str, expression: str, type_: str = "") -> str:
        """Stores into a register; a narrower integer is extended by its own sign. `type_` is the
        expression's, where the caller knows it: shorter C++ compiles in less time."""
        if operand == "_":
            return f"(void)({expression});"
        if operand not in self.names.registers:
            raise self.error(f"unknown register {operand}")
        name, declared = register_name(operand), self.names.registers[operand]
        if declared in FLOATS and type_ != declared:
            if type_ and SIZES[type_] == SIZES[declared]:
                return f"{name} = __builtin_bit_cast({register_type(declared)}, {expression});"
            return f"{name} = as<{register_type(declared)}>(bits({expression}));"
        if declared in (*FLOATS, "pred") or (type_ and is_integer(type_)):
            return f"{name} = {expression};"
        return f"{name} = bits({expression});"

    def result(self, expression: str, type_: str = "") -> str:
        return self.assign(self.operands[0], expression, type_)

    def vector(self, index: int) -> list[str]:
        """The registers of `{a, b}`, or the one register."""
        operand = self.operands[index]
        if operand.startswith("{"):
            return [part.strip() for part in operand[1:-1].split(",")]
        return [operand]

    def address(self, index: int) -> tuple[str, str, str]:
        """Space ('' where only the instruction knows), base and offset of `[base+offset]`."""
        match = re.fullmatch(
            r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?(?:0[xX])?[0-9a-fA-F]+))?\s*\]", self.operands[index]
        )
        if match is None:
            raise self.error(f"unknown address {self.operands[index]}")
        base, offset = match[1], match[2] or "0"
        if base in self.names.registers:
            wide = self.names.registers[base].endswith("64")
            return "", self.read(base, "b64" if wide else "b32"), offset
        if base in self.names.addresses:
            space, address = self.names.addresses[base]
            return space, address, offset
        raise self.error(f"unknown address {self.operands[index]}")


Translation = Callable[[Emitter], str]
TRANSLATIONS: dict[str, Translation] = {}


def translates(*names: str) -> Callable[[Translation], Translation]:
    def register(translation: Translation) -> Translation:
        for name in names:
            TRANSLATIONS[name] = translation
        return translation

    return register


def translate(instruction: Instruction, names: Names, site: str) -> str:
    """The C++ statement of an instruction. Raises: PtxError."""
    translation = TRANSLATIONS.get(instruction.name)
    if translation is None:
        raise PtxError("unknown instruction")
    emitter = Emitter(instruction, names, site)
    code = translation(emitter)
    emitter.finish()
    return code


def comma(parts: Sequence[str]) -> str:
    return ", ".join(parts)
