"""Which files and folders in a folder belong to the user's data."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Names that systems, file servers and archives leave behind, in small letters.
SYSTEM_NAMES = {
    "$recycle.bin",
    "#recycle",
    "#snapshot",
    "@eadir",
    "@recycle",
    "@tmp",
    "__macosx",
    "__pycache__",
    "desktop.ini",
    "ehthumbs.db",
    "icon\r",
    "lost+found",
    "system volume information",
    "thumbs.db",
}


def is_hidden(path: Path) -> bool:
    """Whether a file or folder of this name is hidden, or left behind by a system."""
    name = path.name.lower()
    return name in SYSTEM_NAMES or (name.startswith(".") and name != "..")


def visible(folder: Path) -> tuple[list[Path], list[Path]]:
    """The folders and the files in a folder that are not hidden, by name; links are followed."""
    with os.scandir(folder) as entries:
        kinds = {Path(entry.path): entry.is_dir() for entry in entries}  # mostly without a stat
    paths = [path for path in sorted(kinds) if not is_hidden(path)]
    return [path for path in paths if kinds[path]], [path for path in paths if not kinds[path]]


def files_under(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """The files in a folder and in its folders that are not hidden, ordered by name.

    Args:
        folder: where to look; its own name does not matter.
        above: the folders that led to it; a link back to one of them is not followed.
    """
    above = (*above, folder.resolve())
    folders, files = visible(folder)
    yield from files
    for inner in folders:
        if inner.resolve() not in above:
            yield from files_under(inner, above)
