"""Importing, failing to import, and the command line."""

import importlib.machinery
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import setformer_ext
from setformer_ext import _C, _import_failure, cli
from setformer_ext.cli import info

EXTENSION = importlib.machinery.EXTENSION_SUFFIXES[0]


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own that finds this very setformer_ext."""
    package_folder = str(Path(setformer_ext.__file__).parent.parent)
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,  # where no source folder comes before the installed package
        env={**os.environ, "PYTHONPATH": package_folder},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_version_is_the_compiled_one() -> None:
    assert setformer_ext.__version__ == _C.build_info()["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", setformer_ext.__version__)


def test_without_torch_the_compiled_half_works_and_the_rest_says_what_to_install() -> None:
    finished = run_python(
        "import sys; sys.modules['torch'] = None\n"
        "import setformer_ext\n"
        "print(setformer_ext._C.cpu_isa())\n"
        "try: setformer_ext.set_attention\n"
        "except ImportError as error: print(error)\n"
        "try: setformer_ext.nonsense\n"
        "except AttributeError as error: print(error)\n"
    )
    assert finished.returncode == 0, finished.stderr
    isa, missing, unknown = finished.stdout.splitlines()
    assert isa in _C.build_info()["instruction_sets"].split()
    assert missing.startswith("setformer_ext.set_attention needs torch")
    assert "pip install torch" in missing
    assert "nonsense" in unknown


def test_a_torch_that_fails_to_import_is_not_mistaken_for_a_missing_one() -> None:
    finished = run_python(
        "import sys, importlib.abc\n"
        "class Broken(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'torch': raise ImportError('libtorch_cpu.so: broken')\n"
        "sys.meta_path.insert(0, Broken())\n"
        "import setformer_ext"
    )
    assert finished.returncode != 0
    assert finished.stderr.rstrip().endswith("ImportError: libtorch_cpu.so: broken")


@pytest.mark.parametrize(
    ("files", "message", "expected"),
    [
        ([], "No module named 'setformer_ext._C'", "not compiled"),
        (["../pyproject.toml"], "No module named 'setformer_ext._C'", "source folder"),
        (["_C.cpython-27-x86_64-linux-gnu.so"], "No module named", "another Python"),
        (
            [f"_C{EXTENSION}"],
            "libgomp.so.1: cannot open shared object file: No such file or directory",
            "libgomp1",
        ),
        (
            [f"_C{EXTENSION}"],
            "libother.so.2: cannot open shared object file: No such file or directory",
            "shared library libother.so.2",
        ),
        ([f"_C{EXTENSION}"], "undefined symbol: foo", "undefined symbol: foo"),
    ],
)
def test_a_failed_import_names_its_cause(
    tmp_path: Path, files: list[str], message: str, expected: str
) -> None:
    package = tmp_path / "setformer_ext"
    package.mkdir()
    for file in files:
        (package / file).touch()
    assert expected in _import_failure.explain(ImportError(message), package)


def test_a_failed_import_keeps_the_original_exception() -> None:
    finished = run_python(
        "import sys; sys.modules['setformer_ext._C'] = None\n"
        "try: import setformer_ext\n"
        "except ImportError as error: print(type(error.__cause__).__name__, error.__cause__)"
    )
    assert finished.stdout.startswith("ModuleNotFoundError"), finished.stderr
    assert "setformer_ext._C" in finished.stdout


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mappings")
def test_torch_and_the_kernels_share_one_pool_of_threads() -> None:
    finished = run_python(
        "import setformer_ext, torch\n"
        "from setformer_ext import _C\n"
        "from setformer_ext.cli import info\n"
        "torch.ones(1000, 1000) @ torch.ones(1000, 1000)\n"
        "print(info.collect()['OpenMP'].partition(', ')[2])\n"
        "torch.set_num_threads(1); print(_C.max_threads())\n"
        "torch.set_num_threads(2); print(_C.max_threads())\n"
    )
    libraries, one, two = finished.stdout.splitlines()
    assert len(libraries.split(", ")) == 1, f"two pools of threads: {libraries}"
    assert (one, two) == ("1", "2")


def test_info_reports_what_a_bug_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    report = capsys.readouterr().out
    facts = info.collect()
    assert facts["setformer_ext"].startswith(setformer_ext.__version__)
    assert facts["instruction set"].split()[0] == _C.cpu_isa()
    assert facts["CUDA"].startswith(("compiled by nvcc", "not compiled: "))
    for name, value in facts.items():
        assert value, name
        assert re.search(f"^{re.escape(name)} +{re.escape(value)}$", report, re.MULTILINE), name


def test_python_m_is_the_command() -> None:
    finished = run_python(
        "import runpy, sys; sys.argv = ['setformer', '--version']\n"
        "runpy.run_module('setformer_ext', run_name='__main__')"
    )
    assert finished.stdout == f"setformer_ext {setformer_ext.__version__}\n", finished.stderr


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["info", "--nonsense"]])
def test_wrong_arguments_end_with_status_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2


def test_a_command_whose_packages_are_missing_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(name: str) -> None:
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")

    monkeypatch.setattr(cli.importlib, "import_module", fail)
    with pytest.raises(SystemExit, match=r'needs the package matplotlib.*pip install "\.\[demo\]"'):
        cli.main(["demo"])
