"""What a run has found so far, kept as report.json and report.md."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from . import report


class Record:
    """The steps and their results; each change is on the disk before the next one."""

    def __init__(self, output: Path, seconds: float, **facts: Any) -> None:
        """Facts are of the whole run; seconds are what all steps may take."""
        self.output = output
        self.start = time.monotonic()
        self.data: dict[str, Any] = {
            "finished": False,
            "began": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "limit_s": seconds,
            **facts,
            "steps": [],
        }
        self.write()

    def begin(self, name: str, limit: float, command: list[str]) -> None:
        """A step starts now."""
        step = {"name": name, "status": "running", "began_s": self.elapsed(), "limit_s": limit}
        self.data["steps"].append({**step, "command": command, "results": []})
        self.write()

    def add(self, result: dict[str, Any]) -> None:
        """A result of the step that runs."""
        self.data["steps"][-1]["results"].append(result)
        self.write()

    def end(self, status: str, note: str = "", log_end: str = "") -> None:
        """How the step that runs ended; log_end is the end of what it wrote."""
        step = self.data["steps"][-1]
        step |= {"status": status, "note": note, "log_end": log_end}
        step["seconds"] = round(self.elapsed() - step["began_s"], 1)
        self.write()

    def skip(self, name: str, reason: str) -> None:
        """A step that is not run."""
        self.data["steps"].append(
            {"name": name, "status": "skipped", "seconds": 0, "note": reason, "results": []}
        )
        self.write()

    def finish(self) -> None:
        """All steps have had their turn."""
        self.data |= {"finished": True, "seconds": self.elapsed()}
        self.write()

    def status(self, name: str) -> str:
        """Of a step; empty where it has not begun."""
        found = [step["status"] for step in self.data["steps"] if step["name"] == name]
        return found[-1] if found else ""

    def elapsed(self) -> float:
        """Seconds since the run began."""
        return round(time.monotonic() - self.start, 1)

    def write(self) -> None:
        """Both files; a reader finds the old or the new one, never a part."""
        try:
            _replace(self.output / "report.json", json.dumps(self.data, indent=1) + "\n")
            _replace(self.output / "report.md", report.markdown(self.data))
        except OSError as error:  # a full disk: what follows may still be worth it
            print(f"measure: the report cannot be written: {error}", file=sys.stderr)


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # a lost GPU may take the machine with it
    part.replace(path)
