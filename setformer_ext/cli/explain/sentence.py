"""Which words of a text the references of a language encoder's layer gather."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor

from ...errors import UserError, first_line
from ...language.saved import SavedError, load_tokenizer, require_embeddings
from ..fonts import add_title, shortened, width
from ..themes import CHOICE, covering_references, style
from .encoders import find_layer, load_encoder, require_input
from .plans import choose_head, first_calls, plans_of

LONGEST = 60  # words in a picture
FONT = 10  # points
WORD = 2.0  # inches, the longest
SLANT = 60  # degrees


def explain_sentence(
    run: Path, text: str, layer: int, head: int | None, path: Path, background: str = "dark"
) -> str:
    """Draw the references of a layer over the words of a text; returns what was drawn.

    Args:
        run: the output folder of ``setformer train mlm`` or ``glue``, or any saved encoder with
            references and its tokenizer.
        text: the text.
        layer: from 1, or -1 for the last.
        head: from 1; None for the one whose references differ most in what they draw from.
        path: of the picture.
        background: the name of a theme.

    Raises:
        UserError: if the text has no words, there is no such layer or head, or it has another
            kind of attention.
    """
    if not text.strip():
        raise UserError("--text: expected words, got none")
    model = load_encoder(run)
    require_input(model, "input_ids", "an IMAGE")
    try:
        tokenizer = load_tokenizer(run)
        require_embeddings(tokenizer, model.config, run)
    except SavedError as error:
        raise UserError(f"RUN: expected a tokenizer beside the model: {error}") from error
    if not tokenizer.is_fast:
        raise UserError(f"{run}: expected a tokenizer that knows words, a tokenizer.json")
    attention, name = find_layer(model, layer, run)
    encoding = tokenizer(text, return_tensors="pt")
    words, of_word = _words(text, encoding)
    if not 0 < len(words) <= LONGEST:
        raise UserError(f"--text: expected at most {LONGEST} words, got {len(words)}")
    try:
        (call,) = first_calls([attention], lambda: model(**encoding))
    except (ValueError, IndexError) as error:  # more than the model's positions
        raise UserError(
            f"--text: the model does not take its {len(of_word)} tokens: {first_line(error)}"
        ) from error
    plans = plans_of(attention, call)
    plans = torch.zeros(len(plans), len(words), plans.shape[2]).index_add(1, of_word, plans)
    plan, name = choose_head(plans, head, name)
    draw_words(words, plan, name, path, background)
    return name


def _words(text: str, encoding: Any) -> tuple[list[str], Tensor]:
    """The words and special tokens, and for each token the word that it is a part of, [N]."""
    words: list[str] = []
    of_word: list[int] = []
    before: int | None = None
    for place, word in enumerate(encoding.word_ids()):
        if word is None:
            words.append(encoding.tokens()[place])
        elif word != before:
            span = encoding.word_to_chars(word)
            words.append(text[span.start : span.end].strip())
        of_word.append(len(words) - 1)
        before = word
    return words, torch.tensor(of_word)


def draw_words(
    words: list[str], plan: Tensor, layer: str, path: Path, background: str = "dark"
) -> None:
    """A row for each of the references that cover the words, a column for each word.

    Args:
        words: N of them.
        plan: [N, M], the mass from word i to reference j.
        layer: names the layer in the title.
        path: of the picture.
        background: the name of a theme.
    """
    mass = plan.sum(0) / plan.sum()  # [M]
    shares = (plan / plan.sum(0)).T  # [M, N]: where each reference draws its mass
    with style(background, [*words, layer]) as theme:
        shown = covering_references(plan, len(theme.colours))
        words = [shortened(word, FONT, WORD) for word in words]
        below = math.sin(math.radians(SLANT)) * max(width(word, FONT) for word in words)
        size = (max(2.2 + 0.34 * len(words), 5.0), 1.0 + 0.36 * len(shown) + below)
        figure = Figure(figsize=size, layout="constrained")
        rows = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
        for axes, j, colour in zip(rows, shown, theme.colours, strict=False):
            ramp = LinearSegmentedColormap.from_list("", [theme.background, colour])
            row = shares[j : j + 1].numpy()
            axes.imshow(row, cmap=ramp, vmin=0, vmax=row.max(), aspect="auto")
            axes.set_yticks([0], [f"{j + 1}: {mass[j]:.0%}"])
            axes.set_xticks([])
            axes.tick_params(length=0)
        places = range(len(words))
        slant = {"rotation": SLANT, "ha": "right", "rotation_mode": "anchor"}
        rows[-1].set_xticks(places, words, fontsize=FONT, **slant)
        head = f"Which words the references of a layer gather\n{layer}: {len(shown)} of {len(mass)}"
        head += " references with their share of the mass"
        add_title(figure, head, FONT, f"Shown: {CHOICE}." if len(shown) < len(mass) else "")
        figure.savefig(path, dpi=150)
