"""What becomes of images, boxes, labels and texts on their way to a model, by hand: constants of
the normalisation, high frequencies, borders, and documents that are held out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from few_images import COLOUR, MEAN, STD, make_classify, write_boxes, write_classes, write_segments
from setformer_ext.cli.demo.data import load_folder
from setformer_ext.cli.predict.answers import Segmentation
from setformer_ext.cli.predict.predictors import PREDICTORS
from setformer_ext.cli.themes import resized
from setformer_ext.cli.train.ade20k import IGNORED, Labels
from setformer_ext.cli.train.coco import Coco
from setformer_ext.cli.train.coco_records import read_box
from setformer_ext.cli.train.glue import Glue
from setformer_ext.cli.train.mlm import Mlm
from setformer_ext.cli.train.segment import Segment, plain
from setformer_ext.cli.train.task import DataError
from setformer_ext.vision.detection import mask_rcnn
from setformer_ext.vision.segmentation import segment
from text_runs import write_text_run
from training import options_of

GREY = round(0.299 * 200 + 0.587 * 100 + 0.114 * 30)  # ITU-R 601, as Pillow has it


def checkerboard(size: int) -> np.ndarray:
    """Black and white pixels in turn, whose mean is 127.5."""
    rows, columns = np.indices((size, size))
    return np.uint8(255 * ((rows + columns) % 2))


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_a_classifier_are_normalised_by_its_constants(
    channels: int, tmp_path: Path
) -> None:
    """Grey images by the means of the three constants."""
    root = write_classes(tmp_path, Image.new("RGB", (40, 40), COLOUR))
    task = make_classify(root, f"--in-chans={channels}")
    if channels == 3:
        values = [(c / 255 - m) / s for c, m, s in zip(COLOUR, MEAN, STD, strict=True)]
    else:
        values = [(GREY / 255 - sum(MEAN) / 3) / (sum(STD) / 3)]
    expected = torch.tensor(values).view(-1, 1, 1).expand(-1, 32, 32)
    for data in (task.train, task.eval):
        image, _ = data[0]
        torch.testing.assert_close(image, expected)
    card = task.card()
    assert card["mean"] == pytest.approx(MEAN if channels == 3 else [sum(MEAN) / 3])
    assert card["std"] == pytest.approx(STD if channels == 3 else [sum(STD) / 3])


def test_images_of_a_segmenter_are_normalised_by_its_constants(tmp_path: Path) -> None:
    labels = np.full((40, 40), 1, np.uint8)
    labels[:, 20:] = 2
    write_segments(tmp_path, Image.new("RGB", (40, 40), COLOUR), labels)
    given = (f"--data={tmp_path}", "--crop=16", "--no-photometric", "--short-side=0")
    task = Segment(options_of(Segment, *given, "--scale-jitter", "1", "1"))
    values = [(c / 255 - m) / s for c, m, s in zip(COLOUR, MEAN, STD, strict=True)]
    for data, size in ((task.train, 16), (task.eval, 40)):
        expected = torch.tensor(values).view(-1, 1, 1).expand(-1, size, size)
        torch.testing.assert_close(data[0][0], expected)


def test_images_of_a_detector_are_normalised_by_its_constants() -> None:
    torch.manual_seed(0)
    model = mask_rcnn("setformer_mini", num_classes=3, min_size=64, max_size=64)
    image = torch.tensor(COLOUR).view(3, 1, 1).expand(3, 64, 64) / 255
    found, _ = model.transform([image])
    values = [(c / 255 - m) / s for c, m, s in zip(COLOUR, MEAN, STD, strict=True)]
    torch.testing.assert_close(
        found.tensors[0], torch.tensor(values).view(3, 1, 1).expand(3, 64, 64)
    )


def test_high_frequencies_do_not_alias_when_images_shrink(tmp_path: Path) -> None:
    """Of pixels that are black and white in turn a smaller image shows their mean, not every other
    one: what a resize without antialiasing would take for black or white."""
    board = checkerboard(128)
    root = write_classes(tmp_path / "classes", Image.fromarray(board))
    task = make_classify(root, "--in-chans=1", "--crop-scale=1")
    grey = (0.5 - sum(MEAN) / 3) / (sum(STD) / 3)
    for data in (task.train, task.eval):
        assert (data[0][0] - grey).abs().max() < 0.1

    loaded = load_folder(tmp_path / "classes" / "train", image_size=32, seed=0)
    assert (loaded.train - 0.5).abs().max() < 0.05

    seen = []

    def model(x: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, 2, H, W]
        seen.append(x)
        return x[:, :2]

    image = torch.from_numpy(board / 255).float().expand(3, -1, -1)
    assert segment(model, image, short_side=48).shape == (128, 128)
    assert seen[0].shape == (1, 3, 48, 48)
    assert (seen[0][..., 2:-2, 2:-2] - 0.5).abs().max() < 0.05
    drawn = resized(image, (30, 50), "bicubic")  # a fourth would be the mean by symmetry
    assert drawn.shape == (30, 50, 3)
    assert (drawn - 0.5).abs().max() < 0.05


def test_detectors_interpolate_between_pixels_without_antialiasing() -> None:
    """torchvision's own resizing, which is part of its models. A fourth as large, it takes the two
    pixels in the middle of each four, so that one white column of four can be seen or not."""
    torch.manual_seed(0)
    model = mask_rcnn("setformer_mini", num_classes=3, min_size=32, max_size=32)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    for place, level in enumerate((0.0, 0.5, 0.5, 0.0)):
        image = torch.zeros(3, 128, 128)
        image[..., place::4] = 1
        found, _ = model.transform([image])
        assert found.tensors.shape == (1, 3, 32, 32)
        expected = torch.full((3, 32, 32), level)
        torch.testing.assert_close(found.tensors[0] * std + mean, expected)


def test_views_to_segment_shrink_without_aliases_and_labels_without_mixtures(
    tmp_path: Path,
) -> None:
    labels = np.where(checkerboard(96) > 0, 3, 1).astype(np.uint8)
    labels[:4] = 2
    write_segments(tmp_path, Image.fromarray(checkerboard(96)), labels)
    given = (f"--data={tmp_path}", "--crop=24", "--no-photometric", "--short-side=32")
    task = Segment(options_of(Segment, *given, "--scale-jitter", "1", "1"))
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    for _ in range(5):
        image, classes = task.train[0]
        assert ((image * std + mean) - 0.5).abs()[:, 2:-2, 2:-2].max() < 0.1
        assert {*classes.unique().tolist()} <= {0, 1, 2}


@pytest.mark.parametrize(("short_side", "size"), [(0, (40, 60)), (48, (48, 72))])
def test_segmenters_see_images_of_the_size_that_is_asked_for(
    short_side: int, size: tuple[int, int], tmp_path: Path
) -> None:
    """In an evaluation, and for an answer."""
    seen = []

    class Recorder(nn.Module):
        def forward(self, x: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, 2, H, W]
            seen.append(x.shape)
            return x[:, :2]

    image = Image.new("RGB", (60, 40), COLOUR)
    root = write_segments(tmp_path, image, np.tile(np.uint8([1, 2]), (40, 30)))
    model = ("--model=setformer_mini", "--decoder=fpn")
    task = Segment(options_of(Segment, f"--data={root}", *model, f"--short-side={short_side}"))
    task.metrics().update(Recorder(), task.collate([task.eval[0]]))
    predictor = PREDICTORS["segment"](task.card())
    predictor.model = Recorder()
    assert isinstance(answer := predictor(image), Segmentation)
    assert answer.labels.shape == (40, 60)
    assert seen == [(1, 3, *size)] * 2


@pytest.mark.parametrize(
    ("given", "corners", "far"),
    [
        ([0, 0, 80, 60], (0, 0, 80, 60), False),  # the image itself
        ([0.5, 0.25, 79.5, 59.75], (0.5, 0.25, 80, 60), False),
        ([-0.75, 10, 20, 5], (0, 10, 19.25, 15), False),  # rounding
        ([10, -0.75, 5, 20], (10, 0, 15, 19.25), False),
        ([70, 10, 10.75, 5], (70, 10, 80, 15), False),
        ([10, 50, 5, 10.75], (10, 50, 15, 60), False),
        ([-1, -1, 82, 62], (0, 0, 80, 60), False),  # a pixel is rounding still
        ([-1.5, 10, 20, 5], (0, 10, 18.5, 15), True),
        ([10, -1.5, 5, 20], (10, 0, 15, 18.5), True),
        ([70, 10, 11.5, 5], (70, 10, 80, 15), True),
        ([10, 50, 5, 11.5], (10, 50, 15, 60), True),
        ([79, 59, 1, 1], (79, 59, 80, 60), False),  # the last pixel
    ],
)
def test_boxes_at_and_beyond_each_border(
    given: list[float], corners: tuple[float, ...], far: bool
) -> None:
    assert read_box(given, 80, 60) == (corners, far)


@pytest.mark.parametrize(
    "given", [[-5, 10, 5, 5], [10, -5, 5, 5], [80, 10, 5, 5], [10, 60, 5, 5], [-9, -9, 3, 3]]
)
def test_boxes_that_only_touch_a_border_are_outside(given: list[float]) -> None:
    with pytest.raises(ValueError, match="is outside its image of 80 x 60"):
        read_box(given, 80, 60)


def test_boxes_at_the_borders_reach_the_model_as_they_are(tmp_path: Path) -> None:
    boxes = [[0, 0, 8, 6], [72, 54, 8, 6], [0, 54, 8, 6], [72, 0, 8, 6], [0, 0, 80, 60]]
    write_boxes(tmp_path, Image.new("RGB", (80, 60)), boxes)
    file = tmp_path / "annotations" / "instances_train2017.json"
    _, target = Coco(tmp_path / "train2017", file, masks=True, crowds=False)[0]
    for mask, found, (x, y, w, h) in zip(target["masks"], target["boxes"], boxes, strict=True):
        assert found.tolist() == [x, y, x + w, y + h]
        expected = torch.zeros(60, 80, dtype=torch.uint8)
        expected[y : y + h, x : x + w] = 1
        assert torch.equal(mask.as_subclass(Tensor), expected)


@pytest.mark.parametrize(
    ("ignored", "given", "classes"),
    [
        (0, [0, 1, 2, 3], [IGNORED, 0, 1, 2]),
        (255, [0, 1, 2, 255], [0, 1, 2, IGNORED]),  # beyond the classes
        (1, [0, 1, 2], [0, IGNORED, 2]),  # one of the classes' own numbers
        (None, [0, 1, 2], [0, 1, 2]),
    ],
)
def test_ignored_labels_inside_and_outside_the_range_of_classes(
    ignored: int | None, given: list[int], classes: list[int]
) -> None:
    labels = Labels(("a", "b", "c"), ignored)
    assert labels.to_classes(np.array([given]), Path("x")).tolist() == [classes]
    last = 3 if ignored == 0 else 2
    for beyond in (last + 1, 254):
        with pytest.raises(DataError, match=f"x: has the labels {beyond}"):
            labels.to_classes(np.array([[*given, beyond]]), Path("x"))


def test_what_is_held_out_is_not_trained_on(tmp_path: Path) -> None:
    """Every hundredth document, from the hundredth on; no word of it is among those of training."""
    documents = [" ".join(chr(97 + int(digit)) for digit in f"{n:03}") for n in range(250)]
    words = [document.replace(" ", "") for document in documents]
    file = tmp_path / "text.txt"
    file.write_text("\n".join(" ".join([word] * 9) for word in words), encoding="utf-8")
    given = (f"--data={file}", "--sequence-length=10", "--vocab-size=2000")
    (options,) = Mlm.split(options_of(Mlm, *given))
    task = Mlm(options)

    def texts(tokens: np.ndarray) -> set[str]:
        return {*task.tokenizer.decode(tokens.tolist()).replace("[SEP]", " ").split()}

    assert texts(task.eval.tokens) == {words[99], words[199]}
    assert texts(task.train.tokens) == {*words} - {words[99], words[199]}


@pytest.mark.parametrize(("given", "words"), [((), {"ada", "bob"}), (("--cased",), {"Ada", "BOB"})])
def test_capital_letters_are_kept_where_asked_for(
    given: tuple[str, ...], words: set[str], tmp_path: Path
) -> None:
    """In sequences of the length that was asked for."""
    file = tmp_path / "text.txt"
    file.write_text("Ada BOB\n" * 400, encoding="utf-8")
    sizes = ("--sequence-length=10", "--vocab-size=100")
    (options,) = Mlm.split(options_of(Mlm, f"--data={file}", *sizes, *given))
    task = Mlm(options)
    assert {*task.tokenizer.decode(task.train.tokens.tolist()).split()} == {*words, "[SEP]"}
    assert task.train[0][0].shape == task.eval[0][0].shape == (10,)


@pytest.mark.parametrize("length", [8, 20])
def test_texts_are_cut_to_the_length_that_is_asked_for(length: int, tmp_path: Path) -> None:
    """To a beginning of them, between the first and the last special token."""
    (tmp_path / "SST-2").mkdir()
    for name in ("train", "dev"):
        lines = ["sentence\tlabel", f"{'a plot so dull ' * 9}\t0", "is it ?\t1"]
        (tmp_path / "SST-2" / f"{name}.tsv").write_text("\n".join(lines), encoding="utf-8")
    model = write_text_run(tmp_path / "model", "mlm")
    given = (f"--data={tmp_path}", f"--model={model}", f"--sequence-length={length}")
    (options,) = Glue.split(options_of(Glue, "--task=sst2", *given))
    task = Glue(options)
    inputs, labels, _ = task.collate(task.train)
    assert inputs["input_ids"].shape == (2, length)
    assert labels.tolist() == [0, 1]
    words = task.tokenizer.decode(inputs["input_ids"][0]).split()
    assert words[0] == "[CLS]"
    assert words[-1] == "[SEP]"
    assert ("a plot so dull " * 9).startswith(" ".join(words[1:-1]))


def test_plain_images_and_masks_are_as_they_were() -> None:
    from torchvision.tv_tensors import Image as Pixels
    from torchvision.tv_tensors import Mask

    image = Pixels(torch.randint(256, (3, 5, 7), dtype=torch.uint8))
    mask = Mask(torch.randint(4, (5, 7)))
    found, labels = plain(MEAN, STD)(image, mask)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(found, (image.as_subclass(Tensor) / 255 - mean) / std)
    assert torch.equal(labels, mask.as_subclass(Tensor))
