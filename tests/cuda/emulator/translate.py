"""Translates a PTX module into C++ for runtime/: one source file for each kernel.

python -m emulator.translate kernels.ptx folder
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from . import arithmetic, movement
from .counting import stretches
from .emitter import CPP_TYPES, Names, label_name, register_name, register_type, translate
from .ptx import (
    SIZES,
    BranchTargets,
    Function,
    Instruction,
    Label,
    Module,
    PtxError,
    Registers,
    Scope,
    Variable,
    parse,
)

# Importing these registers the translations of their instructions.
assert arithmetic
assert movement


def aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def cpp_name(name: str) -> str:
    return re.sub(r"\W", "_", name)


@dataclass
class Layout:
    """Offsets of variables one after the other."""

    offsets: dict[str, int]
    size: int = 0

    def add(self, variable: Variable, gap: int = 0) -> None:
        start = aligned(self.size + gap, max(variable.alignment, 1))
        self.offsets[variable.name] = start
        self.size = start + variable.size


# Between static shared arrays lie bytes that belong to none, so that running over the end of one
# is seen where it would otherwise reach the next.
GAP = 16


class FunctionTranslation:
    def __init__(self, module: Module, function: Function, path: Path) -> None:
        self.module = module
        self.function = function
        self.path = path
        self.names = Names()
        self.sites: list[tuple[str, int, str]] = []
        self.called: list[str] = []
        self.shared = Layout({})
        self.dynamic_shared_alignment = 0
        self.variables: list[str] = []  # module variables that the code names
        self.local: list[Variable] = []
        self.errors: list[str] = []

    def declare_outside(self) -> None:
        """Parameters, module variables and functions."""
        names = self.names
        parameters = Layout({})
        for variable in self.function.parameters:
            parameters.add(variable)
        self.parameters = parameters
        for variable in self.function.parameters:
            address = (
                f"(parameters + {parameters.offsets[variable.name]})"
                if self.function.is_entry
                else register_name(variable.name)
            )
            names.addresses[variable.name] = ("param", address)
        for variable in self.function.results:
            names.addresses[variable.name] = ("param", register_name(variable.name))
        words: set[str] = set()
        for statement in self.function.body:
            if isinstance(statement, Instruction):
                words.update(re.findall(r"[\w$]+", statement.text))
        for variable in self.module.variables.values():
            if variable.name not in words:
                continue
            if variable.space == "shared":
                self.declare_shared(variable)
            else:
                self.variables.append(variable.name)
                names.addresses[variable.name] = (
                    variable.space,
                    variable_name(variable, self.path),
                )
        for name, function in self.module.functions.items():
            if not function.is_entry:
                names.functions[name] = f"function_{cpp_name(name)}"
                if name in words:
                    self.called.append(name)

    def declare_shared(self, variable: Variable) -> None:
        if variable.count == 0:
            self.dynamic_shared_alignment = max(self.dynamic_shared_alignment, variable.alignment)
            self.names.addresses[variable.name] = ("shared", "kDynamicShared")
        else:
            self.shared.add(variable, GAP if self.shared.size else 0)
            offset = self.shared.offsets[variable.name]
            self.names.addresses[variable.name] = ("shared", f"{offset}u")

    def statements(self) -> list[str]:
        lines: list[str] = []
        firsts = {}
        if self.function.is_entry:
            for i, stretch in enumerate(stretches(self.function)):
                firsts[id(stretch[0])] = f"EMULATOR_COUNT({i}) "
        for statement in self.function.body:
            if isinstance(statement, BranchTargets):
                self.names.branch_targets[statement.name] = statement.labels
        for statement in self.function.body:
            if isinstance(statement, Instruction):
                lines.append(firsts.get(id(statement), "") + self.instruction(statement))
            elif isinstance(statement, Registers):
                lines.extend(self.registers(statement))
            elif isinstance(statement, Label):
                lines.append(f"{label_name(statement.name)}:;")
            elif isinstance(statement, Scope):
                lines.append("{" if statement.opens else "}")
            elif isinstance(statement, Variable):
                lines.extend(self.variable(statement))
        return lines

    def registers(self, statement: Registers) -> list[str]:
        type_ = register_type(statement.type)
        for name in statement.names:
            self.names.registers[name] = statement.type
        names = [register_name(name) for name in statement.names]
        return [
            f"[[maybe_unused]] {type_} {', '.join(names[i : i + 16])};"
            for i in range(0, len(names), 16)
        ]

    def variable(self, variable: Variable) -> list[str]:
        if variable.space == "shared":
            self.declare_shared(variable)
            return []
        name = register_name(variable.name)
        if variable.space in ("local", "param"):
            self.names.addresses[variable.name] = (variable.space, f"uint64_t({name})")
            if variable.space == "param":
                self.names.addresses[variable.name] = ("param", name)
            else:
                self.local.append(variable)
            alignment = max(variable.alignment, 8)
            return [f"alignas({alignment}) uint8_t {name}[{max(variable.size, 1)}];"]
        raise PtxError(f"{self.path}: {self.function.name}: .{variable.space} inside of a function")

    def instruction(self, instruction: Instruction) -> str:
        site = f"kSites[{len(self.sites)}]"
        try:
            code = translate(instruction, self.names, site)
            if site in code:
                self.sites.append((*instruction.source, instruction.text))
            if instruction.guard:
                guard = instruction.guard
                condition = register_name(guard.lstrip("!"))
                if self.names.registers.get(guard.lstrip("!")) != "pred":
                    raise PtxError(f"unknown predicate {guard}")
                code = f"if ({'!' if guard[0] == '!' else ''}{condition}) {{ {code} }}"
        except PtxError as error:
            source = f"{instruction.source[0]}:{instruction.source[1]}"
            self.errors.append(
                f"{self.path}:{instruction.line}: `{instruction.text}` (from {source}): {error}"
            )
            return ""
        return code

    def site_table(self) -> str:
        rows = [f"    {{{quote(file)}, {line}, {quote(text)}}}," for file, line, text in self.sites]
        return "\n".join(["static const Site kSites[] = {", *rows, '    {"", 0, ""},', "};"])


def quote(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def variable_name(variable: Variable, path: Path) -> str:
    return f"variable_{cpp_name(path.stem)}_{cpp_name(variable.name)}"


def variable_type(variable: Variable) -> str:
    type_ = CPP_TYPES["b" + str(8 * SIZES[variable.type])]
    return f"{type_} {{name}}[{max(variable.count, 1)}]"


def variable_definition(variable: Variable, path: Path) -> str:
    initial = variable.initial.strip("{} ")
    if re.search(r"[A-Za-z_$]", re.sub(r"0[xXfFdD][0-9a-fA-F]+", "", initial)):
        raise PtxError(f"{path}: initial value of {variable.name} is not translated: {initial}")
    values = re.sub(r"0[fFdD]([0-9a-fA-F]+)", r"0x\1", initial)
    declaration = variable_type(variable).format(name=variable_name(variable, path))
    signed = re.sub(r"-\d+", lambda match: f"({match[0]} & ~0ull)", values)
    return f'extern "C" {{ alignas({max(variable.alignment, 8)}) {declaration} = {{{signed}}}; }}'


def function_source(
    module: Module,
    name: str,
    path: Path,
    errors: list[str],
    seen: set[str],
    kernel: FunctionTranslation,
) -> str:
    """A device function and those that it calls, callees first, in the source of a kernel: dynamic
    shared memory starts where that kernel's does."""
    if name in seen:
        raise PtxError(f"{path}: {name} calls itself, which is not translated")
    seen.add(name)
    function = module.functions[name]
    translation = FunctionTranslation(module, function, path)
    translation.declare_outside()
    body = translation.statements()
    errors.extend(translation.errors)
    if translation.shared.size:
        raise PtxError(f"{path}: {name}: shared variables in a function are not translated")
    kernel.dynamic_shared_alignment = max(
        kernel.dynamic_shared_alignment, translation.dynamic_shared_alignment
    )
    places = [
        f"uint8_t* {register_name(v.name)}" for v in (*function.results, *function.parameters)
    ]
    callees = [
        function_source(module, called, path, errors, seen, kernel)
        for called in translation.called
        if called not in seen
    ]
    return "\n".join(
        [
            *callees,
            *external_variables(module, translation.variables, path),
            f"namespace in_{cpp_name(name)} {{",
            translation.site_table(),
            "}",
            f"[[maybe_unused]] static void function_{cpp_name(name)}(",
            f"    {', '.join(['Thread& thread', *places])}) {{",
            f"  using in_{cpp_name(name)}::kSites;",
            "  [[maybe_unused]] bool carry, no_carry;",
            *(f"  {line}" for line in body),
            "}",
        ]
    )


