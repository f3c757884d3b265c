"""Segmentation models: any size of image, each image by itself, and transformers' UPerNet."""

from typing import Any

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from timm.layers import freeze_batch_norm_2d
from torch import nn
from torch.nn import functional as F

import setformer_ext.vision  # noqa: F401 (registers the models)
from setformer_ext.vision.segmentation import DECODERS, Segmenter, enlargement, from_card, segment

TINY: dict[str, Any] = {
    "dims": (32, 32, 64, 64),
    "depths": (1, 1, 1, 1),
    "num_references": (4, 4, 4, 4),
}
NARROW: dict[str, dict[str, Any]] = {
    "upernet": {"decoder_channels": 32},
    "fpn": {"decoder_pyramid_channels": 32, "decoder_segmentation_channels": 32},
    "unet": {"decoder_channels": (32, 32, 16, 16, 8)},
}


def make(decoder: str) -> Segmenter:
    return Segmenter("setformer_mini", 5, decoder, TINY, NARROW[decoder])


@pytest.mark.parametrize("decoder", DECODERS)
def test_any_size_and_every_parameter_learns(decoder: str) -> None:
    """1 x 1 is one token in the last stage, where statistics over a map alone would fail."""
    model = make(decoder)
    for size in ((1, 1), (31, 97), (64, 32)):
        model.encoder.train(size != (1, 1))  # its batch norms need two tokens to learn from
        logits = model(torch.randn(1, 3, *size))
        assert logits.shape == (1, 5, *size)
    logits = model(torch.randn(2, 3, 70, 33))
    F.cross_entropy(logits, torch.randint(0, 5, (2, 70, 33))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("decoder", DECODERS)
def test_images_of_a_batch_do_not_see_each_other(decoder: str) -> None:
    """But for the backbone's batch norms, unless these are frozen. In float64: a norm over a few
    values makes much of what float32 rounds differently."""
    model = make(decoder).double().train()
    freeze_batch_norm_2d(model.encoder)
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    torch.manual_seed(1)  # FPN's decoder drops channels at random
    dropout = [m for m in model.modules() if isinstance(m, nn.Dropout2d)]
    for module in dropout:
        module.eval()
    together = model(images)
    for image, logits in zip(images, together, strict=True):
        torch.testing.assert_close(model(image[None])[0], logits, rtol=1e-9, atol=1e-9)


def test_multiples_of_32_are_as_segmentation_models_has_them() -> None:
    """UPerNet needs nothing of ours but the norm; sizes between are the padded image, cropped."""
    model = make("upernet").eval()
    theirs = smp.UPerNet(
        "tu-setformer_mini", encoder_weights=None, classes=5, **TINY, **NARROW["upernet"]
    ).eval()
    names = {n: m for n, m in theirs.decoder.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for name, norm in names.items():
        parent, _, child = name.rpartition(".")
        groups = nn.GroupNorm(16, norm.num_features)
        setattr(theirs.decoder.get_submodule(parent), child, groups)
    theirs.decoder.load_state_dict(model.decoder.state_dict())
    theirs.segmentation_head.load_state_dict(model.head.state_dict())
    flat = model.backbone.state_dict()
    own = theirs.encoder.model.state_dict()
    theirs.encoder.model.load_state_dict(
        {name: flat[name.replace("stages_", "stages.")] for name in own}
    )
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(model(image), theirs(image), rtol=1e-4, atol=1e-5)
        cut = image[..., :50, :77]
        padded = np.pad(cut.numpy(), ((0, 0), (0, 0), (0, 14), (0, 19)), mode="edge")
        expected = theirs(torch.from_numpy(padded))[..., :50, :77]
        torch.testing.assert_close(model(cut), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decoder", DECODERS)
def test_stages_are_normed_for_decoders_that_do_not(decoder: str) -> None:
    model = make(decoder).eval()
    for parameter in model.norms.parameters():
        nn.init.normal_(parameter)
    given: list[torch.Tensor] = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: given.extend(inputs[0][-4:]))
    image = torch.randn(1, 3, 64, 96)
    model(image)
    stages = model.backbone.forward_intermediates(image, intermediates_only=True)
    for found, stage, norm in zip(given, stages, model.norms[-4:], strict=True):
        expected = stage
        if decoder != "upernet":
            channels_last = stage.movedim(1, -1)
            normed = F.layer_norm(channels_last, stage.shape[1:2], norm.weight, norm.bias, 1e-6)
            expected = normed.movedim(-1, 1)
        torch.testing.assert_close(found, expected)


def test_other_backbones_and_what_is_refused() -> None:
    assert Segmenter("resnet10t", 3, "unet")(torch.randn(1, 3, 40, 50)).shape == (1, 3, 40, 50)
    with pytest.raises(ValueError, match="expected one of upernet, fpn, unet, got 'psp'"):
        Segmenter("setformer_mini", 3, "psp")
    with pytest.raises(TypeError, match="width"):
        Segmenter("setformer_mini", 3, "fpn", {"width": 3})


def test_card_gives_the_model_back() -> None:
    import json

    model = make("fpn").eval()
    card = {
        "model": "setformer_mini",
        "model_options": TINY,
        "classes": ["a", "b", "c", "d", "e"],
        "decoder": "fpn",
        "decoder_options": NARROW["fpn"],
    }
    again = from_card(json.loads(json.dumps(card))).eval()
    again.load_state_dict(model.state_dict())
    image = torch.randn(1, 3, 40, 40)
    assert torch.equal(again(image), model(image))


class Colours(nn.Module):
    """The channels as logits, of images no larger than a window."""

    def __init__(self, largest: int = 10**6) -> None:
        super().__init__()
        self.largest = largest
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert max(x.shape[-2:]) <= self.largest
        self.seen.append(tuple(x.shape[-2:]))
        return x


@pytest.mark.parametrize("size", [(50, 70), (20, 45), (10, 10), (32, 33)])
def test_windows_cover_the_image_and_keep_places(size: tuple[int, int]) -> None:
    image = torch.randn(3, *size)
    model = Colours(largest=32)
    assert torch.equal(segment(model, image, window=32), image.argmax(0))
    assert all(min(s, 32) == got for seen in model.seen for s, got in zip(size, seen, strict=True))
    assert len(model.seen) == {(50, 70): 6, (20, 45): 2, (10, 10): 1, (32, 33): 2}[size]


def test_windows_average_where_they_overlap() -> None:
    """A model whose answer depends on the place in the window, in one dimension, by hand."""

    class Ramp(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            ramp = torch.arange(float(x.shape[-1])).expand(x.shape[0], 1, *x.shape[-2:])
            return torch.cat([ramp, torch.full_like(ramp, 2.2)], 1)

    # Windows of 6 start at 0 and 4 of 10. Means of the ramps: 0 1 2 3 (4+0)/2 (5+1)/2 2 3 4 5.
    labels = segment(Ramp(), torch.zeros(3, 6, 10), window=6)
    assert labels[0].tolist() == [1, 1, 1, 0, 1, 0, 1, 0, 0, 0]


def test_short_side_is_brought_to_size_and_back() -> None:
    image = torch.zeros(3, 60, 90)
    image[1, :, 45:] = 1
    image[0] = 0.5
    model = Colours()
    labels = segment(model, image, short_side=20)
    assert model.seen == [(20, 30)]
    assert labels.shape == (60, 90)
    assert (labels[:, :42] == 0).all()
    assert (labels[:, 48:] == 1).all()


def test_logits_are_brought_back_to_size_linearly() -> None:
    """By hand: those of class 1, -1 and 3, become -1 -1 -0.5 0.5 1.5 2.5 3 3."""

    def model(x: torch.Tensor) -> torch.Tensor:
        assert x.shape[-2:] == (2, 2)
        return torch.tensor([[0.0, 0.0], [-1.0, 3.0]]).unsqueeze(1).expand(2, 2, 2).unsqueeze(0)

    labels = segment(model, torch.zeros(3, 8, 8), short_side=2)
    assert labels.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1]] * 8


def test_upernet_of_transformers() -> None:
    """Its decoder on our backbone, trained for a few steps: the loss falls."""
    transformers = pytest.importorskip("transformers")
    backbone = transformers.TimmBackboneConfig(
        backbone="setformer_mini",
        out_indices=(0, 1, 2, 3),
        use_pretrained_backbone=False,
        features_only=True,
    )
    config = transformers.UperNetConfig(
        backbone_config=backbone,
        hidden_size=32,
        num_labels=3,
        auxiliary_in_channels=256,
        auxiliary_channels=16,
    )
    model = transformers.UperNetForSemanticSegmentation(config)
    widths = timm.create_model("setformer_mini", features_only=True).feature_info.channels()
    assert widths[2] == config.auxiliary_in_channels
    images = torch.zeros(2, 3, 64, 96)  # two: the pooled pixel of one image has no batch statistics
    for i in range(3):
        images[:, i, :, 32 * i : 32 * (i + 1)] = 1  # three stripes, of a colour each
    labels = images.argmax(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(8):
        output = model(pixel_values=images, labels=labels)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert output.logits.shape == (2, 3, 64, 96)
    assert losses[-1] < 0.8 * losses[0], losses


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (1, 7)])
def test_a_line_of_pixels_is_not_enlarged_to_gigabytes(size: tuple[int, int]) -> None:
    image = torch.zeros(3, *size)
    image[0] = torch.arange(image[0].numel()).view(size) % 2
    seen = []

    def model(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape[-2:])
        return torch.cat([0.5 - x[:, :1], x[:, :1] - 0.5], 1)

    labels = segment(model, image, short_side=512)
    assert labels.shape == size
    assert max(seen[0]) <= max(16_384, *size)
    if max(size) > 16_384:  # as it is
        assert torch.equal(labels, image[0].long())


def test_usual_images_are_brought_to_the_shorter_side() -> None:
    assert enlargement((300, 400), 0) == 1
    assert enlargement((300, 400), 600) == 2
    assert enlargement((400, 100), 50) == 0.5
    assert enlargement((100, 40_000), 50) == 0.5
