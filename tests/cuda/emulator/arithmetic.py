"""Instructions that compute from registers: integers, floating point, bits, comparisons."""

from __future__ import annotations

from .emitter import CPP_TYPES, FLOATS, Emitter, comma, translates
from .ptx import SIZES

INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
HALVES = ("f16", "bf16", "f16x2", "bf16x2")
ROUNDINGS = {
    "rn": "Rounding::nearest",
    "rz": "Rounding::zero",
    "rm": "Rounding::down",
    "rp": "Rounding::up",
}


def float_call(e: Emitter, function: str, type_: str, ftz: bool, sat: bool, inputs: int) -> str:
    """function(inputs): .ftz flushes subnormal inputs and results, .sat clamps to [0, 1]."""
    values = [e.value(i + 1, type_) for i in range(inputs)]
    if ftz:
        values = [f"ftz({value})" for value in values]
    call = f"{function}({comma(values)})"
    if ftz:
        call = f"ftz({call})"
    return e.result(f"saturate({call})" if sat else call, type_)


def float_arithmetic(e: Emitter, inputs: int) -> str:
    """add, sub, mul and fma of floating point."""
    name = e.instruction.name
    rounding = ROUNDINGS[e.take(*ROUNDINGS) or "rn"]
    ftz = bool(e.take("ftz"))
    sat = bool(e.take("sat"))
    type_ = e.type(*FLOATS, *HALVES)
    e.count(inputs + 1)
    if type_ in HALVES:
        if ftz or sat or rounding != "Rounding::nearest":
            raise e.error(f"only .rn is translated for .{type_}")
        return float_call(e, f"half_{name}", type_, False, False, inputs)
    if ftz and type_ == "f64":
        raise e.error(".ftz is not for .f64")
    if rounding == "Rounding::nearest" and not ftz and not sat:
        values = [e.value(i + 1, type_) for i in range(inputs)]
        if inputs == 2:
            operator = {"add": "+", "sub": "-", "mul": "*"}[name]
            return e.result(f"{values[0]} {operator} {values[1]}", type_)
        return e.result(f"__builtin_fma{'f' if type_ == 'f32' else ''}({comma(values)})", type_)
    return float_call(e, f"{name}<{rounding}>", type_, ftz, sat, inputs)


def is_float(e: Emitter) -> bool:
    return bool(e.modifiers) and e.modifiers[-1] in FLOATS + HALVES


def unsigned(type_: str) -> str:
    """Integer sums and low products wrap, which C++ says of unsigned types only."""
    return "u" + type_[1:]


@translates("add", "sub", "addc", "subc")
def add(e: Emitter) -> str:
    if is_float(e):
        return float_arithmetic(e, 2)
    name = e.instruction.name
    carry_out = bool(e.take("cc"))
    type_ = e.type(*INTEGERS)
    e.count(3)
    a, b = (e.value(i, unsigned(type_)) for i in (1, 2))
    if carry_out or name in ("addc", "subc"):
        carry_in = "carry" if name in ("addc", "subc") else "false"
        out = "carry" if carry_out else "no_carry"
        return e.result(f"{name[:3]}_with_carry({a}, {b}, {carry_in}, {out})")
    operator = "+" if name == "add" else "-"
    return e.result(f"{CPP_TYPES[unsigned(type_)]}({a} {operator} {b})", type_)


@translates("mul")
def mul(e: Emitter) -> str:
    if is_float(e):
        return float_arithmetic(e, 2)
    part = e.need("lo", "hi", "wide")
    type_ = e.type(*INTEGERS)
    e.count(3)
    a, b = (e.value(i, type_) for i in (1, 2))
    return e.result(product(part, type_, a, b), wide(type_) if part == "wide" else type_)


def wide(type_: str) -> str:
    return type_[0] + str(2 * int(type_[1:]))


def product(part: str, type_: str, a: str, b: str) -> str:
    if part == "wide" and type_ != "u64" and type_ != "s64":
        cpp = CPP_TYPES[wide(type_)]
        return f"({cpp}({a}) * {cpp}({b}))"
    return f"mul_{part}<{CPP_TYPES[type_]}>({a}, {b})"


@translates("mad", "madc")
def mad(e: Emitter) -> str:
    if is_float(e):
        return float_arithmetic(e, 3)
    part = e.need("lo", "hi", "wide")
    carry_out = bool(e.take("cc"))
    type_ = e.type(*INTEGERS)
    e.count(4)
    a, b = (e.value(i, type_) for i in (1, 2))
    sum_type = unsigned(wide(type_) if part == "wide" else type_)
    cpp = CPP_TYPES[sum_type]
    c = e.value(3, sum_type)
    multiplied = product(part, type_, a, b)
    carry_in = "carry" if e.instruction.name == "madc" else "false"
    if carry_out or carry_in == "carry":
        out = "carry" if carry_out else "no_carry"
        return e.result(f"add_with_carry({cpp}({multiplied}), {c}, {carry_in}, {out})")
    return e.result(f"{cpp}({cpp}({multiplied}) + {c})", sum_type)


