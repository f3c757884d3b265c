"""Builds CUDA sources, or PTX, for the emulator. Objects are cached by the hash of what goes in,
not of where it lies: checkouts share them.

python -m emulator.build        # the extension module; prints its path
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from .translate import translate_module

ROOT = Path(__file__).resolve().parents[3]
SOURCES = ROOT / "csrc"
RUNTIME = Path(__file__).resolve().parent / "runtime"


class BuildError(Exception):
    """A compiler failed, or is not there; the message says which and how."""


def cache() -> Path:
    """EMULATOR_CACHE, or a folder among the temporary files."""
    default = Path(tempfile.gettempdir()) / f"setformer-emulator-{os.getuid()}"
    return Path(os.environ.get("EMULATOR_CACHE") or default)


@functools.cache
def find_nvcc() -> Path | None:
    """CUDA_HOME's or CUDA_PATH's nvcc, one on PATH, PyPI's nvidia-cuda-nvcc, /usr/local/cuda's."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            nvcc = Path(os.environ[variable]) / "bin" / "nvcc"
            if nvcc.exists():
                return nvcc
    on_path = shutil.which("nvcc")
    if on_path:
        return Path(on_path)
    for folder in map(Path, sys.path):
        found = sorted(folder.glob("nvidia/cu*/bin/nvcc"))
        if found:
            return found[-1]
    usual = Path("/usr/local/cuda/bin/nvcc")
    return usual if usual.exists() else None


def nvcc() -> Path:
    found = find_nvcc()
    if found is None:
        raise BuildError(
            "the emulator needs nvcc: set CUDA_HOME, or pip install nvidia-cuda-nvcc nvidia-nvvm "
            "nvidia-cuda-crt nvidia-cuda-runtime nvidia-cuda-cccl, all of one release"
        )
    return found


@functools.cache
def host_compiler() -> str:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not compiler:
        raise BuildError("the emulator needs a C++20 compiler: set CXX")
    return compiler


@functools.cache
def processor_flags() -> tuple[str, ...]:
    """Fused multiply-add as an instruction, where the processor has it."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return ()
    return ("-mavx2", "-mfma") if {"avx2", "fma"} <= flags else ()


def run(command: Sequence[str | Path]) -> None:
    words = [str(word) for word in command]
    result = subprocess.run(words, capture_output=True, text=True, encoding="utf-8")
    if result.returncode:
        output = result.stdout + result.stderr
        raise BuildError(f"{' '.join(words)}\nfailed with status {result.returncode}:\n{output}")


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def included(source: Path, folders: Sequence[Path], seen: dict[Path, str]) -> dict[Path, str]:
    """The text of a source and of all that it includes by a name in quotes."""
    if source in seen:
        return seen
    seen[source] = source.read_text(encoding="utf-8")
    for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', seen[source], re.MULTILINE):
        for folder in (source.parent, *folders):
            path = (folder / name).resolve()
            if path.exists():
                included(path, folders, seen)
                break
    return seen


def source_digest(source: Path, folders: Sequence[Path], *flags: object) -> str:
    texts = list(included(source.resolve(), folders, {}).values())
    return digest(source.name, texts, flags)


@functools.cache
def kernel_compiler() -> str:
    """clang++ where there is one: it compiles long functions in a tenth of g++'s time."""
    return os.environ.get("EMULATOR_CXX") or shutil.which("clang++") or host_compiler()


def part_of(target: Path) -> Path:
    """Where a file is written before it takes its name: each thread has its own."""
    return target.with_suffix(f".{os.getpid()}-{threading.get_ident()}{target.suffix}")


def compile_cpp(
    source: Path, flags: Sequence[str], folders: Sequence[Path], compiler: str = ""
) -> Path:
    """An object of a C++ source; of others' headers (-isystem) a flag has to tell the release."""
    command = [compiler or host_compiler(), "-fPIC", *flags]
    known = [word for word in command if not word.startswith("-isystem")]
    target = cache() / "objects" / f"{source_digest(source, folders, known)}.o"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = part_of(target)
        run([*command, *(f"-I{folder}" for folder in folders), "-c", source, "-o", part])
        part.replace(target)
    return target


RUNTIME_FLAGS = (
    "-std=c++20",
    "-O2",
    "-g1",
    "-Wall",
    "-Wextra",
    "-fvisibility=hidden",
    "-ffp-contract=off",
)
# Translated kernels are long functions, compiled anew with every change and run for milliseconds.
KERNEL_FLAGS = (
    "-std=c++20", "-O0", "-fvisibility=hidden", "-ffp-contract=off", "-fwrapv",
    "-fno-strict-aliasing", "-w",
)  # fmt: skip


