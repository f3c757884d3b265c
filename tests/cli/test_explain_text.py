"""Which words the references gather: words, masses, the picture, and what cannot be drawn."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from transformers import AutoTokenizer

from setformer_ext import cli
from setformer_ext.cli.explain import sentence
from setformer_ext.cli.train.texts import train_tokenizer, wrap_tokenizer
from setformer_ext.language import SetformerConfig, SetformerModel

TEXT = "Superb, the film is unforgettable."


def write_encoder(folder: Path, **options: object) -> Path:
    texts = ["the film is superb ." for _ in range(9)] + ["unforget table able"]
    tokenizer = wrap_tokenizer(train_tokenizer(texts, 120, lowercase=True))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = SetformerConfig(vocab_size=len(tokenizer), num_references=6, **sizes, **options)
    SetformerModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_encoder(tmp_path_factory.mktemp("encoder"))


def test_the_masses_of_a_words_parts_are_added(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr(sentence, "draw_words", lambda *given: drawn.append(given))
    name = sentence.explain_sentence(encoder, TEXT, 2, 3, tmp_path / "a.png")
    assert name == "layer 2 of 2, head 3 of 4"
    ((words, plan, *_),) = drawn
    assert words == ["[CLS]", "Superb", ",", "the", "film", "is", "unforgettable", ".", "[SEP]"]
    model = SetformerModel.from_pretrained(encoder).eval()
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    tokens = tokenizer(TEXT, return_tensors="pt")
    with torch.no_grad():
        states = model(**tokens, output_hidden_states=True).hidden_states[1]
        layer = model.layers[1]
        inside = layer.attention_norm(states + layer.position(states, None))
        whole = layer.attention.transport_plan(inside)[0, 2]
    parts = [place for place, word in enumerate(tokens.word_ids()) if word == 5]
    assert len(parts) > 1
    torch.testing.assert_close(plan[6], whole[parts].sum(0))
    torch.testing.assert_close(plan.sum(0), whole.sum(0))


def test_the_picture_has_a_bright_place_for_each_reference(encoder: Path, tmp_path: Path) -> None:
    words = ["one", "two", "three"]
    sentence.draw_words(words, torch.eye(3) / 3, "layer 1", tmp_path / "eye.png")
    pixels = torch.from_numpy(np.array(Image.open(tmp_path / "eye.png").convert("RGB")))
    for colour in ("#56b4e9", "#e69f00", "#2ee6a0"):
        known = torch.tensor([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        assert (pixels == known).all(-1).sum() > 500
    output = tmp_path / "out" / "words.png"
    given = ["explain", str(encoder), "--text", TEXT, "--output", str(output)]
    for more, level in (([], 0), (["--background=light"], 255)):
        assert cli.main([*given, *more]) == 0
        drawn = Image.open(output)
        assert drawn.width > 500
        assert drawn.convert("L").getpixel((0, 0)) == level


def test_a_row_shows_where_its_reference_draws_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row by itself, brightest where it draws most, with its share of the mass of all; the
    heavier is the first. Each column has its word below."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    plan = torch.tensor([[0.25, 0.0625], [0.25, 0.1875], [0.25, 0.0]])
    sentence.draw_words(["one", "two", "three"], plan, "layer 1", tmp_path / "rows.png")
    first, second = figures[0].axes
    for axes, label, row in ((first, "1: 75%", [1 / 3] * 3), (second, "2: 25%", [0.25, 0.75, 0])):
        (image,) = axes.images
        assert image.get_array().tolist() == [pytest.approx(row)]
        assert image.get_clim() == (0, pytest.approx(max(row)))
        assert [text.get_text() for text in axes.get_yticklabels()] == [label]
    assert list(second.get_xticks()) == [0, 1, 2]
    assert [text.get_text() for text in second.get_xticklabels()] == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--layer=3"], "--layer must be from 1 to 2, or from -1 for the last to -2, got 3"),
        (["--head=5"], "--head must be from 1 to 4 in this layer, got 5"),
        (["--output=a.txt"], "pictures can be written as"),
        (["--model=bert"], "expected the RUN of a train mlm or glue, and no IMAGE, --model"),
        (["--block=1"], "--stage or --block; --layer chooses the layer"),
        (["--text", ""], "--text: expected words, got none"),
        (["--text", " \n"], "--text: expected words, got none"),
        (["--text", "word " * 61], "expected at most 60 words, got 63"),
    ],
)
def test_what_cannot_be_drawn(
    given: list[str], message: str, encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["explain", str(encoder), "--text", TEXT, *given]) == 1
    assert message in capsys.readouterr().err


def test_a_model_that_is_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "--model", "nope", "--text", TEXT]) == 1
    assert "--model: there is no folder nope" in capsys.readouterr().err


def test_encoders_without_references(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", str(tmp_path), "--text", TEXT]) == 1
    assert "expected the --output of setformer train mlm or glue" in capsys.readouterr().err
    write_encoder(tmp_path, attention="softmax")
    assert cli.main(["explain", str(tmp_path), "--text", TEXT]) == 1
    assert "only SeT attention has references to explain" in capsys.readouterr().err