@translates("fma")
def fma(e: Emitter) -> str:
    if e.modifiers[:1] not in (["rn"], ["rz"], ["rm"], ["rp"]):
        raise e.error("fma needs a rounding mode")
    return float_arithmetic(e, 3)


@translates("div", "rem")
def div(e: Emitter) -> str:
    name = e.instruction.name
    e.count(3)
    if not is_float(e):
        type_ = e.type(*INTEGERS)
        return e.result(f"integer_{name}({e.value(1, type_)}, {e.value(2, type_)})")
    if name == "rem":
        raise e.error("rem is for integers")
    method = e.need(*ROUNDINGS, "approx", "full")
    ftz = bool(e.take("ftz"))
    type_ = e.type("f32") if ftz or method in ("approx", "full") else e.type(*FLOATS)
    function = {"approx": "div_approx", "full": "div_full"}.get(method)
    return float_call(e, function or f"div<{ROUNDINGS[method]}>", type_, ftz, False, 2)


@translates("rcp", "sqrt", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh")
def function_of_one(e: Emitter) -> str:
    name = e.instruction.name
    e.count(2)
    method = e.need("approx", *(ROUNDINGS if name in ("rcp", "sqrt") else ()))
    ftz = bool(e.take("ftz"))
    if method != "approx":
        type_ = e.type("f32") if ftz else e.type(*FLOATS)
        return float_call(e, f"{name}<{ROUNDINGS[method]}>", type_, ftz, False, 1)
    if name in ("ex2", "tanh") and is_float(e) and e.modifiers[-1] in HALVES:
        return float_call(e, f"half_{name}", e.type(*HALVES), False, False, 1)
    if name in ("rcp", "rsqrt") and e.modifiers == ["f64"]:
        # rcp.approx.ftz.f64 sees and gives the upper 20 bits of the significand only.
        return e.result(f"{name}_approx_ftz({e.value(1, e.type('f64'))})" if ftz else _no_f64(e))
    return float_call(e, f"{name}_approx", e.type("f32"), ftz, False, 1)


def _no_f64(e: Emitter) -> str:
    raise e.error("the approximate form for .f64 is not translated")


@translates("min", "max")
def extremum(e: Emitter) -> str:
    name = e.instruction.name
    e.count(3)
    if not is_float(e):
        type_ = e.type(*INTEGERS)
        return e.result(f"std::{name}({e.value(1, type_)}, {e.value(2, type_)})")
    ftz = bool(e.take("ftz"))
    keep_nan = "true" if e.take("NaN") else "false"
    type_ = e.type(*FLOATS, *HALVES)
    if type_ in HALVES:
        if ftz:
            raise e.error(f".ftz is not translated for .{type_}")
        return float_call(e, f"half_{name}<{keep_nan}>", type_, False, False, 2)
    return float_call(e, f"float_{name}<{keep_nan}>", type_, ftz, False, 2)


@translates("abs", "neg")
def sign(e: Emitter) -> str:
    name = e.instruction.name
    e.count(2)
    if is_float(e):
        ftz = bool(e.take("ftz"))
        type_ = e.type("f32") if ftz else e.type(*FLOATS, *HALVES)
        prefix = "half" if type_ in HALVES else "float"
        return float_call(e, f"{prefix}_{name}", type_, ftz, False, 1)
    type_ = e.type("s16", "s32", "s64")
    return e.result(f"integer_{name}({e.value(1, type_)})")


@translates("copysign")
def copysign(e: Emitter) -> str:
    type_ = e.type(*FLOATS)
    e.count(3)
    return e.result(f"std::copysign({e.value(2, type_)}, {e.value(1, type_)})")


@translates("testp")
def testp(e: Emitter) -> str:
    kind = e.need("finite", "infinite", "number", "notanumber", "normal", "subnormal")
    type_ = e.type(*FLOATS)
    e.count(2)
    return e.result(f"is_{kind}({e.value(1, type_)})")


BITS = ("b16", "b32", "b64")


@translates("and", "or", "xor")
def logic(e: Emitter) -> str:
    type_ = e.type("pred", *BITS)
    e.count(3)
    operator = {"and": "&", "or": "|", "xor": "^"}[e.instruction.name]
    values = f"{e.value(1, type_)} {operator} {e.value(2, type_)}"
    return e.result(f"{CPP_TYPES[type_]}({values})", type_)


@translates("not")
def complement(e: Emitter) -> str:
    type_ = e.type("pred", *BITS)
    e.count(2)
    return e.result(f"{'!' if type_ == 'pred' else '~'}{e.value(1, type_)}", type_)


@translates("lop3")
def lop3(e: Emitter) -> str:
    e.type("b32")
    e.count(5)
    a, b, c, table = (e.value(i, "b32") for i in (1, 2, 3, 4))
    return e.result(f"lop3({a}, {b}, {c}, {table})")


@translates("shl", "shr")
def shift(e: Emitter) -> str:
    name = e.instruction.name
    type_ = e.type(*(BITS if name == "shl" else BITS + INTEGERS))
    e.count(3)
    by = e.operands[2]
    if by.isdigit() and int(by) < 8 * SIZES[type_]:
        operator = "<<" if name == "shl" else ">>"
        return e.result(f"{CPP_TYPES[type_]}({e.value(1, type_)} {operator} {by})", type_)
    return e.result(f"{name}({e.value(1, type_)}, {e.value(2, 'u32')})", type_)


@translates("shf")
def funnel_shift(e: Emitter) -> str:
    side, mode = e.need("l", "r"), e.need("wrap", "clamp")
    e.type("b32")
    e.count(4)
    low, high, by = (e.value(i, "b32") for i in (1, 2, 3))
    return e.result(f"funnel_shift_{side}({low}, {high}, {mode}_shift({by}))")


@translates("prmt")
def prmt(e: Emitter) -> str:
    e.type("b32")
    e.count(4)
    a, b, selection = (e.value(i, "b32") for i in (1, 2, 3))
    return e.result(f"prmt({a}, {b}, {selection})")


@translates("bfe")
def extract_field(e: Emitter) -> str:
    type_ = e.type("u32", "s32", "u64", "s64")
    e.count(4)
    return e.result(f"bfe({e.value(1, type_)}, {e.value(2, 'u32')}, {e.value(3, 'u32')})")


@translates("bfi")
def insert_field(e: Emitter) -> str:
    type_ = e.type("b32", "b64")
    e.count(5)
    values = [e.value(1, type_), e.value(2, type_), e.value(3, "u32"), e.value(4, "u32")]
    return e.result(f"bfi({comma(values)})")


@translates("popc", "clz", "brev")
def count_bits(e: Emitter) -> str:
    type_ = e.type("b32", "b64")
    e.count(2)
    return e.result(f"{e.instruction.name}({e.value(1, type_)})")


@translates("bfind")
def find_bit(e: Emitter) -> str:
    as_shift = "true" if e.take("shiftamt") else "false"
    type_ = e.type("u32", "s32", "u64", "s64")
    e.count(2)
    return e.result(f"bfind<{as_shift}>({e.value(1, type_)})")


@translates("selp")
def select(e: Emitter) -> str:
    type_ = e.type(*BITS, *INTEGERS, *FLOATS)
    e.count(4)
    values = f"{e.value(1, type_)} : {e.value(2, type_)}"
    return e.result(f"{e.value(3, 'pred')} ? {values}", type_)


@translates("slct")
def select_by_sign(e: Emitter) -> str:
    ftz = bool(e.take("ftz"))
    type_ = e.type(*BITS, *INTEGERS, *FLOATS)
    by = e.type("f32") if ftz else e.type("s32", "f32")
    e.count(4)
    c = f"ftz({e.value(3, by)})" if ftz else e.value(3, by)
    return e.result(f"{c} >= 0 ? {e.value(1, type_)} : {e.value(2, type_)}")


ORDERED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
ORDERED_UNSIGNED = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
FLOAT_COMPARISONS = (*ORDERED, *(name + "u" for name in ORDERED), "num", "nan")


@translates("setp")
def compare(e: Emitter) -> str:
    comparison = e.need(*FLOAT_COMPARISONS, *ORDERED_UNSIGNED)
    combine = e.take("and", "or", "xor")
    ftz = bool(e.take("ftz"))
    type_ = e.type("f32") if ftz else e.type(*BITS, *INTEGERS, *FLOATS, "f16", "bf16")
    e.count(4 if combine else 3)
    a, b = e.value(1, type_), e.value(2, type_)
    if ftz:
        a, b = f"ftz({a})", f"ftz({b})"
    if type_ in (*FLOATS, "f16", "bf16"):
        if comparison not in FLOAT_COMPARISONS:
            raise e.error(f".{comparison} is for integers")
        test = f"float_{comparison}({a}, {b})"
        if type_ in FLOATS and comparison in ("eq", "lt", "le", "gt", "ge"):
            test = f"({a} {ORDERED[comparison]} {b})"  # C++ compares as PTX's ordered forms do
    elif comparison in ORDERED and (type_[0] != "b" or comparison in ("eq", "ne")):
        test = f"({a} {ORDERED[comparison]} {b})"
    elif comparison in ORDERED_UNSIGNED and type_[0] == "u":
        test = f"({a} {ORDERED_UNSIGNED[comparison]} {b})"
    else:
        raise e.error(f".{comparison} is not for .{type_}")
    outputs = [name.strip() for name in e.operands[0].split("|")]
    operator = {"and": "&", "or": "|", "xor": "^", "": ""}[combine]
    other = f" {operator} {e.value(3, 'pred')}" if combine else ""
    if len(outputs) == 1:
        return e.assign(outputs[0], f"{test}{other}")
    # Both outputs are formed before either is written: the first may be an input of the second.
    tests = [f"bool({test}{other})", f"bool(!{test}{other})"]
    code = " ".join(f"const bool result_{i} = {test};" for i, test in enumerate(tests))
    stores = " ".join(e.assign(name, f"result_{i}") for i, name in enumerate(outputs))
    return f"{{ {code} {stores} }}"


@translates("cvt")
def convert(e: Emitter) -> str:
    """cvt{.rounding}{.ftz}{.relu}{.sat}.destination.source"""
    rounding = e.take(*ROUNDINGS, "rna", "rni", "rzi", "rmi", "rpi")
    ftz = bool(e.take("ftz"))
    relu = bool(e.take("relu"))
    sat = bool(e.take("sat"))
    all_types = tuple(t for t in SIZES if t[0] != "b" or t.startswith("bf"))
    to = e.type(*all_types, "tf32")
    source = e.type(*(t for t in all_types if not t.endswith("x2")))
    if to.endswith("x2"):
        e.count(3)
        if rounding not in ("rn", "rz") or source != "f32" or ftz or sat:
            raise e.error("only cvt.rn and cvt.rz from .f32, without .ftz and .sat, are translated")
        half, mode = CPP_TYPES[to[:-2]], ROUNDINGS[rounding]
        high, low = (f"to_half<{half}, {mode}>({e.value(i, 'f32')})" for i in (1, 2))
        if relu:
            high, low = f"relu({high})", f"relu({low})"
        return e.result(f"Pair<{half}>{{{low}, {high}}}")
    e.count(2)
    value = e.value(1, source)
    if relu:
        raise e.error(".relu is translated for pairs only")
    if to == "tf32":
        if rounding != "rna" or source != "f32" or ftz or sat:
            raise e.error("only cvt.rna.tf32.f32 is translated")
        return e.result(f"to_tf32({value})")
    if ftz and "f32" not in (to, source):
        raise e.error(".ftz needs .f32 on one side")
    if ftz and source == "f32":
        value = f"ftz({value})"
    converted = _convert_value(e, value, to, source, rounding, sat)
    return e.result(f"ftz({converted})" if ftz and to == "f32" else converted)


def _convert_value(e: Emitter, value: str, to: str, source: str, rounding: str, sat: bool) -> str:
    to_float, from_float = "f" in to, "f" in source
    cpp = CPP_TYPES[to]
    if not from_float and not to_float:
        if rounding:
            raise e.error("integers are not rounded")
        return f"{'clamp_integer' if sat else 'cast_integer'}<{cpp}>({value})"
    if not to_float:
        # Float to integer clamps to the integer's range with or without .sat.
        modes = {"rni": "nearest", "rzi": "zero", "rmi": "down", "rpi": "up"}
        if rounding not in modes:
            raise e.error("a conversion to an integer needs .rni, .rzi, .rmi or .rpi")
        return f"to_integer<{cpp}, Rounding::{modes[rounding]}>({value})"
    if not from_float:
        if rounding not in ROUNDINGS:
            raise e.error("a conversion from an integer needs a rounding mode")
        call = f"integer_to_float<{cpp}, {ROUNDINGS[rounding]}>({value})"
        return f"saturate({call})" if sat else call
    if to == source:
        modes = {"rni": "nearest", "rzi": "zero", "rmi": "down", "rpi": "up"}
        if rounding in ROUNDINGS:
            raise e.error("a conversion to the same type rounds to an integer only")
        call = f"round_to_integer<Rounding::{modes[rounding]}>({value})" if rounding else value
    elif SIZES[to] > SIZES[source]:
        if rounding:
            raise e.error("a widening conversion is exact")
        call = f"widen<{cpp}>({value})"
    else:
        if rounding not in ROUNDINGS:
            raise e.error("a narrowing conversion needs a rounding mode")
        call = f"narrow<{cpp}, {ROUNDINGS[rounding]}>({value})"
    return f"saturate({call})" if sat else call