def write(path: Path, text: str) -> Path:
    """A file with that text; one that has it already keeps its time."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = part_of(path)
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    return path


def runtime_objects(architecture: int, with_cudart: bool) -> list[Path]:
    objects = []
    for source in sorted(RUNTIME.glob("*.cpp")):
        flags = (*RUNTIME_FLAGS, *processor_flags())
        folders = [RUNTIME]
        if source.name == "cudart.cpp":
            if not with_cudart:
                continue
            flags += (f"-DEMULATED_CAPABILITY={architecture}", f"-isystem{cuda_include()}")
            flags += (f'-DEMULATED_HEADERS="{cuda_include()}"',)
        objects.append(compile_cpp(source, flags, folders))
    return objects


@functools.cache
def cuda_include() -> Path:
    """The folder of cuda_runtime_api.h, asked from nvcc, which may be a wrapper."""
    command = [str(nvcc()), "--dryrun", "-x", "cu", "-c", "/dev/null", "-o", "/dev/null"]
    output = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    for folder in re.findall(r'"?-I([^"\s]+)"?', output.stdout + output.stderr):
        if (Path(folder) / "cuda_runtime_api.h").exists():
            return Path(folder)
    raise BuildError(f"{' '.join(command)} names no folder with cuda_runtime_api.h")


@functools.cache
def translator_digest() -> str:
    sources = sorted(Path(__file__).resolve().parent.glob("*.py"))
    return digest([source.read_text(encoding="utf-8") for source in sources])


def translated_sources(ptx: Path) -> list[Path]:
    """C++ of the kernels of a PTX file. Ten seconds for all kernels, hence kept as well: a list of
    files' names."""
    folder = cache() / "translated"
    key = digest(ptx.name, ptx.read_text(encoding="utf-8"), translator_digest())
    names = folder / f"{ptx.stem}-{key}.txt"
    if not names.exists():
        written = []
        for name, text in translate_module(ptx).items():
            written.append(write(folder / f"{Path(name).stem}-{digest(text)}.cpp", text).name)
        write(names, "\n".join(written))
    return [folder / name for name in names.read_text(encoding="utf-8").split()]


def compile_translated(sources: Sequence[Path]) -> list[Path]:
    flags = (*KERNEL_FLAGS, *processor_flags())
    return parallel(lambda path: compile_cpp(path, flags, [RUNTIME], kernel_compiler()), sources)


def translate_and_compile(ptx: Path) -> list[Path]:
    """Objects of the kernels of a PTX file."""
    return compile_translated(translated_sources(ptx))


def most_jobs() -> int:
    return int(os.environ.get("MAX_JOBS") or 2)


Input = TypeVar("Input")
Output = TypeVar("Output")


def parallel(function: Callable[[Input], Output], inputs: Iterable[Input]) -> list[Output]:
    with ThreadPoolExecutor(most_jobs()) as pool:
        return list(pool.map(function, inputs))


def compile_cuda(source: Path, architecture: int, folders: Sequence[Path]) -> tuple[Path, Path]:
    """nvcc's host object and PTX of a CUDA source; the PTX names sources as they lie in folders."""
    flags = [
        "-std=c++17", "-O3", "-lineinfo", "--expt-relaxed-constexpr",
        f"-arch=compute_{architecture}", "-cudart", "none",
        "-Xcompiler", "-fPIC,-fvisibility=hidden",
    ]  # fmt: skip
    key = source_digest(source, folders, flags, str(nvcc()))
    target = cache() / "cuda" / f"{source.stem}-{key}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=target.parent))
        includes = [f"-I{folder}" for folder in folders]
        kept = part / "kept"
        kept.mkdir()
        command: list[str | Path] = [nvcc(), *flags, *includes, "--keep", "--keep-dir", kept]
        run([*command, "-c", source, "-o", part / "host.o"])
        text = next(kept.glob("*.ptx")).read_text(encoding="utf-8")
        for folder in (*folders, source.parent):
            text = text.replace(f'"{folder}/', '"')
        (part / f"{source.stem}.ptx").write_text(text, encoding="utf-8")
        shutil.rmtree(kept)
        try:
            part.rename(target)
        except OSError:  # another process was faster
            shutil.rmtree(part)
    return target / "host.o", target / f"{source.stem}.ptx"


def compile_kernels(source: Path, architecture: int, sources: Path) -> tuple[Path, Path]:
    """compile_cuda() of a source of csrc/cuda/, with clusters where their source is compiled."""
    newer = "_cluster_" in source.name and architecture >= 80  # as in CMakeLists.txt
    return compile_cuda(source, 90 if newer else architecture, [sources])


