"""README's Python examples run as they stand."""

import re
from pathlib import Path

import pytest

EXAMPLES = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL
)


def test_pictures_are_there() -> None:
    root = Path(__file__).parents[1]
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", (root / "README.md").read_text())
    assert pictures
    assert all((root / picture).exists() for picture in pictures)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example(example: str) -> None:
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    if "output" in names:
        output = names["output"]
        assert abs(output).max() < 100  # finite, and within the hull of some normal values
