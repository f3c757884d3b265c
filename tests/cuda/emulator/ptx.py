"""Reads the text of a PTX module, as nvcc writes it, into functions, variables and statements."""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

SIZES = {
    "b8": 1, "u8": 1, "s8": 1,
    "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2,
    "b32": 4, "u32": 4, "s32": 4, "f32": 4, "f16x2": 4, "bf16x2": 4,
    "b64": 8, "u64": 8, "s64": 8, "f64": 8,
}  # fmt: skip


class PtxError(Exception):
    """What the translation does not know; the message names file, line and instruction."""


@dataclass
class Variable:
    """A variable or parameter: `.shared .align 16 .b8 tile[4096]`."""

    space: str
    name: str
    type: str
    count: int  # elements; 0 for an array whose size the launch decides
    alignment: int
    initial: str = ""

    @property
    def size(self) -> int:
        return SIZES[self.type] * self.count


@dataclass
class Registers:
    """`.reg .b32 %r<4>;` declares %r0 to %r3."""

    type: str
    names: list[str]


@dataclass
class Label:
    name: str


@dataclass
class Scope:
    """A brace."""

    opens: bool


@dataclass
class BranchTargets:
    """`name: .branchtargets first, second;`, the table of a brx.idx."""

    name: str
    labels: list[str]


@dataclass
class Instruction:
    name: str  # "ld" of "ld.global.nc.v4.f32"
    modifiers: list[str]
    operands: list[str]
    guard: str  # the predicate after @, with its "!"; empty without
    text: str
    line: int  # of the PTX
    source: tuple[str, int]  # file and line of the CUDA source, from .loc


Statement = Variable | Registers | Label | Scope | BranchTargets | Instruction


@dataclass
class Function:
    name: str
    is_entry: bool
    results: list[Variable]
    parameters: list[Variable]
    body: list[Statement]
    most_threads: int = 0  # .maxntid; 0 where it is not given
    ranks: int = 0  # blocks of a cluster, side by side along x; 0 where it is not given


@dataclass
class Module:
    target: int = 80  # the compute capability: 80 for 8.0
    functions: dict[str, Function] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)


