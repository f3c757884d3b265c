"""setformer explain: the plan is that of the layer, wherever it is, and the picture shows it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from matplotlib.colors import to_rgb
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from setformer_ext import cli
from setformer_ext.cli.explain import picture
from setformer_ext.cli.explain.plans import Layer, find_attention, observe
from setformer_ext.cli.predict.predictors import PREDICTORS
from setformer_ext.cli.themes import COLOURS, THEMES, mutual_information
from setformer_ext.errors import UserError
from setformer_ext.vision import Setformer
from test_predict import DETECT
from test_predict import write_run as detector_run

TINY = {
    "dims": (32, 32, 64, 32),
    "depths": (1, 1, 2, 1),
    "num_references": (4, 4, 6, 4),
    "num_classes": 3,
    "attention_options": {"adaptive_reference_mass": False},
}
SOFTMAX = {"attention": "softmax", "attention_options": None}


def make_model(**options: object) -> Setformer:
    torch.manual_seed(0)
    model = timm.create_model("setformer_mini", **(TINY | options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # masses and biases, too
            parameter += 0.1 * torch.randn_like(parameter)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0  # the statistics are those of the next batch
        model.train()(torch.randn(4, 3, 64, 64))
    return model.eval()


@torch.no_grad()
def plans_by_hand(model: Setformer, images: Tensor) -> Tensor:  # [B, 3, H, W] -> [H, N, M]
    """Stage 3, block 2, step by step."""
    x = model.stages[1](model.stages[0](model.stem(images)))
    stage = model.stages[2]
    block = stage.blocks[1]
    x = block.attention_norm(stage.blocks[0](stage.downsample(x)))
    return block.attention.transport_plan(x.flatten(2).mT, grid=tuple(x.shape[2:]))[0]


@pytest.mark.parametrize("block", [2, -1])
def test_plan_is_that_of_the_layer(block: int) -> None:
    model, images = make_model(), torch.randn(1, 3, 40, 72)
    attention, name = find_attention(model, 3, block)
    layer = observe(model, attention, lambda: model(images))
    assert name == "stage 3, block 2 of 2"
    assert layer.grid == (3, 5)
    assert layer.plans.shape == (2, 15, 6)
    assert torch.equal(layer.seen, images[0])
    torch.testing.assert_close(layer.plans, plans_by_hand(model, images))
    expected = attention.reference_log_mass.softmax(-1)  # what each reference draws in all
    torch.testing.assert_close(layer.plans.sum(1), expected, rtol=1e-4, atol=1e-6)
    assert not attention._forward_pre_hooks


class Detector(nn.Module):
    """A backbone out of timm's features_only, inside something else, on padded images."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        features = {key: value for key, value in TINY.items() if key != "num_classes"}
        self.body = timm.create_model(
            "setformer_mini", features_only=True, **features, **options
        ).eval()

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.body(nn.functional.pad(x, (0, 24, 0, 24)))


def test_backbone_is_found_inside_other_models() -> None:
    model, detector, images = make_model(), Detector(), torch.randn(1, 3, 40, 40)
    weights = {name.replace("stages.", "stages_"): w for name, w in model.state_dict().items()}
    detector.body.load_state_dict(weights, strict=False)
    attention, _ = find_attention(detector, 3, -1)
    layer = observe(detector, attention, lambda: detector(images))
    assert layer.seen.shape == (3, 64, 64)
    expected = plans_by_hand(model, nn.functional.pad(images, (0, 24, 0, 24)))
    torch.testing.assert_close(layer.plans, expected)


def test_other_layers_are_refused() -> None:
    model = make_model()
    for stage in (0, 5):
        with pytest.raises(UserError, match=f"--stage must be from 1 to 4, got {stage}"):
            find_attention(model, stage, 1)
    for block in (0, 3, -3):
        with pytest.raises(UserError, match=rf"--block must be from 1 to 2.* -2, got {block}"):
            find_attention(model, 3, block)
    with pytest.raises(UserError, match=r"only SeT attention has references .*SoftmaxAttention"):
        find_attention(make_model(**SOFTMAX), 3, 1)
    with pytest.raises(UserError, match="Linear holds no Setformer"):
        find_attention(nn.Linear(1, 1), 3, 1)
    shortened = Detector(out_indices=(0, 1))
    with pytest.raises(UserError, match="--stage must be from 1 to 2, got 3"):
        find_attention(shortened, 3, 1)


