"""Where packages are missing that some tests need, those are skipped and the others run."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import optional

TESTS = Path(__file__).parents[1]

# Runs pytest where these modules cannot be found, though they are installed.
HIDDEN = """
import importlib.machinery, sys
finder = importlib.machinery.PathFinder
find_spec = finder.find_spec
@classmethod
def find_others(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in {modules!r} else find_spec(name, path, target)
finder.find_spec = find_others
import pytest
sys.exit(pytest.main(["-p", "no:cacheprovider", "--assert=plain", "-rs", *{options!r}]))
"""


def run_without(modules: set[str], *options: str) -> subprocess.CompletedProcess[str]:
    code = HIDDEN.format(modules=modules, options=options)
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=TESTS,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},  # hypothesis has one
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_the_suite_is_collected_without_any_of_them() -> None:
    done = run_without(optional.MODULES, "--collect-only", "-q", "-k", "not cuda")
    assert done.returncode == 0, done.stdout[-3000:]
    skipped = dict(re.findall(r"^SKIPPED \[1\] (\S+):0: needs (\w+), which", done.stdout, re.M))
    assert set(skipped.values()) <= optional.MODULES
    skipped = {name.rpartition("/")[2]: module for name, module in skipped.items()}
    assert skipped["test_any_problem.py"] == "hypothesis"
    collected = set(re.findall(r"(test_\w+\.py)::", done.stdout))
    assert {path.name for path in TESTS.rglob("test_*.py")} - collected - set(skipped) <= {
        path.name for path in (TESTS / "cuda").rglob("test_*.py")
    }
    numeric = ("numerics", "gradients", "definition", "strides", "varlen", "errors", "selftest")
    assert {f"test_{name}.py" for name in numeric} <= collected


def test_a_test_that_imports_one_is_skipped_and_its_neighbours_run(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        f"import sys; sys.path.insert(0, {str(TESTS)!r})\n"
        "from optional import pytest_make_collect_report, pytest_runtest_makereport\n"
    )
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "@pytest.fixture\n"
        "def of_fixture(): import timm\n"
        "def test_runs(): pass\n"
        "def test_skips():\n"
        "    try: import ot.deep\n"
        "    except ImportError: raise SystemExit\n"
        "def test_skips_too(of_fixture): pass\n"
        "def test_fails():\n"
        "    raise ModuleNotFoundError('setformer_ext._D', name='setformer_ext._D')\n"
        "def test_fails_too(): import nowhere\n"
    )
    (tmp_path / "test_ours.py").write_text(
        "raise ModuleNotFoundError('setformer_ext._E', name='setformer_ext._E')\n"
    )
    options = ("-q", "--tb=short", "--continue-on-collection-errors", str(tmp_path))
    done = run_without({"ot", "timm"}, *options)
    assert "2 failed, 1 passed, 2 skipped, 1 error" in done.stdout
    for name in ("ot", "timm"):
        assert f"needs {name}, which is not installed" in done.stdout
    assert "setformer_ext._E" in done.stdout


def test_a_part_of_an_installed_package_that_is_missing_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(optional, "_installed", lambda name: True)
    error = ModuleNotFoundError("No module named 'timm.mistyped'", name="timm.mistyped")
    assert optional.missing(error) is None


def imported(path: Path) -> set[str]:
    """The packages that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(str(node.module).partition(".")[0])
    return found


def test_every_package_that_tests_import_is_needed_or_optional() -> None:
    needed = {"torch", "numpy", "pytest", "typing_extensions"}
    root = TESTS.parent
    files = [*TESTS.rglob("*.py"), *(root / "setformer_ext").rglob("*.py")]
    own = {path.stem for path in [*files, *(root / "benchmarks").rglob("*.py")]}
    own |= {path.parent.name for path in (root / "benchmarks").rglob("__init__.py")}
    own |= {"setformer_ext", *(path.name for path in TESTS.rglob("*") if path.is_dir())}
    for path in files:
        others = imported(path) - set(sys.stdlib_module_names) - own - needed
        assert others <= optional.MODULES, path
