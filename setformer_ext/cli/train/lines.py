"""The lines of text files in UTF-8, whatever the locale."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path

from .task import DataError


def numbered_lines(path: Path, problems: list[str] | None) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file, numbered from 1, without line ends and without a byte order mark.

    Only \\n and \\r\\n end a line; texts have other characters in them that Python would split at.

    Args:
        path: the file.
        problems: collects what is wrong with lines that are left out; None to raise it instead.

    Raises:
        DataError: for a file that cannot be read or is not UTF-8 at all, and for such lines.
    """
    for number, line in enumerate(_content(path).split(b"\n"), start=1):
        try:
            yield number, line.removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            refuse(
                f"{path}, line {number}: expected UTF-8, "
                f"got the byte {line[error.start]:#04x} at column {error.start + 1}",
                problems,
            )


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(
            f"{path}: not text in UTF-8 but in UTF-16; convert it, as by "
            f"iconv -f UTF-16 -t UTF-8 '{path}' > utf8.txt"
        )
    if b"\0" in content[:1000]:
        raise DataError(
            f"{path}: not text in UTF-8, for there are zeros in it; expected a text file"
        )
    return content.removeprefix(codecs.BOM_UTF8)


def refuse(problem: str, problems: list[str] | None) -> None:
    """Note what is wrong with a line, or raise it.

    Raises:
        DataError: if ``problems`` is None.
    """
    if problems is None:
        raise DataError(f"{problem} (--on-error skip: leave such lines out)")
    problems.append(problem)
