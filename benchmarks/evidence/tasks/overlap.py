"""Two windows of one film review: do they share half of their words, or none?

Windows of the same review are of the same subject and the same author, so nothing tells but that
words come again in the same order: the one text has to be compared with the other.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from .pairs import PretrainedWords, encode_pairs
from .task import Data, Samples, Task
from .texts import reviews

WORDS = 32  # of a window
LONGEST = 48  # word pieces of a window, of which few have more
HELD_OUT = 2000  # reviews
ROUNDS = 4  # pairs of each review to train on


def load(_folder: Path) -> Data:
    """[K, 2 LONGEST + 1]; a review is in one part of the data only."""
    generator = random.Random(0)
    texts = [text.split() for text, _ in reviews()]
    texts = [words for words in texts if len(words) >= 2 * WORDS]

    def starts(length: int, overlap: bool) -> tuple[int, int]:
        least = WORDS // 2 if overlap else WORDS
        first = generator.randint(0, length - WORDS - least)
        second = first + least if overlap else generator.randint(first + least, length - WORDS)
        return (first, second) if generator.random() < 0.5 else (second, first)

    def pairs(part: Sequence[list[str]]) -> Samples:
        firsts, seconds, labels = [], [], []
        for words in part:
            overlap = generator.random() < 0.5
            first, second = starts(len(words), overlap)
            firsts.append(" ".join(words[first : first + WORDS]))
            seconds.append(" ".join(words[second : second + WORDS]))
            labels.append(int(overlap))
        return encode_pairs(firsts, seconds, labels, LONGEST)

    held_out = texts[:HELD_OUT], texts[HELD_OUT : 2 * HELD_OUT]
    return Data(pairs(texts[2 * HELD_OUT :] * ROUNDS), *(pairs(part) for part in held_out))


OVERLAP = Task(
    name="overlap",
    about=f"two windows of {WORDS} words of a review: do they overlap?",
    load=load,
    make_embedding=lambda dim: PretrainedWords(2 * LONGEST + 1, dim),
    classes=2,
    steps=1200,
    batch_size=64,
    depth=2,
)
