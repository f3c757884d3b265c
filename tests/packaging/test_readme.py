"""Python examples of README and docs run as they stand, and their commands and names exist."""

import argparse
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
EXAMPLES = [
    pytest.param(code, id=f"{path.stem}-{index}")
    for path, text in PAGES.items()
    for index, code in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
]
# What pages have in blocks: their sentences name options without values.
TYPED = [x for text in PAGES.values() for x in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)]
COMMANDS = re.findall(
    r"setformer (profile|selftest|train|predict|evaluate|export|explain)((?: +[^\s`#]+)+)",
    re.sub(r"\\\n\s*", " ", "\n".join(TYPED)),
)


def test_pictures_are_there() -> None:
    for page, text in PAGES.items():
        pictures = re.findall(r"!\[.*?\]\((.*?)\)", text, re.DOTALL)
        assert pictures or page.name != "README.md"
        assert all((ROOT / page.parent / picture).exists() for picture in pictures), page


def test_memory_is_checked_without_the_pools_of_torch() -> None:
    """Within which memcheck does not see where a tensor ends."""
    typed = re.sub(r"\\\n\s*", " ", "\n".join(PAGES.values()))
    checks = re.findall(r"^.*compute-sanitizer .*$", typed, re.MULTILINE)
    assert checks
    for line in checks:
        assert "PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer" in line


def test_readme_is_one_page() -> None:
    lines = PAGES[Path("README.md")].splitlines()
    assert len(lines) <= 180
    assert max(map(len, lines)) <= 100
    first = "\n".join(lines[:50])
    assert "set_attention(" in first
    assert "SetAttention(" in first


def test_pages_are_in_the_sites_list() -> None:
    listed = re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    assert sorted(listed) == sorted(path.name for path in PAGES if path.name != "README.md")


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize("example", EXAMPLES)
def test_example(example: str, tmp_path: Path) -> None:
    if "__main__" in example:  # it starts processes, which read it from a file
        script = tmp_path / "example.py"
        script.write_text(example, encoding="utf-8")
        subprocess.run([sys.executable, script], check=True, cwd=tmp_path, timeout=300)
        return
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    if "output" in names:
        output = names["output"]
        assert abs(output).max() < 100  # finite, and within the hull of some normal values
        # Tokens (dimension -2) differ: no example may show the mean of its values.
        mean = output.mean(-2)[..., None, :]
        assert abs(output - mean).max() > 1e-3 * abs(output).max()


@pytest.mark.parametrize(("name", "options"), COMMANDS)
def test_commands_have_these_options(name: str, options: str) -> None:
    parser = argparse.ArgumentParser()
    importlib.import_module(f"setformer_ext.cli.{name}").add_arguments(parser)
    parser.parse_args(shlex.split(options))


def test_commands_are_found() -> None:
    assert {name for name, _ in COMMANDS} == {
        *("profile", "selftest", "train", "predict", "evaluate", "export", "explain")
    }
    assert len(COMMANDS) >= 5


def test_kernels_are_those_of_the_sources() -> None:
    sources = [path.read_text() for path in (ROOT / "csrc" / "cuda").rglob("*.cu*")]
    kernels = re.findall(r"__global__ void[^;{]*?(\w+_kernel)\(", "".join(sources))
    text = PAGES[Path("docs/cuda.md")]
    table = "".join(line for line in text.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`(\w+_kernel)`", table)) == set(kernels)
