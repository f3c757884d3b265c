"""For each task, a trained model and the data to measure it on, without the training data."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ..predict.loading import cards_explained, load_run, load_text_run, read_card
from .ade20k import Ade20k, read_names
from .classify import Accuracy, Classify
from .detect import AveragePrecision, Detect, read_split
from .detect import plain as plain_detection
from .glue import Scores, make_batch
from .glue_data import read_dev
from .labelled_images import LabelledImages, classes_without_images, files_left_out, find_classes
from .mlm import Mlm, Prediction, pack
from .segment import IntersectionOverUnion, Segment
from .segment import plain as plain_segmentation
from .task import Batch, DataError, Metrics, Samples, TrainingError
from .texts import read_documents, text_files

SPLITS = {"classify": "val", "detect": "val2017", "segment": "validation"}


class Examination(NamedTuple):
    """A model in eval mode, and all that its evaluation needs."""

    task: str
    model: nn.Module
    samples: Samples
    collate: Callable[[list[Any]], Batch]
    metrics: Metrics
    problems: list[str]  # records that were left out
    notes: list[str]  # what else a training reports about such data
    seed: int = 0  # of random draws


def prepare(options: argparse.Namespace) -> Examination:
    """The examination of a training that ``setformer evaluate``'s options ask for.

    Raises:
        UserError: if the training's output cannot be used.
        TrainingError: for data that cannot be used.
    """
    card = read_card(options.training)
    task = card["task"]
    if task != "mlm" and len(options.data) > 1:
        raise TrainingError(f"--data: expected one folder for {task}, got {len(options.data)}")
    if options.split is not None and task not in SPLITS:
        raise TrainingError(f"--split: of images; a training of {task} has none")
    options = argparse.Namespace(**{**vars(options), "split": options.split or SPLITS.get(task)})
    return EXAMINATIONS[task](card, options)


def _classify(card: dict[str, Any], options: argparse.Namespace) -> Examination:
    predictor: Any = load_run(options.training)
    folder = find_classes(options.data[0] / options.split, "CLASS/*.jpg in it (see --split)")
    unknown = sorted({*folder.classes} - {*predictor.classes})
    if unknown:
        raise DataError(
            f"--data: the training lacks classes of {folder.name}: {', '.join(unknown)}"
        )
    samples = LabelledImages(folder, predictor.classes, predictor.mode, options.max_pixels)
    samples.transform = predictor.transform
    metrics = Accuracy(len(predictor.classes))
    notes = [*classes_without_images(predictor.classes, folder), *files_left_out(folder)]
    return Examination("classify", predictor.model, samples, Classify.collate, metrics, [], notes)


def _detect(card: dict[str, Any], options: argparse.Namespace) -> Examination:
    predictor = load_run(options.training)
    data, masks, classes = options.data[0], card["detector"] == "mask_rcnn", predictor.classes
    samples = read_split(options, data, options.split, masks, crowds=True, classes=classes)
    samples.transform = plain_detection()
    model, metrics, collate = predictor.model, AveragePrecision(masks), Detect.collate
    return Examination("detect", model, samples, collate, metrics, samples.problems, samples.notes)


def _segment(card: dict[str, Any], options: argparse.Namespace) -> Examination:
    predictor: Any = load_run(options.training)
    data: Path = options.data[0]
    transform = plain_segmentation(card["mean"], card["std"])
    samples = Ade20k(data, options.split, transform, options.annotated, options.max_pixels)
    samples.labels = predictor.labels
    names = read_names(data, predictor.labels.first)
    if names is not None and names != predictor.classes:
        raise DataError(
            f"--data: {data} has the classes {', '.join(names)}; the training has "
            f"{', '.join(predictor.classes)}"
        )
    metrics = IntersectionOverUnion(predictor.classes, card["short_side"], card["window"])
    model, notes = predictor.model, samples.notes
    return Examination("segment", model, samples, Segment.collate, metrics, [], notes)


def _mlm(card: dict[str, Any], options: argparse.Namespace) -> Examination:
    predictor = load_text_run(options.training)
    predictor.model.config.sparse_prediction = True  # as while training
    with cards_explained(options.training):
        length, share, seed = card["sequence_length"], card["mask_share"], card["seed"]
    problems: list[str] = []
    notes = problems if options.on_error == "skip" else None
    documents = read_documents(text_files("--data", options.data), notes)
    samples = pack(documents, predictor.tokenizer, length, share)
    if not len(samples):
        raise DataError(
            f"--data: {len(samples.tokens)} tokens, expected at least one sequence of {length}"
        )
    model, metrics = predictor.model, Prediction()
    return Examination("mlm", model, samples, Mlm.collate, metrics, problems, [], seed)


def _glue(card: dict[str, Any], options: argparse.Namespace) -> Examination:
    predictor: Any = load_text_run(options.training)
    problems: list[str] = []
    notes = problems if options.on_error == "skip" else None
    samples = read_dev(options.data[0], predictor.glue, notes)
    collate = partial(
        make_batch, tokenizer=predictor.tokenizer, task=predictor.glue, length=predictor.length
    )
    model, metrics = predictor.model, Scores(predictor.glue)
    return Examination("glue", model, samples, collate, metrics, problems, [])


EXAMINATIONS: dict[str, Callable[[dict[str, Any], argparse.Namespace], Examination]] = {
    "classify": _classify,
    "detect": _detect,
    "segment": _segment,
    "mlm": _mlm,
    "glue": _glue,
}
