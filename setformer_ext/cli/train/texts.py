"""Text files, and a tokenizer trained on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import WordPiece
from transformers import PreTrainedTokenizerFast

from ..files import files_under
from .lines import numbered_lines
from .task import DataError, TrainingError

# The tokenizer knows this many of the commonest characters, or more if more are needed to cover
# this share of the text, as long as they fit into half of the vocabulary. Words with others are
# [UNK].
ALPHABET, COVERED = 1000, 0.9999
SPECIAL = {
    "pad_token": "[PAD]",  # first, so that its id is 0
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def text_files(option: str, given: Iterable[Path]) -> list[Path]:
    """The files, and those named *.txt in the folders that are not hidden, in the order of names.

    Raises:
        DataError: for paths that do not exist, and for folders without such files.
    """
    files: list[Path] = []
    for path in given:
        if path.is_dir():
            found = sorted(file for file in files_under(path) if file.suffix.lower() == ".txt")
            if not found:
                raise DataError(f"{option}: no *.txt in {path}")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(
                f"{option}: there is no {path}; expected text files, or folders of them"
            )
    return files


def read_documents(files: Iterable[Path], problems: list[str] | None) -> list[str]:
    """The documents of files with one document on each line; empty lines are left out."""
    lines = (line for path in files for _, line in numbered_lines(path, problems))
    return [line for line in lines if line.strip()]


def train_tokenizer(
    documents: list[str], vocab_size: int, lowercase: bool, alphabet_size: int | None = None
) -> str:
    """BERT's kind of tokenizer, WordPiece, trained on the documents; as JSON.

    The same documents give the same tokenizer.

    Args:
        documents: the texts.
        vocab_size: tokens at most.
        lowercase: do not tell capital letters from small ones.
        alphabet_size: characters that are known; by default what the texts need.

    Raises:
        TrainingError: for more characters than the vocabulary has room for.
    """
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    letters = _common_letters(documents, normalizer, vocab_size, alphabet_size)
    alphabet = sorted(letters)
    # The trainer numbers characters in the order of a hash table, and breaks ties by number.
    # Special tokens are numbered first, in the order given: so all characters are passed as
    # special.
    given = [*SPECIAL.values(), *alphabet, *(f"##{c}" for c in alphabet if letters[c] == 2)]
    learner = Tokenizer(WordPiece(unk_token=SPECIAL["unk_token"]))
    learner.normalizer = normalizer
    learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=given,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    learner.train_from_iterator(documents, trainer)
    tokenizer = Tokenizer(WordPiece(learner.get_vocab(), unk_token=SPECIAL["unk_token"]))
    tokenizer.normalizer, tokenizer.pre_tokenizer = learner.normalizer, learner.pre_tokenizer
    tokenizer.decoder = decoders.WordPiece()
    first, last = SPECIAL["cls_token"], SPECIAL["sep_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} $B:1 {last}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (first, last)],
    )
    return tokenizer.to_str()


def _common_letters(
    documents: list[str],
    normalizer: normalizers.BertNormalizer,
    vocab_size: int,
    alphabet_size: int | None,
) -> dict[str, int]:
    """The characters to know, and the number of tokens of each: 2 (at a word's start, and inside),
    or 1 for a Chinese character."""
    counts = Counter[str]()
    for document in documents:
        counts.update(normalizer.normalize_str(document))
    letters = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
    # Chinese characters are words of their own: the normalizer puts spaces around them.
    tokens = [1 if normalizer.normalize_str(c).startswith(" ") else 2 for c in letters]
    taken = np.cumsum(tokens)
    if alphabet_size is None:
        covered = np.cumsum([counts[c] for c in letters])
        enough = 1 + int(np.searchsorted(covered, COVERED * covered[-1:].sum()))
        room = int(np.searchsorted(taken, vocab_size // 2, side="right"))
        alphabet_size = min(max(ALPHABET, enough), room)
    elif len(SPECIAL) + taken[:alphabet_size].max(initial=0) > vocab_size:
        raise TrainingError(
            f"--alphabet: {alphabet_size} characters take more than the {vocab_size} tokens of "
            "--vocab-size; give a smaller alphabet or a larger vocabulary"
        )
    return dict(zip(letters[:alphabet_size], tokens, strict=False))


def wrap_tokenizer(json: str) -> PreTrainedTokenizerFast:
    """The tokenizer of :func:`train_tokenizer` in transformers' form."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json),
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **SPECIAL,
    )
