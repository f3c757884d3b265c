"""Checkpoints that survive a kill, a full disk and a broken file."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from ...errors import first_line
from .task import TrainingError

KEPT = 2  # the newest, and the one before in case the newest is broken
PARTIAL = ".partial"  # the end of the names of files that are not complete yet


class CheckpointError(TrainingError):
    """A checkpoint that cannot be written or read; the message names the file."""

    @classmethod
    def of_writing(cls, path: Path, reason: BaseException) -> CheckpointError:
        """The error of a failed write, such as on a full disk; what was there before is kept."""
        return cls(
            f"cannot write {path}: {first_line(reason)}; earlier checkpoints are untouched: "
            "make room, then go on with --resume"
        )


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Have ``write`` fill a file that then exists completely or, whatever happens, not at all.

    Raises:
        CheckpointError: if the file cannot be written, as on a full disk; what was there stays.
    """
    temporary = path.with_name(f".{path.name}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # so that the new name survives a power cut too
        finally:
            os.close(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason: BaseException = error
        while reason.__context__ is not None:  # torch.save raises again over its half-written file
            reason = reason.__context__
        raise CheckpointError.of_writing(path, reason) from error
    finally:
        temporary.unlink(missing_ok=True)


def clear_partial(folder: Path) -> None:
    """Remove files that killed processes left half written."""
    for path in folder.rglob(f".*{PARTIAL}"):
        path.unlink(missing_ok=True)


def save_weights(path: Path, state: dict[str, Tensor]) -> None:
    """Write a state_dict as safetensors; if names share a tensor, only under the first name."""
    kept: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in state.items():
        kept.setdefault((tensor.data_ptr() or id(tensor), tensor.shape), name)
    data = save({name: state[name].contiguous() for name in kept.values()}, {"format": "pt"})
    write_atomically(path, lambda file: file.write(data))


class Checkpoints:
    """The checkpoints ``step-N.pt`` of a training, of which the newest two are kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def paths(self) -> list[Path]:
        """The files, from the newest to the oldest."""
        found = {
            int(match[1]): path
            for path in self.folder.glob("step-*.pt")
            if (match := re.fullmatch(r"step-(\d+)\.pt", path.name))
        }
        return [found[step] for step in sorted(found, reverse=True)]

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint, and only after that remove those that are too old."""
        write_atomically(self.folder / f"step-{step:08d}.pt", lambda file: torch.save(state, file))
        for path in self.paths()[KEPT:]:
            path.unlink(missing_ok=True)

    def load(self, warn: Callable[[str], None]) -> dict[str, Any] | None:
        """The newest checkpoint that can be read, None if there is none at all.

        Args:
            warn: called with a message for each checkpoint that cannot be read.

        Raises:
            CheckpointError: if there are checkpoints but none can be read.
        """
        paths = self.paths()
        for path in paths:
            try:
                return _read(path)
            except CheckpointError as error:
                warn(str(error))
        if paths:
            raise CheckpointError(
                f"{self.folder}: no checkpoint can be read; remove the folder to start anew"
            )
        return None


def _read(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not verify the checksums
            broken = archive.testzip()
        if broken is None:
            return torch.load(path, map_location="cpu", weights_only=True)
        reason = f"{broken} does not have the checksum that was written"
    except Exception as error:  # a broken file can raise anything
        reason = first_line(error)
    raise CheckpointError(f"{path}: a broken checkpoint ({reason})")