def link(objects: Sequence[Path], name: str, extra: Sequence[str] = ()) -> Path:
    """A shared library. Its symbols are its own, whatever else the process has loaded."""
    target = cache() / "libraries" / digest(objects, extra) / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = part_of(target)
        flags = ["-shared", "-Wl,-Bsymbolic", "-Wl,-z,defs", *extra]
        run([host_compiler(), "-o", part, *objects, *flags])
        part.replace(target)
    return target


def build_ptx(text: str) -> Path:
    """A library of the kernels of a PTX module, without nvcc and without a host object."""
    ptx = write(cache() / "ptx" / f"{digest(text)}.ptx", text)
    return link([*translate_and_compile(ptx), *runtime_objects(80, with_cudart=False)], "libptx.so")


def build_cuda(text: str, architecture: int = 80) -> Path:
    """A library of one CUDA source: its kernels and its functions declared extern "C" with
    default visibility, which launch them."""
    source = write(cache() / "sources" / digest(text) / "source.cu", text)
    host, ptx = compile_cuda(source, architecture, [SOURCES])
    objects = [host, *translate_and_compile(ptx)]
    return link([*objects, *runtime_objects(architecture, with_cudart=True)], "libcuda_source.so")


def extension_objects(sources: Path) -> list[Path]:
    """Everything of the extension module that is not CUDA."""
    import pybind11

    cpu = sources / "cpu"
    generated = cache() / "generated"
    facts = (sources / "build_facts.h.in").read_text(encoding="utf-8")
    answers = {
        "PROJECT_VERSION": "emulated", "SETFORMER_INSTRUCTION_SETS": "baseline",
        "SETFORMER_CUDA_DECISION": "compiled for the emulator", "CMAKE_BUILD_TYPE": "Emulated",
    }  # fmt: skip
    facts = re.sub(r"@(\w+)@", lambda match: answers.get(match[1], ""), facts)
    write(generated / "build_facts.h", facts)
    python = sysconfig.get_paths()["include"]
    common = (
        "-std=c++17", "-fopenmp", "-fno-math-errno", "-fvisibility=hidden", "-DSETFORMER_NVTX=0",
        "-DSETFORMER_HAVE_BASELINE", "-DSETFORMER_EMULATED_DEVICE", "-DNDEBUG",
        f"-isystem{pybind11.get_include()}", f"-isystem{python}",
        f'-DEMULATED_HEADERS="pybind11 {pybind11.__version__}, Python {platform.python_version()}"',
    )  # fmt: skip
    jobs = [
        (sources / "bindings.cpp", ("-O1",)),
        (sources / "build_info.cpp", ("-O1",)),
        (sources / "sequences.cpp", ("-O1",)),
        (sources / "cuda" / "knobs.cpp", ("-O1",)),
        (cpu / "dispatch.cpp", ("-O1",)),
        (cpu / "kernels.cpp", ("-O1", "-DSETFORMER_ISA=baseline")),
    ]
    return parallel(lambda job: compile_cpp(job[0], (*common, *job[1]), [sources, generated]), jobs)


def build_extension(architecture: int = 80, sources: Path = SOURCES) -> Path:
    """The module _C with the kernels of `sources`, a copy of csrc/ with changes or csrc/ itself.

    Raises: BuildError, PtxError.
    """
    objects = extension_objects(sources)
    cuda = sorted((sources / "cuda").glob("*.cu"))
    for host, ptx in parallel(lambda path: compile_kernels(path, architecture, sources), cuda):
        objects += [host, *translate_and_compile(ptx)]
    objects += runtime_objects(architecture, with_cudart=True)
    name = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    return link(objects, name, ["-fopenmp", "-ldl", "-Wl,-z,undefs"])


def load(path: Path) -> ModuleType:
    """The extension module at that path; each path is a module of its own: pybind11 gives the one
    that it has of a name."""
    spec = importlib.util.spec_from_file_location(f"emulated_{digest(str(path))}._C", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def emulated_library(architecture: int = 80) -> Path:
    """build_extension(); of several processes that ask for it one builds.

    Raises: BuildError, PtxError.
    """
    cache().mkdir(parents=True, exist_ok=True)
    with (cache() / "lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return build_extension(architecture)


@functools.cache
def emulated_module(architecture: int = 80) -> ModuleType:
    """The extension module whose CUDA devices are emulated; builds it first.

    Raises: BuildError, PtxError.
    """
    return load(emulated_library(architecture))


if __name__ == "__main__":
    print(emulated_library())
