"""What every file of the package keeps to, found in its syntax."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "setformer_ext").rglob("*.py"))
SCRIPTS = [ROOT / "setup.py", *sorted((ROOT / "benchmarks").rglob("*.py"))]

TEXT = ("read_text", "write_text", "open", "TemporaryFile", "NamedTemporaryFile", "fdopen")
OTHERS = ("Image", "os", "webbrowser")  # whose open is another
# Errors whose messages are written in this package, or by YAML, or name a key: never empty.
SPEAKING = {
    "ArgumentTypeError",
    "CheckpointError",
    "DataError",
    "KeyError",
    "LostError",
    "SavedError",
    "SkippedError",
    "TrainingError",
    "UserError",
    "YAMLError",
}


def places(path: Path, found: Iterator[ast.AST]) -> list[str]:
    return [f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}" for node in found]


def name_of(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def reads_as_the_locale_has_it(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    if "encoding" in given:
        return False
    if "text" in given or "universal_newlines" in given:  # of a process
        return True
    method = isinstance(node.func, ast.Attribute)
    owner = name_of(node.func.value) if isinstance(node.func, ast.Attribute) else ""
    if name_of(node.func) not in TEXT or owner in OTHERS:
        return False
    temporary = name_of(node.func).endswith("TemporaryFile")
    place = 0 if temporary or (method and owner != "os") else 1
    modes = [given["mode"]] if "mode" in given else node.args[place : place + 1]
    binary = temporary if not modes else "b" in str(getattr(modes[0], "value", ""))
    return not binary


def quotes_an_error_that_may_be_empty(tree: ast.AST) -> Iterator[ast.AST]:
    for handler in ast.walk(tree):
        if not isinstance(handler, ast.ExceptHandler) or handler.name is None:
            continue
        kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
        if SPEAKING.issuperset(name_of(kind) for kind in kinds if kind is not None):
            continue
        for node in ast.walk(handler):
            quoted = node.value if isinstance(node, ast.FormattedValue) else None
            if isinstance(node, ast.Call) and name_of(node.func) == "str" and node.args:
                quoted = node.args[0]
            if isinstance(quoted, ast.Name) and quoted.id == handler.name:
                yield handler


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("path.read_text()", True),
        ("path.read_text(encoding='utf-8')", False),
        ("open(path)", True),
        ("open(path, 'rb')", False),
        ("path.open('a')", True),
        ("path.open(mode='wb')", False),
        ("Image.open(path)", False),
        ("tempfile.TemporaryFile()", False),
        ("tempfile.TemporaryFile('w+')", True),
        ("subprocess.run(command, text=True)", True),
    ],
)
def test_what_reads_as_the_locale_has_it(code: str, wrong: bool) -> None:
    assert any(map(reads_as_the_locale_has_it, ast.walk(ast.parse(code)))) == wrong


def test_text_is_utf_8_whatever_the_locale() -> None:
    assert [
        place
        for path in (*SOURCES, *SCRIPTS)
        for place in places(
            path,
            filter(
                reads_as_the_locale_has_it, ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            ),
        )
    ] == []


def test_no_message_ends_where_another_error_says_nothing() -> None:
    """`errors.first_line` names the class of an error without words."""
    assert [
        place
        for path in SOURCES
        for place in places(
            path, quotes_an_error_that_may_be_empty(ast.parse(path.read_text(encoding="utf-8")))
        )
    ] == []
