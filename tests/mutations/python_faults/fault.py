"""What a fault in a Python file is: in a file of setformer_ext, `old` becomes `new`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PythonFault:
    name: str
    file: str  # below setformer_ext
    old: str  # occurs once
    new: str
    area: str  # of operation, vision, language, train, predict, explain, distributed

    def apply(self, text: str) -> str:
        """The file with the fault."""
        if text.count(self.old) != 1:
            raise ValueError(
                f"{self.name}: expected setformer_ext/{self.file} to have this text once, it is "
                f"there {text.count(self.old)} times; change the fault with the file:\n{self.old}"
            )
        return text.replace(self.old, self.new)
