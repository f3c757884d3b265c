"""Which words of a text the references of a language encoder's layer gather."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor
from transformers import AutoModel
from transformers.utils import logging

from ..errors import first_line
from ..language.encoder import SetformerLayer
from ..language.saved import SavedError, load_saved, load_tokenizer, require_embeddings
from ..modules import SetAttention
from ..pictures import COLOURS, mutual_information
from .plans import ExplainError, require_head, require_set_attention

LONGEST = 60  # words in a picture


def explain_sentence(run: Path, text: str, layer: int, head: int | None, path: Path) -> str:
    """Draw the references of a layer over the words of a text; returns what was drawn.

    Args:
        run: the output folder of ``setformer train mlm`` or ``glue``, or any saved SeTformer.
        text: the text.
        layer: from 1, or -1 for the last.
        head: from 1; None for the one whose references differ most in what they draw from.
        path: of the picture.

    Raises:
        ExplainError: if there is no such layer or head, or it has another kind of attention.
    """
    logging.set_verbosity_error()  # of the heads that the encoder is taken from
    try:
        model = load_saved(AutoModel.from_pretrained, run).eval()
        tokenizer = load_tokenizer(run)
        require_embeddings(tokenizer, model.config, run)
    except SavedError as error:
        raise ExplainError(
            f"RUN: expected the --output of setformer train mlm or glue: {error}"
        ) from error
    layers = [module for module in model.modules() if isinstance(module, SetformerLayer)]
    if not layers:
        raise ExplainError(f"{run}: {type(model).__name__} is no SeTformer encoder")
    if not 1 <= abs(layer) <= len(layers):
        raise ExplainError(
            f"--layer must be from 1 to {len(layers)}, or from -1 for the last to "
            f"-{len(layers)}, got {layer}"
        )
    number = layer if layer > 0 else len(layers) + 1 + layer
    attention = require_set_attention(layers[number - 1].attention)
    require_head(attention, head)
    encoding = tokenizer(text, return_tensors="pt")
    words, of_word = _words(text, encoding)
    if len(words) > LONGEST:
        raise ExplainError(f"--text: expected at most {LONGEST} words, got {len(words)}")
    try:
        plans = _plans(model, attention, dict(encoding))
    except ValueError as error:  # longer than the model's positions
        raise ExplainError(f"--text: {first_line(error)}") from error
    plans = torch.zeros(len(plans), len(words), plans.shape[2]).index_add(1, of_word, plans)
    head = head or 1 + int(mutual_information(plans).argmax())
    name = f"layer {number} of {len(layers)}, head {head} of {attention.num_heads}"
    draw_words(words, plans[head - 1], name, path)
    return name


@torch.no_grad()
def _plans(
    model: torch.nn.Module, attention: SetAttention, inputs: dict[str, Tensor]
) -> Tensor:  # -> [H, N, M]
    seen: list[Tensor] = []
    hook = attention.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    try:
        model(**inputs)
    finally:
        hook.remove()
    return attention.transport_plan(seen[0])[0].float()


def _words(text: str, encoding: object) -> tuple[list[str], Tensor]:
    """The words and special tokens, and of which of them each token is a part, [N]."""
    words: list[str] = []
    of_word: list[int] = []
    before: int | None = None
    for place, word in enumerate(encoding.word_ids()):  # type: ignore[attr-defined]
        if word is None:
            words.append(encoding.tokens()[place])  # type: ignore[attr-defined]
        elif word != before:
            span = encoding.word_to_chars(word)  # type: ignore[attr-defined]
            words.append(text[span.start : span.end])
        of_word.append(len(words) - 1)
        before = word
    return words, torch.tensor(of_word)


def draw_words(words: list[str], plan: Tensor, layer: str, path: Path) -> None:
    """A row for each of the references of largest mass, a column for each word.

    Args:
        words: N of them.
        plan: [N, M], the mass from word i to reference j.
        layer: names the layer in the title.
        path: of the picture.
    """
    mass = plan.sum(0) / plan.sum()  # [M]
    shown = mass.argsort(descending=True, stable=True)[: len(COLOURS)].tolist()
    shares = (plan / plan.sum(0)).T  # [M, N]: where each reference draws its mass
    size = (2.2 + 0.34 * len(words), 1.9 + 0.36 * len(shown))
    figure = Figure(figsize=size, layout="constrained", facecolor="black")
    rows = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    for axes, j, colour in zip(rows, shown, COLOURS, strict=False):
        ramp = LinearSegmentedColormap.from_list("", ["black", colour])
        axes.imshow(
            shares[j : j + 1].numpy(), cmap=ramp, vmin=0, vmax=float(shares[j].max()), aspect="auto"
        )
        axes.set_yticks([0], [f"{j + 1}: {mass[j]:.0%}"])
        axes.set_xticks([])
        axes.tick_params(length=0, colors="white")
        for side in axes.spines.values():
            side.set_color("#444444")
    rows[-1].set_xticks(range(len(words)), words, rotation=60, ha="right", rotation_mode="anchor")
    figure.suptitle(
        f"Which words the references of a layer gather\n{layer}: {len(shown)} of {len(mass)} "
        "references with their share of the mass",
        fontsize=10,
        color="white",
    )
    figure.savefig(path, dpi=150)