def external_variables(module: Module, names: list[str], path: Path) -> list[str]:
    lines = []
    for name in names:
        variable = module.variables[name]
        declaration = variable_type(variable).format(name=variable_name(variable, path))
        lines.append(f'extern "C" {declaration};')
    return lines


def kernel_source(
    module: Module, function: Function, path: Path, errors: list[str], number: int
) -> str:
    """A namespace of the kernel's own, so that several go into one file."""
    translation = FunctionTranslation(module, function, path)
    translation.declare_outside()
    body = translation.statements()
    errors.extend(translation.errors)
    seen: set[str] = set()
    callees = [
        function_source(module, called, path, errors, seen, translation)
        for called in translation.called
        if called not in seen
    ]
    sizes = ", ".join(
        f"{{{translation.parameters.offsets[p.name]}, {p.size}}}" for p in function.parameters
    )
    dynamic = aligned(
        translation.shared.size + (GAP if translation.shared.size else 0),
        max(translation.dynamic_shared_alignment, 16),
    )
    uses_dynamic = "true" if translation.dynamic_shared_alignment else "false"
    shared = [
        f"{{{offset}, {variable_size(translation, module, name)}}}"
        for name, offset in translation.shared.offsets.items()
    ]
    return "\n".join(
        [
            f"namespace emulator::kernel_{number} {{",
            f"static constexpr uint32_t kDynamicShared = {dynamic};",
            *callees,
            *external_variables(module, translation.variables, path),
            "namespace {",
            translation.site_table(),
            "void run(Thread& thread) {",
            "  [[maybe_unused]] bool carry, no_carry;",
            "  [[maybe_unused]] uint8_t* const parameters = thread.launch.parameters;",
            *(f"  {line}" for line in body),
            "}",
            f"const ParameterPlace kParameters[] = {{{sizes or '{0, 0}'}}};",
            f"const SharedArray kShared[] = {{{', '.join(shared) or '{0, 0}'}}};",
            "const Kernel kKernel{",
            f"    {quote(function.name)}, run, kParameters, {len(function.parameters)},",
            f"    {translation.parameters.size}, kShared, {len(shared)}, kDynamicShared,",
            f"    {uses_dynamic}, {function.most_threads}, {function.ranks}, {module.target}}};",
            "const RegisterKernel registered(kKernel);",
            "}  // namespace",
            f"}}  // namespace emulator::kernel_{number}",
        ]
    )


