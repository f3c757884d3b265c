"""Models and tokenizers of transformers that lie in a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.utils import logging

from ..errors import first_line


class SavedError(Exception):
    """A folder does not hold what was expected; the message names it."""


def load_saved(load: Callable[..., Any], folder: Path, **more: object) -> Any:
    """Load a folder by a ``from_pretrained``, without a network and without running the folder's
    code.

    Raises:
        SavedError: if there is no such folder, or it cannot be loaded.
    """
    if not folder.is_dir():
        raise SavedError(
            f"there is no folder {folder} (a model of Hugging Face's hub gets into one by "
            "hf download NAME --local-dir DIR)"
        )
    try:
        return load(folder, local_files_only=True, trust_remote_code=False, **more)
    except Exception as error:  # each format of weights and words has errors of its own
        raise SavedError(f"{folder}: {first_line(error)}") from error


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder.

    Raises:
        SavedError: also if transformers only gives a made-up tokenizer that knows no words.
    """
    tokenizer = load_saved(AutoTokenizer.from_pretrained, folder)
    if not {*tokenizer.get_vocab().values()} - {*tokenizer.all_special_ids}:
        raise SavedError(f"{folder}: has no tokenizer, such as a tokenizer.json")
    return tokenizer


def require_embeddings(
    tokenizer: PreTrainedTokenizerFast, config: PreTrainedConfig, folder: Path
) -> None:
    """Check that a model in a folder has an embedding for each of the tokenizer's words.

    Raises:
        SavedError: if it is of another vocabulary.
    """
    needed = 1 + max(tokenizer.get_vocab().values())
    had = getattr(config, "vocab_size", needed)
    if needed > had:
        raise SavedError(f"{folder}: a model of {had} words, with a tokenizer of {needed}")


def load_model(load: Callable[..., Any], folder: Path, head: str, **more: object) -> Any:
    """A model in float32, of which only the head may have to be drawn anew.

    Args:
        load: a model's ``from_pretrained``.
        folder: where it is.
        head: a text that the names of the head's weights contain.
        more: keyword arguments of ``load``.

    Raises:
        SavedError: also if other weights are of another shape, or a SeTformer's are missing.
    """
    logging.set_verbosity_error()  # weights that do not fit are named here
    model, found = load_saved(
        load,
        folder,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **more,
    )
    redrawn = [key[0] for key in found["mismatched_keys"] if head not in key[0]]
    redrawn += [key for key in found["missing_keys"] if key.startswith("setformer.")]
    if redrawn:
        raise SavedError(
            f"{redrawn[0]} and {len(redrawn) - 1} more weights of {folder} are missing or of "
            "another shape; leave out of --model-options what changes sizes"
        )
    return model