def split_operands(text: str) -> list[str]:
    """Splits at the commas that no bracket encloses."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        if character in "{[(":
            depth += 1
        elif character in "}])":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]


VARIABLE = re.compile(
    r"(?:\.(?:extern|visible|weak|common)\s+)*\.(?P<space>shared|local|global|const|param)\s+"
    r"(?:\.align\s+(?P<alignment>\d+)\s+)?\.(?P<type>[bus]\d+|b?f\d+)\s+"
    r"(?:\.ptr\s+(?:\.(?:global|shared|const|local)\s+)?(?:\.align\s+\d+\s+)?)?"
    r"(?P<name>[\w$%]+)\s*(?P<array>\[\s*(?P<count>\d*)\s*\])?\s*(?:=\s*(?P<initial>.*))?"
)
INSTRUCTION = re.compile(r"(?:@(?P<guard>!?\s*[\w$%]+)\s+)?(?P<opcode>[a-z][\w.:]*)\s*(?P<rest>.*)")


def parse_variable(text: str) -> Variable | None:
    match = VARIABLE.fullmatch(text)
    if match is None:
        return None
    count = 1
    if match["array"]:
        count = int(match["count"] or 0)
    return Variable(
        match["space"],
        match["name"],
        match["type"],
        count,
        int(match["alignment"] or SIZES[match["type"]]),
        match["initial"] or "",
    )


def register_names(text: str) -> Iterator[str]:
    for name in split_operands(text):
        numbered = re.fullmatch(r"([\w$%]+)<(\d+)>", name)
        if numbered:
            yield from (f"{numbered[1]}{i}" for i in range(int(numbered[2])))
        else:
            yield name


class Parser:
    def __init__(self, text: str, path: str) -> None:
        # Comments become blanks, so that positions keep telling the line.
        blank: Callable[[re.Match[str]], str] = lambda match: re.sub(r"[^\n]", " ", match[0])  # noqa: E731
        self.text = re.sub(r"//[^\n]*|/\*.*?\*/", blank, text, flags=re.DOTALL)
        self.path = path
        self.position = 0
        self.callers: dict[tuple[int, ...], tuple[int, ...]] = {}  # of inlined places
        self.line_ends = [match.start() for match in re.finditer("\n", self.text)]
        self.files = {
            int(number): name
            for number, name in re.findall(
                r'^\s*\.file\s+(\d+)\s+"([^"]*)"', self.text, re.MULTILINE
            )
        }

    def error(self, message: str) -> PtxError:
        return PtxError(f"{self.path}:{self.line()}: {message}")

    def line(self) -> int:
        return bisect.bisect_left(self.line_ends, self.position) + 1

    def skip_blanks(self) -> bool:
        """Moves to the next character that is none; False at the end."""
        match = re.compile(r"\S").search(self.text, self.position)
        self.position = match.start() if match else len(self.text)
        return match is not None

    def take(self, pattern: str) -> re.Match[str] | None:
        match = re.compile(pattern, re.DOTALL).match(self.text, self.position)
        if match:
            self.position = match.end()
        return match

    def take_until(self, end: str) -> str:
        """The text up to one of the characters `end` that no bracket encloses, which is skipped."""
        start, depth = self.position, 0
        for i in range(start, len(self.text)):
            character = self.text[i]
            if depth == 0 and character in end:
                self.position = i + 1
                return " ".join(self.text[start:i].split())
            if character in "{[(":
                depth += 1
            elif character in "}])":
                depth -= 1
        raise self.error(f"expected one of {end!r} before the end of the file")

    def module(self) -> Module:
        module = Module()
        while self.skip_blanks():
            target = self.take(r"\.target\s+sm_(\d+)[^\n]*")
            if target:
                module.target = int(target[1])
                continue
            if self.take(r"\.(version|target|address_size|file|loc)\b[^\n]*"):
                continue
            if self.take(r"\.section\s+[.\w]+\s*\{"):
                self.take_until("}")
                continue
            if re.match(
                r"(\.(visible|extern|weak)\s+)*\.(entry|func)\b", self.text[self.position :]
            ):
                function = self.function()
                if function:
                    module.functions[function.name] = function
                continue
            text = self.take_until(";")
            variable = parse_variable(text)
            if variable is None:
                raise self.error(f"unknown declaration: {text}")
            module.variables[variable.name] = variable
        return module

    def parameters(self) -> list[Variable]:
        """A list in parentheses, or nothing."""
        self.skip_blanks()
        if not self.take(r"\("):
            return []
        found = []
        for text in split_operands(self.take_until(")")):
            variable = parse_variable(text)
            if variable is None:
                raise self.error(f"unknown parameter: {text}")
            found.append(variable)
        return found

    def function(self) -> Function | None:
        """A kernel or device function; None for a declaration without a body."""
        kind = self.take(r"(?:\.(?:visible|extern|weak)\s+)*\.(entry|func)\b")
        assert kind
        results = self.parameters() if kind[1] == "func" else []
        self.skip_blanks()
        name = self.take(r"[\w$]+")
        if name is None:
            raise self.error("expected the name of a function")
        function = Function(name[0], kind[1] == "entry", results, self.parameters(), [])
        while self.skip_blanks():
            if self.take(r";"):
                return None
            if self.take(r"\{"):
                function.body = list(self.body())
                return function
            threads = self.take(r"\.maxntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?")
            if threads:
                x, y, z = (int(size or 1) for size in threads.groups())
                function.most_threads = x * y * z
                continue
            cluster = self.take(r"\.reqnctapercluster\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?")
            if cluster:
                x, y, z = (int(size or 1) for size in cluster.groups())
                if y * z != 1:
                    raise self.error("clusters lie along x")
                function.ranks = x
            elif not self.take(
                r"\.(minnctapersm|maxnreg|maxclusterrank)\s+\d+|\.(noreturn|explicitcluster)\b"
            ):
                raise self.error(f"unknown directive of a function: {self.take_until(chr(10))}")
        raise self.error(f"function {name[0]} has no end")

    def source_of(self, location: re.Match[str]) -> tuple[str, int]:
        """File and line of a .loc; of what was inlined from CUDA's own headers, the call's."""
        numbers = [int(number) for number in location.groups(default="0")]
        place, caller = tuple(numbers[:3]), tuple(numbers[3:])
        if caller[0]:
            self.callers[place] = caller
        visited = set()
        while self.files.get(place[0], "").startswith("/") and place not in visited:
            visited.add(place)
            place = self.callers.get(place, place)
        return self.files.get(place[0], self.path), place[1]

    def body(self) -> Iterator[Statement]:
        source = (self.path, 0)
        depth = 1
        while self.skip_blanks():
            if self.take(r"\{"):
                depth += 1
                yield Scope(opens=True)
                continue
            if self.take(r"\}"):
                depth -= 1
                if depth == 0:
                    return
                yield Scope(opens=False)
                continue
            location = self.take(
                r"\.loc\s+(\d+)\s+(\d+)\s+(\d+)(?:[^\n]*inlined_at\s+(\d+)\s+(\d+)\s+(\d+))?[^\n]*"
            )
            if location:
                source = self.source_of(location)
                continue
            label = self.take(r"([\w$]+)\s*:(?!:)")
            if label:
                self.skip_blanks()
                if self.take(r"\.branchtargets\b"):
                    yield BranchTargets(label[1], split_operands(self.take_until(";")))
                else:
                    yield Label(label[1])
                continue
            line = self.line()
            text = self.take_until(";")
            if not text or text.startswith(".pragma"):
                continue
            if text.startswith(".reg"):
                _, type_, names = text.split(maxsplit=2)
                yield Registers(type_[1:], list(register_names(names)))
                continue
            variable = parse_variable(text)
            if variable:
                yield variable
                continue
            match = INSTRUCTION.fullmatch(text)
            if match is None:
                raise self.error(f"unknown statement: {text}")
            # "::" joins the parts of one modifier: L2::128B
            name, *modifiers = match["opcode"].split(".")
            yield Instruction(
                name,
                modifiers,
                split_operands(match["rest"]),
                (match["guard"] or "").replace(" ", ""),
                text,
                line,
                source,
            )
        raise self.error("a function has no end")


def parse(path: Path) -> Module:
    """The module in a file.

    Raises: PtxError for what it does not know.
    """
    return Parser(path.read_text(encoding="utf-8"), str(path)).module()
