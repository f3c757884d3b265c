"""Two sentences in which a word means the same, or not: usage examples of WordNet."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterable
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
            sentences = list(dict.fromkeys(re.findall(r'"([^"]+)"', gloss)))
            for word in words:
                stem = word[: max(3, len(word) - 2)]
                using = [
                    each for each in sentences if re.search(rf"\b{re.escape(stem)}", each.lower())
                ]
                if using:
                    found[word, part].append(using)
    return found


def load(_folder: Path) -> Data:
    """[K, 2 LONGEST + 1]; a sentence is in one part of the data only. Each sentence of a sense that
    has more stands once beside one of these and once beside one of another sense of the word, so
    that sentences alone tell nothing."""
    generator = random.Random(0)
    of_word = {key: groups for key, groups in examples().items() if len(groups) > 1}
    components = _components(of_word.values())
    names = sorted(set(components.values()))
    generator.shuffle(names)
    part_of = {name: min(2, 6 * number // len(names)) for number, name in enumerate(names)}
    parts: list[list[Pair]] = [[], [], []]
    for groups in of_word.values():
        several = [group for group in groups if len(group) > 1]
        for group in several if len(several) > 1 else []:
            others = [each for other in several if other is not group for each in other]
            for sentence in group:
                part = parts[part_of[components[sentence]]]
                same = generator.choice([each for each in group if each != sentence])
                part += [(sentence, same, 1), (sentence, generator.choice(others), 0)]

    def samples(pairs: list[Pair]) -> Samples:
        firsts, seconds, labels = zip(*pairs, strict=True)
        return encode_pairs(firsts, seconds, labels, LONGEST)

    return Data(*(samples(part) for part in (parts[2], parts[0], parts[1])))


def _components(words: Iterable[list[list[str]]]) -> dict[str, str]:
    """For each sentence, one that stands for all that it is connected with: two sentences are if a
    word has both."""
    towards: dict[str, str] = {}

    def root(sentence: str) -> str:
        while towards.setdefault(sentence, sentence) != sentence:
            sentence = towards[sentence]
        return sentence

    for groups in words:
        sentences = [sentence for group in groups for sentence in group]
        for sentence in sentences[1:]:
            towards[root(sentence)] = root(sentences[0])
    return {sentence: root(sentence) for sentence in list(towards)}


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
