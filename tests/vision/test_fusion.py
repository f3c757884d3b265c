"""Batch norms: as part of the layers before them, shared by processes, and frozen."""

import copy

import pytest
import timm
import torch
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn

from setformer_ext.vision import Setformer, fuse_norms
from setformer_ext.vision.detection import retinanet

SMALL = {
    "dims": (32, 32, 64, 64),
    "depths": (1, 1, 2, 1),
    "num_references": (4, 4, 4, 4),
    "num_classes": 7,
}


def make(**options: object) -> Setformer:
    """With statistics, weights and biases of norms that are not those of a start."""
    torch.manual_seed(0)
    model = timm.create_model("setformer_mini", **{**SMALL, **options}).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias):
                nn.init.normal_(tensor)
            for tensor in (module.running_var, module.weight):
                nn.init.uniform_(tensor, 0.5, 2)
    return model


def norms(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize("features_only", [False, True])
def test_fused_model_gives_the_same(features_only: bool) -> None:
    """In float64 to its rounding: a few thousand sums of products, of which each is off by eps."""
    model = make(features_only=features_only).double()
    fused, batch = fuse_norms(model), torch.randn(2, 3, 45, 70).double()
    tolerance = 1e4 * torch.finfo(torch.float64).eps
    torch.testing.assert_close(fused(batch), model(batch), rtol=tolerance, atol=tolerance)
    last = [] if features_only else ["norm"]
    assert norms(fused) == [name for name in norms(model) if "attention" in name] + last
    torch.testing.assert_close(fuse_norms(fused)(batch), fused(batch), rtol=0, atol=0)


def test_fused_model_is_as_exact_in_float32() -> None:
    """Beside the model itself in float64."""
    model, batch = make(), torch.randn(2, 3, 64, 64)
    exact = copy.deepcopy(model).double()(batch.double())
    scale = exact.abs().max() * torch.finfo(torch.float32).eps
    allowed = 4 * (model(batch) - exact).abs().max() + 4 * scale
    assert (fuse_norms(model)(batch) - exact).abs().max() <= allowed


def test_fused_model_is_a_copy() -> None:
    model = make()
    before = copy.deepcopy(model.state_dict())
    fuse_norms(model).requires_grad_(False)
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_detector_is_fused() -> None:
    torch.manual_seed(0)
    body = make(features_only=True, num_classes=0)
    detector = retinanet(body, 3, pyramid_channels=16, min_size=64, max_size=64).eval()
    levels, images = fuse_norms(detector).backbone, torch.randn(1, 3, 64, 64)
    for name, level in detector.backbone(images).items():
        torch.testing.assert_close(levels(images)[name], level, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("module", ["", "stages.1"])
def test_a_model_in_training_is_refused(module: str) -> None:
    model = make()
    model.get_submodule(module).train()
    got = f"(module '{module}')" if module else "training mode; "
    with pytest.raises(ValueError, match=r"fuse_norms: model must be in eval mode, got ") as raised:
        fuse_norms(model)
    assert got in str(raised.value)
    assert "call model.eval() first" in str(raised.value)


def test_synchronised_norms_are_the_same_layers() -> None:
    """SyncBatchNorm trains on GPUs alone; in eval mode it shows that it got images as they lie."""
    model, batch = make(), torch.randn(2, 3, 45, 70)
    expected, known = model(batch), norms(model)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    found = [n for n, m in converted.named_modules() if isinstance(m, nn.SyncBatchNorm)]
    assert found == known
    torch.testing.assert_close(converted(batch), expected)
    torch.testing.assert_close(fuse_norms(converted)(batch), fuse_norms(model)(batch))


def test_frozen_norms_see_no_other_image() -> None:
    model, batch = make(), torch.randn(3, 3, 40, 56)
    expected = model(batch)
    frozen = freeze_batch_norm_2d(model).train()
    torch.testing.assert_close(frozen(batch), expected)
    torch.testing.assert_close(frozen(batch[:1]), expected[:1])


def test_statistics_are_those_of_the_batch_and_are_remembered() -> None:
    """The stem's first norm, by hand: biased variance for the output, unbiased for later."""
    model, batch = make().train(), torch.randn(3, 3, 40, 56)
    layer = model.stem.first
    before: Tensor = layer.norm.running_var.clone()
    x = layer.conv(batch)
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
    weight, bias = (p.view(-1, 1, 1) for p in (layer.norm.weight, layer.norm.bias))
    expected = weight * (x - mean) / (variance + 1e-5).sqrt() + bias
    torch.testing.assert_close(layer(batch), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.norm.running_var, 0.9 * before + 0.1 * x.var((0, 2, 3)))
