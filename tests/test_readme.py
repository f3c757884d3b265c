"""README's Python examples run as they stand, and its commands and names exist."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = re.findall(
    r"setformer (profile|selftest|train|predict|evaluate|export|explain)((?: +[^\s`#]+)+)",
    re.sub(r"\\\n\s*", " ", TEXT),
)


def test_pictures_are_there() -> None:
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", TEXT)
    assert pictures
    assert all((ROOT / picture).exists() for picture in pictures)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example(example: str) -> None:
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    if "output" in names:
        output = names["output"]
        assert abs(output).max() < 100  # finite, and within the hull of some normal values


@pytest.mark.parametrize(("name", "options"), COMMANDS)
def test_commands_have_these_options(name: str, options: str) -> None:
    parser = argparse.ArgumentParser()
    importlib.import_module(f"setformer_ext.{name}").add_arguments(parser)
    parser.parse_args(shlex.split(options))


def test_commands_are_found() -> None:
    assert {name for name, _ in COMMANDS} == {
        *("profile", "selftest", "train", "predict", "evaluate", "export", "explain")
    }
    assert len(COMMANDS) >= 5


def test_kernels_are_those_of_the_sources() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "csrc" / "cuda").glob("*.cu*")]
    kernels = re.findall(r"__global__ void[^;{]*?(\w+_kernel)\(", "".join(sources))
    table = "".join(line for line in TEXT.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`(\w+_kernel)`", table)) == set(kernels)
