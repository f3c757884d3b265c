"""Two passages of one film review, or of two: what tells is what they have in common."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from .pairs import PretrainedWords, encode_pairs
from .task import Data, Samples, Task
from .texts import reviews

WORDS = 40  # of a passage
LONGEST = 48  # word pieces of a passage
HELD_OUT = 2000  # reviews
ROUNDS = 4  # pairs of each review to train on


def load(_folder: Path) -> Data:
    """[K, 2 LONGEST + 1]; a review is in one part of the data only, and those of a pair are of one
    sentiment."""
    generator = random.Random(0)
    texts = [(text.split(), sentiment) for text, sentiment in reviews()]
    texts = [(words, sentiment) for words, sentiment in texts if len(words) >= 2 * WORDS]

    def passage(words: list[str], first: int, end: int) -> str:
        start = generator.randint(first, end - WORDS)
        return " ".join(words[start : start + WORDS])

    def pairs(part: Sequence[tuple[list[str], int]], rounds: int) -> Samples:
        firsts, seconds, labels = [], [], []
        of_sentiment = [[words for words, label in part if label == each] for each in (0, 1)]
        for words, sentiment in part * rounds:
            middle = generator.randint(WORDS, len(words) - WORDS)
            firsts.append(passage(words, 0, middle))
            other = words if generator.random() < 0.5 else generator.choice(of_sentiment[sentiment])
            seconds.append(passage(other, middle if other is words else 0, len(other)))
            labels.append(int(other is words))
        return encode_pairs(firsts, seconds, labels, LONGEST)

    return Data(
        pairs(texts[2 * HELD_OUT :], ROUNDS),
        pairs(texts[:HELD_OUT], 1),
        pairs(texts[HELD_OUT : 2 * HELD_OUT], 1),
    )


PASSAGES = Task(
    name="passages",
    about=f"two passages of {WORDS} words, of one review or of two",
    load=load,
    make_embedding=lambda dim: PretrainedWords(2 * LONGEST + 1, dim),
    classes=2,
    steps=1500,
    batch_size=64,
    depth=2,
)
