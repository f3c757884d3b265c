"""Two sentences in which a word means the same, or not: usage examples of WordNet."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from itertools import combinations, product
from pathlib import Path

from .pairs import PretrainedWords, encode_pairs
from .task import Data, Samples, Task

FOLDER = Path("/usr/share/wordnet")  # Debian's package wordnet-base
LONGEST = 24  # word pieces of a sentence

Pair = tuple[str, str, int]


def examples() -> dict[tuple[str, str], list[list[str]]]:
    """For each word and part of speech, the sentences of each of its senses."""
    found: dict[tuple[str, str], list[list[str]]] = defaultdict(list)
    for part in ("noun", "verb", "adj", "adv"):
        file = FOLDER / f"data.{part}"
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing: install Debian's package wordnet-base")
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith("  ") or "|" not in line:
                continue
            data, gloss = line.split("|", 1)
            fields = data.split()
            words = [fields[4 + 2 * i].lower() for i in range(int(fields[3], 16))]
            sentences = re.findall(r'"([^"]+)"', gloss)
            for word in words:
                stem = word[: max(3, len(word) - 2)]
                using = [
                    each for each in sentences if re.search(rf"\b{re.escape(stem)}", each.lower())
                ]
                if using:
                    found[word, part].append(using)
    return found


def load(_folder: Path) -> Data:
    """[K, 2 LONGEST + 1]; a word is in one part of the data only, with as many pairs of one sense
    as of two."""
    generator = random.Random(0)
    senses = examples()
    words = sorted({word for word, _ in senses})
    generator.shuffle(words)
    part_of = {word: min(2, 6 * number // len(words)) for number, word in enumerate(words)}
    parts: list[list[Pair]] = [[], [], []]
    for (word, _), groups in senses.items():
        same = [(*pair, 1) for group in groups for pair in combinations(group, 2)]
        other = [(*pair, 0) for two in combinations(groups, 2) for pair in product(*two)]
        count = min(len(same), len(other))
        part = parts[part_of[word]]
        part += generator.sample(same, count) + generator.sample(other, count)

    def samples(pairs: list[Pair]) -> Samples:
        firsts, seconds, labels = zip(*pairs, strict=True)
        return encode_pairs(firsts, seconds, labels, LONGEST)

    return Data(*(samples(part) for part in (parts[2], parts[0], parts[1])))


SENSES = Task(
    name="senses",
    about="WordNet's sentences: does a word mean the same in both?",
    load=load,
    make_embedding=lambda dim: PretrainedWords(2 * LONGEST + 1, dim),
    classes=2,
    steps=600,
    batch_size=64,
    depth=2,
)
