"""A seeded fault: in the text of a file of csrc/cuda, `old` becomes `new`."""

from __future__ import annotations

from dataclasses import dataclass

from ..seeding import Seeded


@dataclass(frozen=True)
class Fault(Seeded):
    problem: str  # of checks.PROBLEMS: one that reaches the fault

    def apply(self, text: str) -> str:
        """The file with the fault. Later lines keep their numbers, so that kernels that do not
        have it are still known by the emulator's cache."""
        lost_lines = self.old.count("\n") - self.new.count("\n")
        return self.put(text, self.new + "\n" * lost_lines)


def on_chip(*rows: tuple[str, str, str, str, str]) -> tuple[Fault, ...]:
    """Faults of files of csrc/cuda/on_chip, by the fields of Fault."""
    return tuple(Fault(name, f"on_chip/{file}", *rest) for name, file, *rest in rows)
