"""Reads what nvcc made of the kernels: resources and instruction counts, by cuobjdump."""

import os
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

# Columns of the table: name, opcodes (the first word of an instruction) that it counts.
INSTRUCTIONS = {
    "HMMA": re.compile(r"HMMA\."),  # mma.sync
    "LDSM": re.compile(r"LDSM\."),  # ldmatrix
    "LDGSTS": re.compile(r"LDGSTS\."),  # cp.async
    "LDG.128": re.compile(r"LDG\..*\b128\b"),
    "LDG": re.compile(r"LDG\."),  # all widths
    "LD": re.compile(r"LD\."),  # the compiler does not know of which memory
    "LDS": re.compile(r"LDS\b"),
    "MUFU": re.compile(r"MUFU\."),  # exp2, log2, reciprocal
    "FFMA": re.compile(r"FFMA\b|FFMA2\b"),
    "DFMA": re.compile(r"DFMA\b"),
    "BAR": re.compile(r"BAR\.SYNC"),
    "local": re.compile(r"STL\b|LDL\b"),  # spills, and arrays that did not fit registers
    "all": re.compile(r"(?!NOP\b)"),
}
INSTRUCTION = re.compile(
    r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@(?P<predicate>!?\w+)\s+)?(?P<opcode>[A-Z][\w.]*)"
)
NEVER = {"!PT", "!UPT"}  # sm_90 puts `@!PT LDS` before cp.async, which does nothing
RESERVED_FROM_90 = 1024  # of the driver; counted by the compiler as the kernel's own from sm_90 on


@dataclass(frozen=True)
class Kernel:
    """One kernel compiled for one architecture."""

    name: str  # short: no namespaces, no parameters
    arch: int
    ptxas: str  # release, "13.0.88"
    threads: int  # of __launch_bounds__; 0 where it has none
    registers: int
    shared: int  # static, bytes
    counts: dict[str, int]


def read_kernels(file: Path, architectures: list[int] | None = None) -> list[Kernel]:
    """All kernels of an object or a shared library; by default of all its architectures."""
    resources = parse_resources(_cuobjdump(file, "-res-usage"))
    found = sorted({arch for arch, _ in resources})
    if not found:
        return []
    # launch bounds are the same for every architecture, but none need have all kernels
    threads: dict[str, int] = {}
    for arch in found:
        of_arch, ptxas = parse_headers(_cuobjdump(file, "-elf", "-arch", f"sm_{arch}"))
        threads |= of_arch
    counts: dict[tuple[int, str], dict[str, int]] = {}
    for arch in found:
        if not architectures or arch in architectures:
            counts |= parse_instructions(_cuobjdump(file, "-sass", "-arch", f"sm_{arch}"))
    short = short_names({symbol for _, symbol in counts})
    return [
        Kernel(
            short[symbol],
            arch,
            ptxas,
            threads.get(symbol, 0),
            *resources[arch, symbol],
            counts[arch, symbol],
        )
        for arch, symbol in counts
    ]


Line = tuple[str, int]  # of the project's own sources


def line_of(file: str, line: int) -> Line:
    """Of the file's path what does not depend on where it was compiled."""
    return "/".join(os.path.normpath(file).split("/")[-2:]), line


def instructions_by_line(file: Path, architecture: int) -> dict[str, Counter[Line]]:
    """Symbol -> how many instructions come of each line of the source, for a shared library."""
    found: dict[str, Counter[Line]] = {}
    with TemporaryDirectory() as folder:
        extract = [find_tool("cuobjdump"), "-xelf", f"sm_{architecture}", str(file.resolve())]
        subprocess.run(extract, cwd=folder, check=True, capture_output=True)
        for cubin in sorted(Path(folder).glob("*.cubin")):
            command = [find_tool("nvdisasm"), "-c", "--print-line-info-inline", str(cubin)]
            listing = subprocess.run(
                command, capture_output=True, text=True, check=True, encoding="utf-8"
            )
            found |= parse_lines(listing.stdout.splitlines())
    return found