def variable_size(translation: FunctionTranslation, module: Module, name: str) -> int:
    if name in module.variables:
        return module.variables[name].size
    for statement in translation.function.body:
        if isinstance(statement, Variable) and statement.name == name:
            return statement.size
    raise KeyError(name)


LARGE = 200_000  # characters of C++


def translate_module(path: Path) -> dict[str, str]:
    """The kernels of a PTX file: C++ by file name.

    Raises: PtxError that lists every instruction it does not know.
    """
    module = parse(path)
    errors: list[str] = []
    kernels = [function for function in module.functions.values() if function.is_entry]
    # Small kernels share a file: reading the headers takes longer than they do.
    texts: list[str] = []
    for number, function in enumerate(kernels):
        text = kernel_source(module, function, path, errors, number)
        if texts and len(texts[-1]) + len(text) < LARGE:
            texts[-1] += "\n" + text
        else:
            texts.append(text)
    include = '#include "instructions.h"\n'
    sources = {f"{path.stem}_{i}.cpp": f"{include}{text}\n" for i, text in enumerate(texts)}
    variables = [v for v in module.variables.values() if v.space != "shared"]
    if variables:
        definitions = [variable_definition(variable, path) for variable in variables]
        sources[f"{path.stem}_variables.cpp"] = "\n".join(["#include <cstdint>", *definitions, ""])
    if errors:
        raise PtxError("\n".join(errors))
    return sources


def main() -> None:
    path, folder = Path(sys.argv[1]), Path(sys.argv[2])
    for name, source in translate_module(path).items():
        (folder / name).write_text(source, encoding="utf-8")


if __name__ == "__main__":
    main()
