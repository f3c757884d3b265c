"""Folders of image files that have a folder for each class, and their split into two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .files import files_under, visible
from .images import is_image


@dataclass
class ImageFolder:
    """Image files by class.

    Args:
        name: where they are, for messages.
        classes: the files of each class, by the class's name; classes without files too.
        others: files that are no images, and images that are in no class's folder.
    """

    name: str
    classes: dict[str, list[Path]]
    others: list[Path]

    def samples(self) -> list[tuple[Path, str]]:
        """All files with their classes, class by class."""
        return [(path, name) for name, paths in self.classes.items() for path in paths]

    def split(self, share: float, seed: int) -> tuple[ImageFolder, ImageFolder]:
        """Two folders: the samples that stay, and the share of every class that is
        :func:`held_out`."""
        samples = self.samples()
        chosen = held_out([name for _, name in samples], share, seed)
        parts = [dict[str, list[Path]]({name: [] for name in self.classes}) for _ in range(2)]
        for (path, name), out in zip(samples, chosen, strict=True):
            parts[out][name].append(path)
        name = f"the held-out share of {self.name}"
        return ImageFolder(self.name, parts[0], self.others), ImageFolder(name, parts[1], [])


def find_images(root: Path) -> ImageFolder:
    """The images under ``root/CLASS/``, without hidden files and folders.

    Raises:
        OSError: for a folder that cannot be read.
    """
    folders, others = visible(root)
    classes = {}
    for folder in folders:
        files = list(files_under(folder))
        classes[folder.name] = [path for path in files if is_image(path)]
        others += [path for path in files if not is_image(path)]
    return ImageFolder(str(root), classes, others)


def held_out(labels: Sequence[object], share: float, seed: int) -> list[bool]:
    """The samples to hold out, drawn by a seed: a share of those of every label, at least one.

    If a label has only one sample, that one stays.
    """
    generator = torch.Generator().manual_seed(seed)
    members: dict[object, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    chosen = [False] * len(labels)
    for indices in members.values():
        count = min(max(1, round(share * len(indices))), len(indices) - 1)
        for place in torch.randperm(len(indices), generator=generator)[:count].tolist():
            chosen[indices[place]] = True
    return chosen
