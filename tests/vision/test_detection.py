"""Detectors on the backbone: any sizes, every parameter learns, and the paper's sizes."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

import setformer_ext.vision  # noqa: F401 (registers the models)
from setformer_ext.vision.detection import (
    DETECTORS,
    Pyramid,
    Resizing,
    faster_rcnn,
    make_body,
    mask_rcnn,
    retinanet,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "vision"))

import model_sizes

TINY = {"dims": (32,) * 4, "depths": (1,) * 4, "num_references": (4,) * 4}
SMALL = {
    "backbone_options": TINY,
    "pyramid_channels": 32,
    "anchor_sizes": (8, 16, 32, 64, 128),
    "min_size": 96,
    "max_size": 160,
}
IMAGES = [(61, 83), (97, 50)]


def images() -> list[Tensor]:
    return [torch.rand(3, *size) for size in IMAGES]


def targets() -> list[dict[str, Tensor]]:
    """An object in the first image, none in the second."""
    return [
        {
            "boxes": torch.tensor([[5.0, 5.0, 40.0, 40.0]]),
            "labels": torch.tensor([3]),
            "masks": torch.ones(1, 61, 83, dtype=torch.uint8),
        },
        {
            "boxes": torch.zeros(0, 4),
            "labels": torch.zeros(0, dtype=torch.int64),
            "masks": torch.zeros(0, 97, 50, dtype=torch.uint8),
        },
    ]


@pytest.mark.slow
@pytest.mark.parametrize("group_norm", [False, True])
@pytest.mark.parametrize("make", [mask_rcnn, faster_rcnn, retinanet])
def test_images_of_any_sizes_and_without_objects(
    make: Callable[..., nn.Module], group_norm: bool
) -> None:
    model = make("setformer_mini", 3, group_norm=group_norm, **SMALL)
    losses = model(images(), targets())
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert model.backbone.body.model.stem.first.conv.weight.grad.abs().max() > 0
    if make is retinanet:
        model.score_thresh = 0.0
    for image, answer in zip(images(), model.eval()(images()), strict=True):
        height, width = image.shape[1:]
        assert 0 < len(answer["boxes"]) <= 300
        assert set(answer["labels"].tolist()) <= {0, 1, 2, 3}
        x0, y0, x1, y1 = answer["boxes"].T
        assert (x0 >= 0).all()
        assert (y0 >= 0).all()
        assert (x1 <= width).all()
        assert (y1 <= height).all()
        if make is mask_rcnn:
            assert answer["masks"].shape == (len(x0), 1, height, width)


EXTREME = [(2, 2), (1, 1), (1, 4000), (4000, 1), (3, 500)]


@pytest.mark.slow
@pytest.mark.parametrize("make", [mask_rcnn, faster_rcnn, retinanet])
def test_images_a_pixel_thin(make: Callable[..., nn.Module]) -> None:
    """Sides of 1 beside thousands, of which resizing the longer to 160 would leave nothing."""
    model = make("setformer_mini", 3, **SMALL)
    batch, targets = [torch.rand(3, *size) for size in EXTREME], []
    for height, width in EXTREME:
        target = {
            "boxes": torch.tensor([[0.0, 0.0, width, height]]),
            "labels": torch.tensor([3]),
            "masks": torch.ones(1, height, width, dtype=torch.uint8),
        }
        targets.append(target if targets else {key: value[:0] for key, value in target.items()})
    losses = model(batch, targets)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    model.eval()
    heads = getattr(model, "roi_heads", model)
    heads.score_thresh, heads.detections_per_img = 0.0, 5
    for (height, width), image in zip(EXTREME, batch, strict=True):
        (answer,) = model([image])
        x0, y0, x1, y1 = answer["boxes"].T
        assert len(x0) > 0
        assert ((x0 >= 0) & (y0 >= 0) & (x1 <= width) & (y1 <= height)).all()
        if make is mask_rcnn:
            assert answer["masks"].shape == (len(x0), 1, height, width)


def test_resizing_is_torchvisions_but_for_thin_images() -> None:
    mine, known = (
        kind(64, 160, [0.5] * 3, [0.5] * 3) for kind in (Resizing, GeneralizedRCNNTransform)
    )
    for size in ((61, 83), (3, 400), (1, 159), (400, 3)):
        image = torch.rand(3, *size)
        target = {"boxes": torch.rand(2, 4), "masks": torch.ones(2, *size, dtype=torch.uint8)}
        for got, expected in zip(
            mine.resize(image, {**target}), known.resize(image, {**target}), strict=True
        ):
            torch.testing.assert_close(got, expected)
    masks = torch.zeros(1, 1, 400, dtype=torch.uint8)
    masks[..., 100:200] = 1
    image = masks.float().expand(3, -1, -1)
    target = {"boxes": torch.tensor([[100.0, 0.0, 200.0, 1.0]]), "masks": masks}
    image, target = mine.resize(image, target)
    expected = torch.zeros(1, 160)
    expected[:, 40:80] = 1
    assert torch.equal(target["masks"][0].float(), expected)
    assert target["boxes"].tolist() == [[40, 0, 80, 1]]
    torch.testing.assert_close(image[0], expected)


@pytest.mark.parametrize("make", [mask_rcnn, faster_rcnn, retinanet])
def test_boxes_keep_their_precision_in_bfloat16(make: Callable[..., nn.Module]) -> None:
    """At 800 the next number after 800 is 804 in bfloat16."""
    model = make("setformer_mini", 3, **SMALL).eval()
    if make is retinanet:
        model.score_thresh = 0.0
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        (answer,) = model([torch.rand(3, 96, 160)])
    boxes = answer["boxes"]
    assert boxes.dtype == answer["scores"].dtype == torch.float32
    assert (boxes != boxes.bfloat16()).float().mean() > 0.5


def test_levels_are_torchvisions_pyramid_of_the_normed_stages() -> None:
    model = faster_rcnn("setformer_mini", 3, **SMALL).eval()
    pyramid: Pyramid = model.backbone
    x = torch.rand(2, 3, 75, 110)
    levels = list(pyramid(x).values())
    sizes = [(-(-75 // s), -(-110 // s)) for s in (4, 8, 16, 32, 64)]
    assert [tuple(level.shape) for level in levels] == [(2, 32, *size) for size in sizes]
    stages = pyramid.body(x)
    whole = timm.create_model("setformer_mini", **TINY).eval()
    whole.load_state_dict(pyramid.body.model.state_dict(), strict=False)
    for stage, known in zip(
        stages, whole.forward_intermediates(x, intermediates_only=True), strict=True
    ):
        torch.testing.assert_close(stage, known)
    top = pyramid.norms[3](stages[3])
    assert top.mean(1).abs().max() < 1e-4
    inner = pyramid.fpn.inner_blocks[3](top)
    torch.testing.assert_close(levels[3], pyramid.fpn.layer_blocks[3](inner))
    torch.testing.assert_close(levels[4], levels[3][..., ::2, ::2])


def test_group_norm_follows_every_convolution_before_the_predictors() -> None:
    for make, normed in ((faster_rcnn, 8 + 4), (mask_rcnn, 8 + 4 + 4), (retinanet, 6 + 4 + 4)):
        model = make("setformer_mini", 3, group_norm=True, **SMALL)
        norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
        assert len(norms) == normed
        assert all(norm.num_channels == 8 * norm.num_groups for norm in norms)
        assert not any(
            isinstance(module, nn.GroupNorm)
            for module in make("setformer_mini", 3, **SMALL).modules()
        )


def test_retinanet_takes_strides_from_8_to_128() -> None:
    model = retinanet("setformer_mini", 3, **SMALL)
    levels = model.backbone(torch.rand(1, 3, 128, 256)).values()
    assert [128 // level.shape[2] for level in levels] == [8, 16, 32, 64, 128]
    assert model.anchor_generator.sizes[0] == [8, 10, 13]


def test_anchors_of_a_level_have_one_area_and_three_shapes() -> None:
    """By hand: a side of 8 becomes 8 sqrt(2) = 11.3 and 5.7, of which halves are rounded."""
    anchors = faster_rcnn("setformer_mini", 3, **SMALL).rpn.anchor_generator.cell_anchors
    assert anchors[0].tolist() == [[-6, -3, 6, 3], [-4, -4, 4, 4], [-3, -6, 3, 6]]
    assert anchors[4].tolist() == [[-91, -45, 91, 45], [-64, -64, 64, 64], [-45, -91, 45, 91]]
    of_retinanet = retinanet("setformer_mini", 3, **SMALL).anchor_generator.cell_anchors
    assert of_retinanet[0][::3].tolist() == anchors[0].tolist()
    assert of_retinanet[4][::3].tolist() == anchors[4].tolist()


def test_other_backbones_and_their_normalisation() -> None:
    model = faster_rcnn("resnet18", 3, **SMALL | {"backbone_options": {}})
    assert list(model.transform.image_mean) == list(timm.get_pretrained_cfg("resnet18").mean)
    model(images(), targets())
    custom = make_body("setformer_mini", **TINY)
    model = faster_rcnn(custom, 2, **SMALL | {"image_mean": (0.5,) * 3})
    assert model.transform.image_mean == (0.5,) * 3
    assert model.backbone.body is custom


def test_what_is_no_backbone_for_a_pyramid() -> None:
    with pytest.raises(ValueError, match=r"strides \[4, 8, 16, 32\], got \[16, 16, 16, 16\]"):
        faster_rcnn("vit_tiny_patch16_224", 2)
    for make in DETECTORS.values():
        with pytest.raises(ValueError, match=r"anchor_sizes: expected five.*got \(8, 16\)"):
            make("setformer_mini", 2, **SMALL | {"anchor_sizes": (8, 16)})


@pytest.mark.slow
def test_sizes_are_those_of_the_paper() -> None:
    """And the counter's figure for a network is the one by hand."""
    figures = model_sizes.count()
    compared = [figure for figure in figures if figure.target is not None]
    assert [figure.target for figure in compared] == pytest.approx([69.07, 359.97, 82.41], abs=0.01)
    for figure in compared:
        assert abs(figure.deviation) < model_sizes.TOLERANCE, figure.row()
    linear = nn.Linear(30, 20)
    with model_sizes.FlopCounterMode(display=False) as counter:
        linear(torch.rand(10, 30))
    assert model_sizes._multiply_adds("", counter).counted == pytest.approx(10 * 30 * 20 / 1e9)


@pytest.mark.slow
def test_the_count_takes_torchvisions_own_heads() -> None:
    """The parts that are counted are those that the whole model runs through."""
    with torch.device("meta"):
        model = mask_rcnn("setformer_base", 80)
    heads = model.roi_heads
    assert heads.box_roi_pool.output_size == (7, 7)
    assert heads.mask_roi_pool.output_size == (14, 14)
    assert model.rpn._post_nms_top_n["testing"] == 1000
    assert heads.detections_per_img == 100
    assert heads.box_predictor.cls_score.out_features == 81
