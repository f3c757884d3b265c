"""What a training does without being told: every option's default, which options may change when a
training is resumed, and how often a training evaluates."""

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from setformer_ext.cli.train import loop
from setformer_ext.cli.train.options import TaskParser, comparable, differences, task_class
from setformer_ext.cli.train.task import Task

COMMON = {
    "steps": None,
    "accumulate": 1,
    "seed": 0,
    "precision": "no",
    "warmup": 0.05,
    "layer_decay": 1.0,
    "clip_grad": 1.0,
    "shard": False,
    "gradient_checkpointing": False,
    "output": Path("o"),
    "config": None,
    "resume": False,
    "eval_every": None,
    "save_every": None,
    "on_error": "stop",
}
ON_IMAGES = {
    "weight_decay": 0.05,
    "ema_decay": 0.9998,
    "model": "setformer_tiny",
    "model_options": [],
    "pretrained": None,
    "freeze_batch_norm": False,
    "flip": 0.5,
    "data": Path("d"),
    "max_pixels": 178_956_970,  # Pillow's own limit
}
ON_TEXTS = {
    "weight_decay": 0.01,
    "ema_decay": 0.0,
    "model_options": [],
    "sequence_length": 128,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "classify": COMMON
    | ON_IMAGES
    | {
        "epochs": 100,
        "batch_size": 64,
        "lr": 1e-3,
        "val_share": None,
        "input_size": None,
        "in_chans": 3,
        "crop_scale": 0.08,
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "color_jitter": 0.4,
        "random_erasing": 0.25,
        "mixup": 0.8,
        "cutmix": 1.0,
        "label_smoothing": 0.1,
    },
    "detect": COMMON
    | ON_IMAGES
    | {
        "epochs": 36,
        "batch_size": 2,
        "lr": 1e-4,
        "detector": "mask_rcnn",
        "detector_options": [],
        "annotated": None,
        "min_size": [800],
        "max_size": 1333,
        "anchor_sizes": [32, 64, 128, 256, 512],
        "pyramid_channels": 256,
        "group_norm": False,
        "scale_jitter": None,
        "vertical_flip": 0.0,
        "photometric": False,
    },
    "segment": COMMON
    | ON_IMAGES
    | {
        "epochs": 100,
        "batch_size": 16,
        "lr": 1e-3,
        "ignore_label": 0,
        "annotated": None,
        "decoder": "upernet",
        "decoder_options": [],
        "short_side": 512,
        "window": 0,
        "crop": [512],
        "scale_jitter": [0.5, 2.0],
        "photometric": True,
        "dice": 0.0,
    },
    "mlm": COMMON
    | ON_TEXTS
    | {
        "epochs": 10,
        "batch_size": 64,
        "lr": 5e-4,
        "data": [Path("d")],
        "eval_data": None,
        "model": "base",
        "pretrained": None,
        "tokenizer": None,
        "vocab_size": 30522,  # of BERT
        "alphabet": None,
        "cased": False,
        "mask_share": 0.15,
    },
    "glue": COMMON
    | ON_TEXTS
    | {
        "epochs": 3,
        "batch_size": 32,
        "lr": 2e-5,
        "glue_task": "sst2",
        "data": Path("d"),
        "model": "m",
        "attention_implementation": None,
    },
}
REQUIRED = {"glue": ("--task=sst2", "--model=m")}  # besides --data and --output
# None of these changes what the weights become.
MAY_CHANGE = {
    *("config", "max_pixels", "on_error", "output", "resume", "save_every", "workers"),
    *("epochs", "steps"),  # whose change the training itself looks into
}


def parse(task: str) -> argparse.Namespace:
    parser = TaskParser(prog=f"setformer train {task}")
    parser.task = task
    given = parser.parse_args(["--data=d", "--output=o", *REQUIRED.get(task, ())])
    (options,) = task_class(task).split(given)
    return options


@pytest.mark.parametrize("task", DEFAULTS)
def test_every_option_has_its_default(task: str) -> None:
    found = vars(parse(task))
    del found["workers"]  # as many as the machine has cores for
    assert found == DEFAULTS[task]


@pytest.mark.parametrize("task", DEFAULTS)
def test_a_resumed_training_has_what_determines_its_numbers(task: str) -> None:
    """Paths may change, too: files may have moved."""
    options = vars(parse(task))
    before = comparable(argparse.Namespace(**options))
    for name, value in options.items():
        path = value in (Path("d"), [Path("d")])
        now = comparable(argparse.Namespace(**options | {name: Path("e") if path else "another"}))
        told = [f"{name} was {value}, is another"]
        assert differences(before, now) == ([] if path or name in MAY_CHANGE else told)


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({"eval_every": 7, "steps": 100}, 7),
        ({"steps": 100}, 10),
        ({"steps": 9}, 1),
        ({}, 5),  # 200 samples in steps of 2 processes x 4 passes x 5 samples
        ({"batch_size": 500}, 1),
    ],
)
def test_it_evaluates_ten_times_or_after_each_epoch(
    given: dict[str, int], steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cpu")
    two = SimpleNamespace(process_index=0, num_processes=2, is_main_process=True, device=device)
    monkeypatch.setattr(loop, "make_accelerator", lambda precision: two)
    monkeypatch.setattr(loop, "Learner", lambda *_: None)
    monkeypatch.setattr(loop, "Journal", lambda *_: None)
    task: Task = SimpleNamespace(train=range(200), eval=range(8), collate=list)  # type: ignore[assignment]
    own = {"output": tmp_path, "workers": 0, "batch_size": 5, "accumulate": 4}
    options = argparse.Namespace(**DEFAULTS["classify"] | own | given)
    assert loop.Training(task, options).eval_every == steps
