"""setformer explain of models of transformers that were switched to SeT attention."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ViTImageProcessor,
    ViTModel,
)

import switched
from setformer_ext import cli
from setformer_ext.cli.explain import encoders, sentence
from setformer_ext.cli.train.texts import train_tokenizer, wrap_tokenizer
from setformer_ext.errors import UserError

TEXT = "Superb, the film is filmisis."


def write_bert(folder: Path) -> Path:
    """As ``train glue --attention-implementation set_attention`` leaves it."""
    torch.manual_seed(0)
    tokenizer = wrap_tokenizer(train_tokenizer(["the film is superb ."] * 9, 60, lowercase=True))
    auto = AutoModelForSequenceClassification
    switched.make("bert", auto, iterations=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "card.json").write_text(json.dumps({"task": "glue"}))
    return folder


def write_vit(folder: Path, kind: str = "vit") -> Path:
    torch.manual_seed(0)
    switched.make(kind, iterations=0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    levels = np.random.default_rng(0).integers(0, 255, (40, 50, 3))
    Image.fromarray(np.uint8(levels)).save(path)
    return path


def explain(capsys: pytest.CaptureFixture[str], *given: object) -> tuple[int, str, str]:
    status = cli.main(["explain", *map(str, given)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_plan_is_what_the_outputs_are_gathered_by(iterations: int) -> None:
    """A query that is like one reference alone receives what that one has gathered: sum_i C_ij v_i.

    With the unit vectors as values that is column j of the plan, divided by its sum.
    """
    torch.manual_seed(0)
    module = switched.attention_module(iterations=iterations).set_attention.double()
    nn.init.orthogonal_(module.reference[0])
    with torch.no_grad():
        module.reference.copy_(module.reference[0].clone())
    tokens, scaling = 9, 8**-0.5
    query = 1e3 * module.reference[None, :, torch.arange(tokens) % 5].detach()
    query = query / module.query_log_scale.exp()[:, None, None]
    key = torch.randn(2, 4, tokens, 8, dtype=torch.float64)
    value = torch.eye(tokens, dtype=torch.float64).expand(2, 4, -1, -1)
    mask = torch.arange(tokens) < torch.tensor([[9], [5]])
    arguments = (query.expand(2, -1, -1, -1), key, value, mask, scaling)
    with torch.no_grad():
        plan, gathered = module.transport_plan(*arguments), module(*arguments)
    assert plan.shape == (2, 4, tokens, 5)
    mass = plan.sum(2)
    torch.testing.assert_close(plan / mass.unsqueeze(2), gathered[:, :, :5].mT)
    expected = torch.full((4, 5), 0.2, dtype=torch.float64)
    if iterations:
        expected = module.reference_log_mass.detach().softmax(-1)
    torch.testing.assert_close(mass, expected.expand(2, -1, -1))
    assert (plan[1, :, 5:] == 0).all()


def captured(model: torch.nn.Module, layer: int, **inputs: Tensor) -> Tensor:  # [H, N, D]
    """The keys of a layer's references."""
    keys: list[Tensor] = []
    modules = [m for m in model.modules() if isinstance(m, switched.References)]
    hook = modules[layer].register_forward_pre_hook(lambda module, given: keys.append(given[1][0]))
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return keys[0]