def test_mutual_information_is_that_of_known_plans() -> None:
    own = torch.eye(4) / 4  # each token gives to a reference of its own
    alike = torch.full((4, 4), 1 / 16)
    halves = torch.eye(2).repeat_interleave(2, 0).repeat_interleave(2, 1) / 8
    expected = torch.tensor([4.0, 1.0, 2.0]).log()
    torch.testing.assert_close(mutual_information(torch.stack([own, alike, halves])), expected)


@pytest.mark.parametrize("background", THEMES)
def test_picture_shows_who_draws_from_where(
    background: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve tokens: three quarters give to reference 3, the rest to 1, none most to 2.

    The light picture of a black image is the dark one of a white image with all colours inverted:
    those of the references too, which so come out as the theme has them.
    """
    shown: list[tuple[Tensor, str]] = []
    show = picture._show
    monkeypatch.setattr(
        picture, "_show", lambda axes, *given: (shown.append(given[:2]), show(axes, *given))
    )
    plan = torch.tensor([[0.1, 0.1, 0.8]] * 9 + [[0.59, 0.31, 0.1]] * 3)
    light = background == "light"
    image = torch.full((3, 30, 40), 0.0 if light else 1.0)
    path = tmp_path / "p.png"
    picture.draw_references(image, plan, (3, 4), "layer", path, background=background)
    titles = [title for _, title in shown]
    assert titles[1] == "where each token gives most"
    assert [title.split(":")[0] for title in titles[2:]] == [f"reference {j}" for j in (3, 1, 2)]
    assert [title.split(": ")[1].split("%")[0] for title in titles[2:]] == ["62", "22", "15"]
    assert shown[0][0].shape == (360, 480, 3)
    torch.testing.assert_close(shown[0][0], image[0, 0, 0].expand(360, 480, 3))
    colours = (torch.tensor(to_rgb(colour)) for colour in THEMES[background].colours[:2])
    first, second = (1 - x if light else x for x in colours)
    tint, of_third, of_first = (1 - panel if light else panel for panel, _ in shown[1:4])

    def at(panel: Tensor, row: float, column: float) -> Tensor:
        return panel[int(row * 360), int(column * 480)]

    # The last three tokens are the last row but for its first quarter.
    torch.testing.assert_close(at(tint, 0.1, 0.9), first)
    torch.testing.assert_close(at(tint, 0.9, 0.1), first)
    torch.testing.assert_close(at(tint, 0.9, 0.9), second)
    torch.testing.assert_close(at(of_third, 0.1, 0.1), (0.25 + 0.85 * first))
    torch.testing.assert_close(at(of_third, 0.9, 0.9), (0.25 + 0.85 * first / 8))
    torch.testing.assert_close(at(of_first, 0.9, 0.9), (0.25 + 0.85 * second))
    assert is_png(path)


def test_panels_are_as_high_as_the_image_but_not_without_end() -> None:
    """Two rows of panels 2.4 inches wide, each with 0.4 for its title, under a header of 0.5."""
    for aspect, height in ((0.25, 0.6), (1.0, 2.4), (9.0, 3.2)):
        figure, panels = picture._panels(7, aspect)
        assert len(panels) == 10
        assert figure.get_size_inches() == pytest.approx((5 * 2.4, 2 * (height + 0.4) + 0.5))


def test_tokens_may_reach_over_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of three tokens of 16 pixels over an image of 20 x 40: the rest was padding."""
    shown: list[Tensor] = []
    show = picture._show
    monkeypatch.setattr(
        picture, "_show", lambda axes, *given: (shown.append(given[0]), show(axes, *given))
    )
    layer = Layer(
        torch.eye(12).unflatten(1, (12,))[None] / 12, (3, 4), torch.ones(3, 48, 64), (48, 64)
    ).without_padding(20, 40)
    assert (layer.grid, layer.covered, layer.seen.shape) == ((2, 3), (32, 48), (3, 20, 40))
    places = [0, 1, 2, 4, 5, 6]
    assert layer.plans[0].argmax(1).tolist() == places
    torch.testing.assert_close(layer.plans.sum(), torch.tensor(1.0))
    path = tmp_path / "p.png"
    picture.draw_references(layer.seen, layer.plans[0], (2, 3), "x", path, covered=layer.covered)
    of_token = dict(zip(places, (torch.tensor(to_rgb(c)) for c in COLOURS), strict=False))
    tint = shown[1]
    assert tint.shape == (240, 480, 3)
    for row, column, token in ((190, 190, 0), (190, 194, 1), (194, 0, 4), (239, 479, 6)):
        torch.testing.assert_close(tint[row, column], of_token[token])


def test_padding_of_a_detector_is_cut_off() -> None:
    """torchvision makes 50 x 90 to 53 x 96, and pads that to multiples of 32."""
    predictor = PREDICTORS["detect"](DETECT)
    predictor.model.eval()
    levels = np.random.default_rng(0).integers(0, 255, (50, 90, 3))
    image = Image.fromarray(np.uint8(levels))
    attention, _ = find_attention(predictor.model, 1, 1)
    layer = observe(predictor.model, attention, lambda: predictor.look(image))
    assert (layer.grid, layer.seen.shape) == ((16, 24), (3, 64, 96))
    layer.seen = predictor.as_seen(layer.seen)
    cut = layer.without_padding(*predictor.size_seen(image))
    assert (cut.grid, cut.covered, cut.seen.shape) == ((14, 24), (56, 96), (3, 53, 96))
    pixels = torch.tensor(levels / 255).permute(2, 0, 1)[None]
    resized = nn.functional.interpolate(pixels, (53, 96), mode="bilinear")[0].float()
    assert (cut.seen - resized).abs().mean() < 0.02


def test_command_keeps_tokens_over_their_pixels(
    tmp_path: Path, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A detector makes 30 x 50 to 57 x 96, which tokens of 4 pixels cover as 60 x 96."""
    run = detector_run(tmp_path / "run", DETECT, PREDICTORS["detect"](DETECT).model)
    drawn: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        picture,
        "draw_references",
        lambda *given, covered, background: drawn.append((*given, covered, background)),
    )
    given = ["explain", str(run), str(photo), "--stage=1", f"--output={tmp_path / 'p.png'}"]
    assert cli.main([*given, "--background=light"]) == 0
    ((image, plan, grid, _, _, covered, background),) = drawn
    assert background == "light"
    assert tuple(image.shape) == (3, 57, 96)
    assert (len(plan), grid, covered) == (15 * 24, (15, 24), (60, 96))


def test_light_is_of_what_tokens_draw_and_not_of_noise() -> None:
    """In 400 tokens: that of most stays visible beside a few bright ones, noise does not."""
    drawn = torch.full((400,), 1.0)
    drawn[:3] = 100.0
    assert picture._light(drawn)[-1] == pytest.approx(1 / 25)
    drawn[3:] = 1e-3
    light = picture._light(drawn)
    assert light[:3].tolist() == [1.0] * 3
    assert light[3:].max() == pytest.approx(4e-5)
    drawn = torch.arange(1.0, 402.0)  # of 401 different ones the 99th of a hundred is 397
    torch.testing.assert_close(picture._light(drawn), (drawn / 397).clamp(max=1))


def is_png(path: Path) -> bool:
    with Image.open(path) as image:
        image.load()
        return image.format == "PNG" and min(image.size) > 300


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    levels = np.random.default_rng(0).integers(0, 255, (30, 50, 3))
    Image.fromarray(np.uint8(levels)).save(path)
    return path


def write_run(folder: Path, name: str, model: nn.Module, **options: object) -> Path:
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    card = {
        "task": "classify",
        "model": name,
        "model_options": options,
        "classes": ["a", "b", "c"],
        "input_size": [3, 64, 64],
        "interpolation": "bicubic",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "crop_pct": 1.0,
    }
    (folder / "card.json").write_text(json.dumps(card))
    return folder


def explain(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    status = cli.main(["explain", *map(str, arguments)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, captured.out, captured.err


@pytest.mark.slow
def test_command_draws_a_run(tmp_path: Path, photo: Path, capsys: pytest.CaptureFixture) -> None:
    run = write_run(tmp_path / "run", "setformer_mini", make_model(), **TINY)
    output = tmp_path / "new" / "picture.png"
    status, out, _ = explain(
        capsys, run, photo, "--stage", 3, "--block", -2, "--head", 2, "--output", output
    )
    assert status == 0
    assert "stage 3, block 1 of 2, head 2 of 2" in out
    assert is_png(output)
    status, out, _ = explain(capsys, run, "--stage", 1, photo, "--output", output)
    assert (status, "stage 1, block 1 of 1, head 1 of 1" in out) == (0, True)


@pytest.mark.slow
def test_command_chooses_the_telling_head(
    tmp_path: Path, photo: Path, capsys: pytest.CaptureFixture
) -> None:
    """In the other head all references are one, which leaves nothing to tell them apart."""
    for head in (0, 1):
        model = make_model()
        with torch.no_grad():
            model.stages[2].blocks[1].attention.reference[1 - head] = 1.0
        run = write_run(tmp_path / f"run{head}", "setformer_mini", model, **TINY)
        status, out, _ = explain(capsys, run, photo, "--output", tmp_path / "p.png")
        assert (status, f"head {head + 1} of 2" in out) == (0, True)


@pytest.mark.slow
def test_command_takes_a_checkpoint_of_timm(
    tmp_path: Path, photo: Path, capsys: pytest.CaptureFixture
) -> None:
    model = timm.create_model("setformer_mini", num_classes=2)
    checkpoint = tmp_path / "checkpoint.pth.tar"
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, checkpoint)
    given = ("--model", "setformer_mini", "--checkpoint", checkpoint)
    status, out, _ = explain(capsys, *given, photo, "--output", tmp_path / "p.png")
    assert status == 0
    assert "stage 3, block 3 of 3" in out
    assert is_png(tmp_path / "p.png")


def test_bad_input_is_explained(tmp_path: Path, photo: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "p.png"

    def message(*arguments: object) -> str:
        status, _, err = explain(capsys, "--output", output, *arguments)
        assert status == 1
        assert err.startswith("setformer explain: ")
        assert err.count("\n") == 1
        return err

    model = make_model(**SOFTMAX)
    softmax = write_run(tmp_path / "softmax", "setformer_mini", model, **(TINY | SOFTMAX))
    assert "only SeT attention has references to explain" in message(softmax, photo)
    other = timm.create_model("test_resnet", num_classes=3)
    resnet = write_run(tmp_path / "resnet", "test_resnet", other, num_classes=3)
    assert "ResNet holds no Setformer" in message(resnet, photo)
    run = write_run(tmp_path / "run", "setformer_mini", make_model(), **TINY)
    assert "--head must be from 1 to 2 in this layer, got 3" in message(run, photo, "--head", 3)
    assert "--head must be from 1 to 2 in this layer, got 0" in message(run, photo, "--head", 0)
    assert "missing.png: no such file" in message(run, tmp_path / "missing.png")
    assert "has no card.json" in message(tmp_path, photo)
    assert "expected an IMAGE after RUN, or --text" in message(run)
    assert f"{tmp_path}: a folder, expected an image" in message(run, tmp_path)
    assert "give the RUN of a training before IMAGE" in message(photo)
    assert "give the RUN" in message(photo, "--model", "setformer_mini")
    named = ("--model", "setformer_mini", "--checkpoint")
    assert "not both" in message(run, photo, *named, run / "model.safetensors")
    assert "missing.pth: no such file" in message(photo, *named, tmp_path / "missing.pth")
    assert "photo.png: not a file of weights" in message(photo, *named, photo)
    assert "weights are of another model" in message(photo, *named, run / "model.safetensors")
    assert "--model must be one of setformer_base" in message(
        photo, "--model", "resnet18", "--checkpoint", photo
    )
    assert not output.exists()
    before = photo.read_bytes()
    output = photo
    assert "photo.png is the image itself" in message(run, photo)
    assert photo.read_bytes() == before
    output = tmp_path / "p.docx"
    assert "p.docx: pictures can be written as" in message(run, photo)
