"""What faults in kernels and in Python files have in common."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Seeded:
    """In the text of a file `old` becomes `new`."""

    name: str
    file: str
    old: str  # occurs once
    new: str

    def apply(self, text: str) -> str:
        """The file with the fault."""
        return self.put(text, self.new)

    def put(self, text: str, new: str) -> str:
        """The file with `new` in place of `old`.

        Raises:
            ValueError: if `old` is not there once.
        """
        if text.count(self.old) != 1:
            raise ValueError(
                f"{self.name}: expected {self.file} to have this text once, it is there "
                f"{text.count(self.old)} times; change the fault with the file:\n{self.old}"
            )
        return text.replace(self.old, new)

    def is_meant(self, words: list[str], place: str) -> bool:
        """Whether one of the words is in the name, the file or the place; any is without words."""
        about = f"{self.name} {self.file} {place}"
        return not words or any(word in about for word in words)


def python_path(*folders: object) -> dict[str, str]:
    """The variable by which a process imports from these folders first."""
    paths = [*map(str, folders), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