def test_words_of_a_switched_bert(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(sentence, "draw_words", lambda *given: drawn.append(given))
    name = sentence.explain_sentence(bert, TEXT, 2, 3, tmp_path / "a.png")
    assert name == "layer 2 of 2, head 3 of 4"
    ((words, plan, *_),) = drawn
    assert words == ["[CLS]", "Superb", ",", "the", "film", "is", "filmisis", ".", "[SEP]"]
    model = AutoModelForSequenceClassification.from_pretrained(
        bert, attn_implementation=switched.NAME
    ).eval()
    tokens = AutoTokenizer.from_pretrained(bert)(TEXT, return_tensors="pt")
    key = captured(model, 1, **tokens)[2]
    reference = model.get_submodule("bert.encoder.layer.1.attention.self.set_attention").reference
    whole = (key @ reference[2].T / 8**0.5).softmax(0) / 5
    parts = [place for place, word in enumerate(tokens.word_ids()) if word == 5]
    assert len(parts) > 1
    torch.testing.assert_close(plan[6], whole[parts].sum(0))
    torch.testing.assert_close(plan.sum(0), torch.full((5,), 0.2))


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_patches_of_a_switched_vision_model(kind: str, photo: Path, tmp_path: Path) -> None:
    """The plan is that of the patches, without the token that has no place."""
    folder = write_vit(tmp_path / kind, kind)
    processor = ViTImageProcessor(
        size={"height": 30, "width": 30}, image_mean=[0.4] * 3, image_std=[0.3] * 3
    )
    processor.save_pretrained(folder)
    image = Image.open(photo)
    layer, name = encoders.observe_image(folder, -1, image)
    assert (name, layer.grid, layer.covered) == ("layer 2 of 2", (5, 5), (30, 30))
    pixels = processor(images=image, return_tensors="pt")["pixel_values"]
    resized = np.asarray(image.resize((30, 30), Image.Resampling.BILINEAR)) / 255
    expected = torch.tensor(resized, dtype=torch.float32).permute(2, 0, 1)
    torch.testing.assert_close(layer.seen, expected, rtol=0, atol=0.02)
    model = encoders.load_encoder(folder)
    key = captured(model, 1, pixel_values=pixels)
    reference = next(p for n, p in reversed([*model.named_parameters()]) if "attention.ref" in n)
    whole = (torch.einsum("hnd,hmd->hnm", key, reference.detach()) / 8**0.5).softmax(1)
    patches = whole[:, 1:]
    torch.testing.assert_close(layer.plans, patches / patches.sum((1, 2), keepdim=True))


@pytest.mark.slow
def test_command_draws_switched_models(
    bert: Path, vit: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "p.png"
    for given in ([bert, "--text", TEXT], ["--model", bert, "--text", TEXT], [vit, photo]):
        status, out, _ = explain(capsys, *given, "--output", output)
        assert status == 0
        assert "layer 2 of 2, head" in out
        assert Image.open(output).width > 500
        output.unlink()
    status, out, err = explain(
        capsys, photo, "--model", vit, "--layer=1", "--output", output, "--background=light"
    )
    assert (status, "layer 1 of 2, head" in out) == (0, True)
    assert "has no preprocessor_config.json: the image is made 30 x 30" in err
    assert Image.open(output).convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_what_cannot_be_explained(
    bert: Path, vit: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def message(*given: object) -> str:
        status, _, err = explain(capsys, *given, "--output", tmp_path / "p.png")
        assert status == 1
        return err

    assert "--layer must be from 1 to 2" in message(vit, photo, "--layer", 3)
    assert "--head must be from 1 to 4 in this layer, got 5" in message(vit, photo, "--head", 5)
    assert "expected --layer for this model" in message(vit, photo, "--stage", 1)
    assert "ViTModel reads pixel_values" in message(vit, "--text", TEXT)
    assert "a training of glue, expected one on images" in message(bert, photo)
    (bert / "card.json").rename(bert / "other.json")
    assert "BertModel reads input_ids" in message(bert, photo)
    (bert / "other.json").rename(bert / "card.json")
    plain = tmp_path / "plain"
    ViTModel(switched.CONFIGS["vit"]()).save_pretrained(plain)
    assert "only SeT attention has references to explain, and this ViTModel" in message(
        plain, photo
    )
    (plain / "model.safetensors").write_bytes(b"junk")
    assert "expected the --output of setformer train mlm or glue, or a folder" in message(
        plain, photo
    )


def test_references_must_have_been_saved(tmp_path: Path) -> None:
    """Else those of the picture would be drawn at random."""
    config = switched.CONFIGS["vit"](set_attention={"num_references": 5})
    ViTModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"its weights lack references, such as .*set_attention"):
        encoders.load_encoder(tmp_path)