def parse_lines(lines: Iterable[str]) -> dict[str, Counter[Line]]:
    """Of `nvdisasm -c --print-line-info-inline`: symbol -> instructions of each line. What was
    inlined from CUDA's headers is of the line that calls it. Left out is what stands behind a
    kernel for the rare case: where a warp has diverged, or a quotient is no normal number."""
    found: dict[str, Counter[Line]] = {}
    places: list[Line] = []
    rare: set[str] = set()  # labels
    skipping = False
    for line in lines:
        if match := re.match(r"//-+ \.text\.(\S+) -", line):
            counter = found.setdefault(match[1], Counter())
            places, rare, skipping = [], set(), False
        elif match := re.match(r"(\S+):$", line):
            skipping = skipping or match[1] in rare
            if match[1].startswith("$__internal"):  # functions, behind all else
                counter = Counter()
        elif match := re.match(r"\s*//## File \"([^\"]+)\", line (\d+)( inlined)?", line):
            if not places or places[-1] == ("", 0):  # a new chain begins, innermost first
                places = []
            own = "/cuda/" in match[1].partition("csrc")[2]
            places.append(line_of(match[1], int(match[2])) if own else ("", -1))
            if not match[3]:
                places.append(("", 0))  # the chain's end
        elif (match := INSTRUCTION.match(line)) and match["predicate"] not in NEVER:
            opcode = match["opcode"]
            if opcode == "BRA.DIV":
                rare.update(re.findall(r"`\((\S+)\)", line))
            counter[next((place for place in places if place[0]), ("", 0))] += not (
                skipping or opcode.startswith("NOP")
            )
            if opcode == "BRA" and not match["predicate"]:
                skipping = False
    return found


def parse_resources(lines: Iterable[str]) -> dict[tuple[int, str], tuple[int, int]]:
    """Of `cuobjdump -res-usage`: (arch, symbol) -> registers, static shared memory."""
    found = {}
    for arch, line in _by_architecture(lines):
        if match := re.match(r"\s*Function (\S+):$", line):
            symbol = match[1]
        elif match := re.match(r"\s*REG:(\d+) .*?SHARED:(\d+) ", line):
            registers, shared = map(int, match.groups())
            own = shared - RESERVED_FROM_90 if arch >= 90 and shared else shared
            found[arch, symbol] = (registers, own)
    return found


def parse_headers(lines: Iterable[str]) -> tuple[dict[str, int], str]:
    """Of `cuobjdump -elf`: symbol -> threads of its __launch_bounds__, and the release of ptxas."""
    threads = {}
    symbol = release = ""
    lines = iter(lines)
    for line in lines:
        if line.startswith(".nv.info."):
            symbol = line.removeprefix(".nv.info.")
        elif "EIATTR_MAX_THREADS" in line:
            next(lines)  # the format
            x, y, z = re.findall(r"0x[0-9a-f]+", next(lines))
            threads[symbol] = int(x, 16) * int(y, 16) * int(z, 16)
        elif "Tool Version:" in line and not release:
            release = line.rpartition("V")[2]
    return threads, release


def parse_instructions(lines: Iterable[str]) -> dict[tuple[int, str], dict[str, int]]:
    """Of `cuobjdump -sass`: (arch, symbol) -> how many of each column of INSTRUCTIONS."""
    opcodes: dict[tuple[int, str], Counter[str]] = {}
    for arch, line in _by_architecture(lines):
        if match := re.match(r"\s*Function : (\S+)", line):
            counter = opcodes.setdefault((arch, match[1]), Counter())
        elif (match := INSTRUCTION.match(line)) and match["predicate"] not in NEVER:
            counter[match["opcode"]] += 1
    return {
        key: {
            name: sum(count for opcode, count in counter.items() if pattern.match(opcode))
            for name, pattern in INSTRUCTIONS.items()
        }
        for key, counter in opcodes.items()
    }


def short_names(symbols: set[str]) -> dict[str, str]:
    """Symbol -> `score_pass_kernel<__half, 64>`."""
    ordered = sorted(symbols)
    text = "\n".join(ordered)
    run = subprocess.run(
        ["c++filt"], input=text, capture_output=True, text=True, check=True, encoding="utf-8"
    )
    plain = run.stdout.splitlines()
    return {symbol: shorten(name) for symbol, name in zip(ordered, plain, strict=True)}


def shorten(name: str) -> str:
    """Drops return type, namespaces and parameters of a demangled function."""
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    name = re.sub(r"\b(?:\w+::)+", "", name)
    depth = 0
    for end, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:end]
    return name


def _by_architecture(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    arch = 0
    for line in lines:
        if match := re.match(r"arch = sm_(\d+)", line):
            arch = int(match[1])
        else:
            yield arch, line


def _cuobjdump(file: Path, *options: str) -> Iterator[str]:
    tool = find_tool("cuobjdump")
    # cuobjdump calls nvdisasm, which PyPI puts beside it
    environment = os.environ | {"PATH": f"{Path(tool).parent}:{os.environ['PATH']}"}
    command = [tool, *options, str(file)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environment,
        encoding="utf-8",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield line.rstrip("\n")
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed with status {process.returncode}")


def find_tool(name: str) -> str:
    """On PATH, or where the packages of PyPI put it."""
    site = Path(sysconfig.get_path("platlib"))
    packaged = sorted(str(folder) for folder in site.glob("nvidia/*/bin"))
    found = shutil.which(name) or shutil.which(name, path=":".join(packaged))
    if found is None:
        raise SystemExit(
            f"{name} was found neither on PATH nor in {site}/nvidia: install it with "
            "`pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`"
        )
    return found
