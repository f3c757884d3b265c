"""Text files, and a tokenizer trained on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import WordPiece
from transformers import PreTrainedTokenizerFast

from .task import DataError

ALPHABET = 1000  # characters that are known at most; words with others are [UNK]
SPECIAL = {
    "pad_token": "[PAD]",  # first, so that it is 0
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def numbered_lines(path: Path, problems: list[str] | None) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file, from 1 on, without their ends.

    Only \\n and \\r\\n end a line; texts have other characters in them that Python would split at.

    Args:
        path: the file.
        problems: takes what is wrong with a line that is then left out; None to raise it.

    Raises:
        DataError: for a file that cannot be read, and for lines that are not UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"--data: cannot read {path}: {error.strerror}") from error
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            yield number, line.removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            refuse(
                f"{path}, line {number}: expected UTF-8, "
                f"got the byte {line[error.start]:#04x} at column {error.start + 1}",
                problems,
            )


def refuse(problem: str, problems: list[str] | None) -> None:
    """Note what is wrong with a line, or raise it.

    Raises:
        DataError: where nothing takes notes.
    """
    if problems is None:
        raise DataError(f"{problem} (--on-error skip: leave such lines out)")
    problems.append(problem)


def text_files(given: Iterable[Path]) -> list[Path]:
    """The files, and those named *.txt in the folders, in the order of their names.

    Raises:
        DataError: for what is not there, and for folders without such files.
    """
    files: list[Path] = []
    for path in given:
        if path.is_dir():
            found = sorted(path.rglob("*.txt"))
            if not found:
                raise DataError(f"--data: no *.txt in {path}")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(f"--data: there is no {path}; expected text files, or folders of them")
    return files


def read_documents(files: Iterable[Path], problems: list[str] | None) -> list[str]:
    """The documents of files that have one on each line; empty lines are none."""
    lines = (line for path in files for _, line in numbered_lines(path, problems))
    return [line for line in lines if line.strip()]


def train_tokenizer(documents: list[str], vocab_size: int, lowercase: bool) -> str:
    """BERT's kind of tokenizer, WordPiece, trained on the documents; as JSON.

    The same documents give the same tokenizer.
    """
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    characters = Counter[str]()
    for document in documents:
        characters.update(normalizer.normalize_str(document))
    common = sorted(characters, key=lambda c: (-characters[c], c))[: min(ALPHABET, vocab_size // 4)]
    alphabet = sorted(c for c in common if not c.isspace())
    # The trainer numbers what it meets in the order of a hash table, and breaks ties by number:
    # what is named as special is numbered before.
    given = [*SPECIAL.values(), *alphabet, *(f"##{c}" for c in alphabet)]
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


def wrap_tokenizer(json: str) -> PreTrainedTokenizerFast:
    """The tokenizer that :func:`train_tokenizer` made, as transformers has them."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json),
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **SPECIAL,
    )
