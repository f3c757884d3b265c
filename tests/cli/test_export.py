"""setformer export: other runtimes give the model's answers, at any size and number."""

import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor
from torch.export import Dim

import setformer_ext.cli.export
from setformer_ext import cli
from setformer_ext.cli.export import _check, _export
from setformer_ext.cli.predict.loading import load_run, load_text_run
from setformer_ext.cli.predict.networks import Texts, _difference, load_network
from setformer_ext.errors import UserError
from setformer_ext.onnx import _adaptive_average
from setformer_ext.onnx import export as export_onnx
from setformer_ext.vision.detection import from_card as make_detector
from setformer_ext.vision.segmentation import from_card as make_segmenter
from test_predict import BODY, COMMON, DETECT, SEGMENT, write_run
from text_runs import LENGTH, write_text_run

CLASSIFY = COMMON | {
    "task": "classify",
    "model_options": BODY | {"num_classes": 2},
    "input_size": [3, 64, 64],
    "interpolation": "bicubic",
    "crop_pct": 0.9,
}
SMALL = {"rpn_post_nms_top_n_test": 50, "pyramid_channels": 32}


def export(capsys: pytest.CaptureFixture, run: Path, file: Path) -> tuple[int, str, str]:
    capsys.readouterr()
    status = cli.main(["export", str(run), str(file)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, captured.out, captured.err


def answer(file: Path, **inputs: Tensor) -> tuple[Tensor, dict[str, str]]:
    """The logits of onnxruntime, and the file's metadata."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file)
    (logits,) = session.run(["logits"], {name: x.numpy() for name, x in inputs.items()})
    return torch.from_numpy(logits), session.get_modelmeta().custom_metadata_map


def make(card: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    if card["task"] == "segment":
        return make_segmenter(card)
    return timm.create_model(card["model"], **card["model_options"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "card",
    [
        CLASSIFY | {"model": "test_resnet", "model_options": {"num_classes": 2}},
        SEGMENT | {"model": "test_resnet", "model_options": {}},
    ],
    ids=["classify", "segment"],
)
def test_images_of_any_size(card: dict, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run, file = write_run(tmp_path / "run", card, make(card)), tmp_path / "new" / "model.onnx"
    status, out, err = export(capsys, run, file)
    assert status == 0, err
    assert "images -> logits; differs from torch by" in out
    assert "at 2 x 96 x 128, 1 x 160 x 64, 3 x 131 x 77" in out
    model = load_run(run).model
    for shape in ((1, 3, 64, 64), (5, 3, 70, 201)):
        images = torch.randn(shape)
        logits, metadata = answer(file, images=images)
        with torch.no_grad():
            torch.testing.assert_close(logits, model(images), rtol=1e-3, atol=1e-3)
    assert json.loads(metadata["classes"]) == ["cat", "dog"]
    assert json.loads(metadata["mean"]) == COMMON["mean"]
    assert json.loads(metadata["std"]) == COMMON["std"]
    assert "RGB images" in metadata["preprocessing"]
    assert "minus mean, divided by std" in metadata["preprocessing"]


@pytest.mark.slow
def test_images_of_the_one_size_that_a_model_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = {"num_classes": 2, "img_size": 64, "in_chans": 1}
    card = CLASSIFY | {"model": "test_vit", "model_options": options, "input_size": [1, 64, 64]}
    card |= {"mean": [0.5], "std": [0.2]}
    run, file = write_run(tmp_path / "run", card, make(card)), tmp_path / "model.onnx"
    status, out, err = export(capsys, run, file)
    assert status == 0, err
    assert "at 2 x 64 x 64, 1 x 64 x 64, 3 x 64 x 64" in out
    logits, metadata = answer(file, images=torch.randn(4, 1, 64, 64))
    assert logits.shape == (4, 2)
    assert "grey images" in metadata["preprocessing"]


@pytest.fixture(scope="module")
def exported_texts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, str]]:
    """The folder of a training of a task, with its model.onnx, and what the command printed."""

    @cache
    def of_task(task: str) -> tuple[Path, str]:
        run = write_text_run(tmp_path_factory.mktemp(task) / "run", task)
        with redirect_stdout(StringIO()) as out:
            assert cli.main(["export", str(run), str(run / "model.onnx")]) == 0
        return run, out.getvalue()

    return of_task


@pytest.mark.slow
@pytest.mark.parametrize("task", ["mlm", "sst2"])
def test_texts_of_any_length(task: str, exported_texts: Callable[[str], tuple[Path, str]]) -> None:
    run, out = exported_texts(task)
    assert f"at 2 x 8, 1 x 5, 3 x {LENGTH}" in out
    predictor = load_text_run(run)
    texts = ["the film is superb .", "is it ?", "a plot so dull , and a cast so tired ! " * 3]
    inputs = dict(predictor.tokenizer(texts, padding=True, return_tensors="pt"))
    logits, metadata = answer(run / "model.onnx", **inputs)
    with torch.no_grad():
        torch.testing.assert_close(logits, predictor.model(**inputs).logits, rtol=1e-3, atol=1e-4)
    assert "texts as the tokenizer of the training gives them" in metadata["preprocessing"]
    if task == "sst2":
        assert json.loads(metadata["classes"]) == ["0", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("detector", ["mask_rcnn", "retinanet"])
def test_objects_in_an_image_of_any_size(
    detector: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """SeT attention is in them, written out."""
    few = {
        "retinanet": {"score_thresh": 0.0, "detections_per_img": 30},
        "mask_rcnn": {"box_score_thresh": 0.0, "box_detections_per_img": 30} | SMALL,
    }
    card = DETECT | {"detector": detector}
    card["detector_options"] = DETECT["detector_options"] | few[detector]
    torch.manual_seed(0)
    model = make_detector(card)
    for name, parameter in model.named_parameters():  # so that there are no near ties
        if "cls_" in name and name.endswith("weight"):
            parameter.detach().mul_(5)
    run, file = write_run(tmp_path / "run", card, model), tmp_path / "model.onnx"
    status, out, err = export(capsys, run, file)
    assert status == 0, err
    assert "image -> boxes, labels, scores" in out
    assert "objects in noise, at 96 x 128, 160 x 64, 131 x 77" in out
    import onnxruntime

    session = onnxruntime.InferenceSession(file)
    image = torch.rand(3, 64, 96)  # which is not resized
    found = dict(
        zip(
            (output.name for output in session.get_outputs()),
            map(torch.from_numpy, session.run(None, {"image": image.numpy()})),
            strict=True,
        )
    )
    with torch.no_grad():
        (expected,) = load_run(run).model([image])
    assert len(expected["boxes"]) > 10
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found["scores"], expected["scores"], rtol=1e-3, atol=1e-5)
    # Those of equal scores may have changed places.
    distances = (found["boxes"][:, None] - expected["boxes"]).abs().amax(-1)
    distances[found["labels"][:, None] != expected["labels"]] = torch.inf
    nearest, places = distances.min(0)
    assert (nearest < 0.01).float().mean() > 0.95
    if detector == "mask_rcnn":
        difference = (found["masks"][places] - expected["masks"])[nearest < 0.01].abs()
        assert difference.flatten(1).amax(1).median() < 1e-3


@pytest.mark.slow
def test_batches_of_other_sizes_than_the_examples_are_tried(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of one size alone is not written."""
    monkeypatch.setattr(Texts, "dynamic_shapes", lambda self: None)
    run, file = write_text_run(tmp_path / "run", "sst2"), tmp_path / "model.onnx"
    status, _, err = export(capsys, run, file)
    assert (status, "onnxruntime fails at 1 x 5" in err) == (1, True)
    assert not file.exists()


@pytest.mark.slow
def test_wrong_answers_are_not_written(
    exported_texts: Callable[[str], tuple[Path, str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (run, _), file = exported_texts("sst2"), tmp_path / "model.onnx"
    file.write_bytes(b"before")
    import onnx

    made = onnx.load(run / "model.onnx")

    def spoiled(network):
        with torch.no_grad():
            network.model.model.classifier.bias.add_(1)
        return made

    monkeypatch.setattr(setformer_ext.cli.export, "_export", spoiled)
    status, _, err = export(capsys, run, file)
    assert (status, "onnxruntime's answers differ from torch's by" in err) == (1, True)
    assert file.read_bytes() == b"before"

    def without_numbers(network):
        for tensor in made.graph.initializer:
            if "classifier.bias" in tensor.name:
                numbers = np.full_like(onnx.numpy_helper.to_array(tensor), np.nan)
                tensor.CopyFrom(onnx.numpy_helper.from_array(numbers, tensor.name))
        return made

    monkeypatch.setattr(setformer_ext.cli.export, "_export", without_numbers)
    status, _, err = export(capsys, run, file)
    assert (status, "differ from torch's by nan" in err) == (1, True)
    assert file.read_bytes() == b"before"


@pytest.mark.slow
def test_detectors_with_a_wrong_head_are_not_written(tmp_path: Path) -> None:
    """Even where no object is sure enough to be found."""
    card = DETECT | {"detector_options": DETECT["detector_options"] | SMALL}
    torch.manual_seed(0)
    network = load_network(write_run(tmp_path / "run", card, make_detector(card)))
    data = _export(network)
    network.sizes = network.sizes[:1]
    for part in ("rpn.head.bbox_pred", "roi_heads.box_predictor.cls_score"):
        weight = network.model.model.get_submodule(part).weight.data
        weight.mul_(1.01)
        with pytest.raises(UserError, match="of the largest output of a head"):
            _check(network, data)
        weight.div_(1.01)
    _check(network, data)


@pytest.mark.parametrize(("rounding", "allowed"), [(0, 1e-4), (2**-14, 10 * 2**-14)])
def test_answers_may_differ_by_little_or_ten_times_the_rounding(
    rounding: float, allowed: float
) -> None:
    """Shares of the largest logit, which is 2 here. Logits of no classes must agree."""
    expected = torch.tensor([[1.0, -2.0, -torch.inf]])
    exact = expected.double() + torch.tensor([2 * rounding, 0.0, 0.0])
    for share in (0.0, 0.9 * allowed, 1.1 * allowed):
        answer = expected + torch.tensor([0.0, 2 * share, 0.0])
        difference, most = _difference(answer, expected, exact)
        assert (difference, most) == (pytest.approx(share, abs=2**-23), pytest.approx(allowed))
    assert _difference(expected.clamp(min=-9), expected, exact) == (torch.inf, 0.0)


def test_pooling_into_bins_is_torchs() -> None:
    for size, bins in (((7, 12), (3, 5)), ((3, 4), (6, 6)), ((9, 1), (1, 2))):
        x = torch.tensor(np.random.default_rng(0).normal(size=(2, 3, *size)))
        expected = torch.nn.functional.adaptive_avg_pool2d(x, bins)
        torch.testing.assert_close(_adaptive_average(x, list(bins)), expected)


def test_pooling_into_bins_of_any_size(tmp_path: Path) -> None:
    """UPerNet has it; torch's own decomposition is of the example's size."""
    model, file = torch.nn.AdaptiveAvgPool2d((3, 5)), tmp_path / "pool.onnx"
    shapes = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    options = {"input_names": ["images"], "output_names": ["logits"]}
    export_onnx(model, (torch.randn(2, 3, 9, 11),), file, dynamic_shapes=shapes, **options)
    for size in ((9, 11), (2, 30), (17, 6)):
        images = torch.randn(4, 3, *size)
        torch.testing.assert_close(answer(file, images=images)[0], model(images))


def test_missing_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_text_run(tmp_path / "run", "sst2")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(SystemExit, match=r'onnxscript.*pip install "\.\[train,onnx\]"'):
        cli.main(["export", str(run), str(tmp_path / "model.onnx")])
