"""What the build takes from the environment, and what it leaves in the checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# How the variables begin that the build reads.
READ = ("SETFORMER_", "CUDA", "TORCH_CUDA_", "NVCC_", "CMAKE_", "CXX", "LDFLAGS", "MAX_JOBS")

needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")


def run(*command: object, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command with nothing but `environment` of what the build reads."""
    others = {name: value for name, value in os.environ.items() if not name.startswith(READ)}
    return subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=others | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


# The wheel of a small checkout, which has the package's own setup.py and pyproject.toml.


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    pytest.importorskip("scikit_build_core", reason="needs scikit-build-core")
    folder = tmp_path / "checkout"
    package = folder / "setformer_ext"
    package.mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("__init__.py", "kept.py", "deleted.py", "_C.cpython-27-other.so", "py.typed"):
        (package / name).touch()
    (folder / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.22)\n"
        "project(small NONE)\n"
        "file(WRITE ${PROJECT_BINARY_DIR}/_C.jobs $ENV{CMAKE_BUILD_PARALLEL_LEVEL})\n"
        "install(FILES ${PROJECT_BINARY_DIR}/_C.jobs DESTINATION setformer_ext)\n"
    )
    return folder


def build_wheel(checkout: Path, **environment: str) -> zipfile.ZipFile:
    folder = checkout.parent / "wheels"
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet", "--wheel-dir", folder]
    done = run(sys.executable, "-m", "pip", "wheel", *options, ".", folder=checkout, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.iterdir()
    return zipfile.ZipFile(wheel)


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file and folder: also what was written and taken away is seen."""
    paths = [folder, *folder.rglob("*")]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


@pytest.mark.slow
def test_a_build_writes_nothing_into_the_checkout_and_keeps_nothing(checkout: Path) -> None:
    before = state(checkout)
    first = build_wheel(checkout, MAX_JOBS="3")
    assert state(checkout) == before
    assert "setformer_ext/deleted.py" in first.namelist()
    assert first.read("setformer_ext/_C.jobs") == b"3"

    (checkout / "setformer_ext/deleted.py").unlink()
    second = build_wheel(checkout, MAX_JOBS="3", CMAKE_BUILD_PARALLEL_LEVEL="2")
    assert {name for name in second.namelist() if "dist-info" not in name} == {
        f"setformer_ext/{name}" for name in ("__init__.py", "kept.py", "py.typed", "_C.jobs")
    }
    assert second.read("setformer_ext/_C.jobs") == b"2"


def test_an_editable_install_adds_only_the_module_to_the_checkout(checkout: Path) -> None:
    before = set(state(checkout))
    code = "import scikit_build_core.setuptools.build_meta as b; b.build_editable('../editable')"
    (checkout.parent / "editable").mkdir()
    done = run(sys.executable, "-c", code, folder=checkout)
    assert done.returncode == 0, done.stderr
    assert set(state(checkout)) - before == {str(checkout / "setformer_ext/_C.jobs")}


@pytest.mark.parametrize("name", ["MAX_JOBS", "CMAKE_BUILD_PARALLEL_LEVEL"])
@pytest.mark.parametrize("value", ["abc", "0", "-1", "2.5", " ", "99999999999"])
def test_a_wrong_number_of_jobs_is_named(name: str, value: str) -> None:
    done = run(sys.executable, "setup.py", "--version", folder=ROOT, **{name: value})
    assert done.returncode != 0
    assert done.stderr.startswith(f"{name} must be the number of compilers")
    assert repr(value) in done.stderr
    assert "Traceback" not in done.stderr


# The decision about CUDA, with an nvcc of three architectures that compiles nothing.


@pytest.fixture
def nvcc(tmp_path: Path) -> Path:
    path = tmp_path / "bin" / "nvcc"
    path.parent.mkdir()
    path.write_text(
        "#!/bin/sh\n"
        'case "$NVCC_APPEND_FLAGS $*" in\n'
        "  *--list-gpu-arch) printf 'compute_75\\ncompute_80\\ncompute_90\\n' ;;\n"
        "  *-arch=native*) echo \"Cannot find valid GPU for '-arch=native'\" >&2 ;;\n"
        "  *compute_75,* | *compute_80,* | *compute_90,* | *compute_90a,*) ;;\n"
        "  *compute_* | *nonsense*) echo 'nvcc fatal: unsupported' >&2; exit 1 ;;\n"
        "esac\n"
    )
    path.chmod(0o755)
    return path


def decide(nvcc: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    script = nvcc.parent / "decide.cmake"
    script.write_text(
        "cmake_minimum_required(VERSION 3.22)\n"
        f'set(CMAKE_BINARY_DIR "{nvcc.parent}")\n'
        "set(CMAKE_CXX_COMPILER c++)\n"
        "function(enable_language)\nendfunction()\n"
        f"include({ROOT}/cmake/Choices.cmake)\n"
        f"include({ROOT}/cmake/Cuda.cmake)\n"
    )
    variables = {"CUDACXX": str(nvcc)} | environment
    done = run("cmake", "-P", script, folder=nvcc.parent, **variables)
    done.stderr = " ".join(done.stderr.split())
    return done


@needs_cmake
@pytest.mark.parametrize(
    ("architectures", "code", "cluster_code"),  # PTX of which, and what is made of it
    [
        (
            "75-real;80-real;90-real;120-real;120-virtual",
            "75>sm_75 80>sm_80 80>sm_90 80>sm_120 80>compute_80",
            "90>sm_90 90>compute_90",
        ),
        ("80", "80>sm_80 80>compute_80", "80>sm_80 80>compute_80"),  # without clusters
        ("75-real;120-real", "75>sm_75 80>sm_120", "75>sm_75 90>sm_120"),
        ("100", "80>sm_100 80>compute_80", "90>sm_100 90>compute_90"),
        ("80-real;90a", "", ""),  # as CMake knows them
    ],
)
def test_one_ptx_serves_all_later_devices(
    tmp_path: Path, architectures: str, code: str, cluster_code: str
) -> None:
    script = tmp_path / "share.cmake"
    script.write_text(
        "cmake_minimum_required(VERSION 3.22)\n"
        f"include({ROOT}/cmake/CudaArchitectures.cmake)\n"
        f'set(CMAKE_CUDA_ARCHITECTURES "{architectures}")\n'
        "setformer_share_ptx(all 0 80 999)\nsetformer_share_ptx(clusters 90 90 119)\n"
        'message("${all}|${clusters}")\n'
    )
    done = run("cmake", "-P", script, folder=tmp_path)
    found = [
        re.sub(r"-gencode=arch=compute_(\d+),code=(\w+)", r"\1>\2", flags).replace(";", " ")
        for flags in done.stderr.strip().split("|")
    ]
    assert found == [code, cluster_code]


@needs_cmake
@pytest.mark.parametrize(
    ("variables", "compiled_for", "left_out"),
    [
        ({}, "75-real;80-real;90-real;90-virtual", ""),
        (
            {"TORCH_CUDA_ARCH_LIST": "7.0;8.0;Hopper;9.0a+PTX"},
            "80-real;90;90a",
            'for 7.0 of TORCH_CUDA_ARCH_LIST="7.0;8.0;Hopper;9.0a+PTX" (it knows 75, 80, 90)',
        ),
        ({"TORCH_CUDA_ARCH_LIST": "Turing Ampere"}, "75;80-real", "for 8.6+PTX of TORCH_CUDA"),
        ({"TORCH_CUDA_ARCH_LIST": "Pascal,9.0"}, "90-real", "for Pascal of TORCH_CUDA_ARCH_LIST"),
        ({"TORCH_CUDA_ARCH_LIST": " ", "CUDAARCHS": ""}, "75-real;80-real;90-real;90-virtual", ""),
        ({"CUDAARCHS": "70-real;90-virtual"}, "90-virtual", "for 70-real of CUDAARCHS"),
        ({"CUDAARCHS": "80 90;native;75"}, "75", "for 80 90, native of CUDAARCHS"),
        ({"CUDAARCHS": "70"}, "", 'for 70 of CUDAARCHS="70" (it knows 75, 80, 90)'),
        ({"CUDAARCHS": "native"}, "", "for native of CUDAARCHS"),
        (
            {"TORCH_CUDA_ARCH_LIST": "Volta;nonsense"},
            "",
            "for 7.0+PTX, nonsense of TORCH_CUDA_ARCH",
        ),
    ],
)
def test_architectures_that_nvcc_does_not_know_are_left_out_and_named(
    nvcc: Path, variables: dict[str, str], compiled_for: str, left_out: str
) -> None:
    done = decide(nvcc, **variables)
    assert done.returncode == 0, done.stderr
    assert left_out in done.stdout
    assert ("but nvcc cannot compile" in done.stdout) == bool(left_out and compiled_for)
    if compiled_for:
        assert "CUDA compiled by" in done.stdout
        assert done.stdout.rstrip().endswith(f" for {compiled_for}")
    else:
        assert "CUDA not compiled: nvcc cannot compile" in done.stdout

    insisted = decide(nvcc, SETFORMER_CUDA="on", **variables)
    assert (insisted.returncode != 0) == bool(left_out)
    assert left_out in insisted.stderr


@needs_cmake
@pytest.mark.parametrize(
    ("variables", "named"),
    [
        (
            {"CUDAFLAGS": "-O3 --use_fast_math"},
            'CUDAFLAGS="-O3 --use_fast_math" asks for fast math',
        ),
        ({"NVCC_APPEND_FLAGS": "-ftz=true"}, "NVCC_APPEND_FLAGS"),
        ({"NVCC_PREPEND_FLAGS": "-Xcompiler -Ofast"}, "NVCC_PREPEND_FLAGS"),
        ({"NVCC_APPEND_FLAGS": "--nonsense"}, 'NVCC_APPEND_FLAGS="--nonsense"): it fails with'),
        ({"CUDACXX": "/nowhere/nvcc"}, 'CUDACXX="/nowhere/nvcc"): it fails with'),
    ],
)
def test_without_a_usable_nvcc_cuda_is_left_out_and_the_variable_named(
    nvcc: Path, variables: dict[str, str], named: str
) -> None:
    done = decide(nvcc, **variables)
    assert done.returncode == 0, done.stderr
    assert "CUDA not compiled: " in done.stdout
    assert named in done.stdout
    insisted = decide(nvcc, SETFORMER_CUDA="on", **variables)
    assert insisted.returncode != 0
    assert named in insisted.stderr


@needs_cmake
def test_a_cuda_home_without_nvcc_is_named(nvcc: Path) -> None:
    variables = {
        "CUDACXX": "",
        "CUDA_HOME": "/nowhere",
        "PATH": f"{nvcc.parent}{os.pathsep}{os.environ['PATH']}",
    }
    named = 'but there is no bin/nvcc in CUDA_HOME="/nowhere"'
    assert f"compiled by nvcc  ({nvcc}), {named}" in decide(nvcc, **variables).stdout
    assert f"SETFORMER_CUDA=on, {named}" in decide(nvcc, SETFORMER_CUDA="on", **variables).stderr


@needs_cmake
@pytest.mark.parametrize("value", ["yes", "1", " "])
def test_a_wrong_choice_about_cuda_is_named(nvcc: Path, value: str) -> None:
    done = decide(nvcc, SETFORMER_CUDA=value)
    assert done.returncode != 0
    assert f'SETFORMER_CUDA must be one of auto, on, off, got "{value}"' in done.stderr


# The whole configuration.


@needs_cmake
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("SETFORMER_SANITIZE=address", 'must be one of off, on, thread, got "address"'),
        ("CMAKE_BUILD_TYPE=fast", 'minsizerel, none, got "fast"'),
        ("CMAKE_CXX_COMPILER=no_openmp", "cannot compile OpenMP, which the kernels need. Choose"),
    ],
)
def test_a_wrong_choice_about_the_compiler_is_named(
    tmp_path: Path, option: str, message: str
) -> None:
    compiler = tmp_path / "no_openmp"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1 ;; esac\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    environment = {"SETFORMER_CUDA": "off", "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = run("cmake", "-S", ROOT, "-B", "build", f"-D{option}", folder=tmp_path, **environment)
    assert done.returncode != 0
    assert message in " ".join(done.stderr.split())


# Flags of the compiler, asked from the compiler.

HOSTILE = "-ffast-math -Ofast -ffinite-math-only -funsafe-math-optimizations"


@needs_cmake
@pytest.mark.skipif(shutil.which("ninja") is None, reason="needs ninja")
def test_fast_math_and_the_builders_processor_are_put_out_of_force(tmp_path: Path) -> None:
    flags = f"{HOSTILE} -march=native"
    options = ["-G", "Ninja", "-DSETFORMER_CUDA=off", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]
    done = run(
        "cmake", "-S", ROOT, "-B", tmp_path, *options, folder=ROOT, CXXFLAGS=flags, LDFLAGS=HOSTILE
    )
    assert done.returncode == 0, done.stderr
    above_baseline = {"__SSE3__", "__AVX2__", "__AVX512F__", "__AVX512BF16__"}
    instruction_sets = {
        "avx2": {"__SSE3__", "__AVX2__"},
        "avx512": above_baseline - {"__AVX512BF16__"},
        "avx512_bf16": above_baseline,
    }
    for entry in json.loads((tmp_path / "compile_commands.json").read_text()):
        command = entry["command"].split()
        assert "-ffast-math" in command
        object_file = command.index("-o")
        del command[object_file : object_file + 2]
        listed = run(*command, "-dM", "-E", folder=tmp_path).stdout
        macros = {line.split()[1] for line in listed.splitlines() if line.startswith("#define ")}
        assert "#define __FINITE_MATH_ONLY__ 0" in listed
        assert macros.isdisjoint({"__FAST_MATH__", "__RECIPROCAL_MATH__", "__ASSOCIATIVE_MATH__"})
        isa = next((word for word in command if word.startswith("-DSETFORMER_ISA=")), "")
        expected = instruction_sets.get(isa.rpartition("=")[2], set())
        assert macros & above_baseline == expected, entry

    links = [
        line.removeprefix(": && ").removesuffix(" && :")
        for line in run("ninja", "-t", "commands", folder=tmp_path).stdout.splitlines()
        if " -o test_" in line and ".o " in line
    ]
    assert links
    for command in links:
        assert "crtfastmath" not in run(*command.split(), "-###", folder=tmp_path).stderr
