"""The options that all trainings share, from the command line and from a YAML file."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from .configuration import read_configuration, with_numbers
from .task import Task, TrainingError

MOST_WORKERS = 4
LENGTH = {"epochs", "steps"}  # may grow, to make a finished training longer
# Options that may change when a training is resumed; they do not change its numbers.
MAY_DIFFER = {
    *("command", "config", "max_pixels", "on_error", "output", "resume", "run", "save_every"),
    "workers",
}


def comparable(options: argparse.Namespace) -> dict[str, Any]:
    """The options that determine a training's numbers, but no paths: files may have moved."""
    return {
        name: json.loads(json.dumps(value))
        for name, value in vars(options).items()
        if name not in MAY_DIFFER
        and not any(isinstance(v, Path) for v in (value if isinstance(value, list) else [value]))
    }


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two runs (:func:`comparable`, and more), except their length."""
    names = {*before, *now} - LENGTH - MAY_DIFFER
    return [
        f"{name} was {before.get(name)}, is {now.get(name)}"
        for name in sorted(names)
        if before.get(name) != now.get(name)
    ]


def total_steps(shared: dict[str, Any]) -> int:
    """The steps of a training, from :func:`comparable`, "processes" and "training samples"."""
    per_step = shared["batch_size"] * shared["processes"] * shared["accumulate"]
    return shared["steps"] or -(-shared["epochs"] * shared["training samples"] // per_step)


def task_class(name: str) -> type[Task]:
    """The class of a task's module: ``Classify`` in ``classify``."""
    return getattr(importlib.import_module(f"{__package__}.{name}"), name.capitalize())


class TaskParser(argparse.ArgumentParser):
    """The parser of one task, which declares the task's options only when it must parse.

    So only the chosen task's module is imported. ``--config FILE.yaml`` is read first, as if its
    entries were at the start of the command line: they are checked in the same way, and options on
    the command line win. (Libraries that read both, such as jsonargparse, take YAML's `no` for
    False, and their errors are pages, not a line with the file and the option.)
    """

    task = ""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str], namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        kind = task_class(self.task)
        kind.add_options(self.add_argument_group(f"options of {self.task}"))
        add_common_options(self)
        self.set_defaults(**kind.defaults)
        finder = argparse.ArgumentParser(prog=self.prog, add_help=False, allow_abbrev=False)
        finder.add_argument("--config", type=Path)
        config = finder.parse_known_args(args)[0].config
        entries = [] if config is None else self._entries(config)
        parsed, unknown = super().parse_known_args([*entries, *args], namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}; --help lists the options")
        return parsed, unknown

    def error(self, message: str) -> Any:
        """Print one line only: a usage of fifty options would hide it."""
        self.exit(2, f"{self.prog}: {message}\n")

    def _entries(self, path: Path) -> list[str]:
        """The entries of a configuration file as arguments of the command line."""
        try:
            content = read_configuration(path)
        except TrainingError as error:
            self.error(str(error))
        return [
            argument
            for key, value in content.items()
            for argument in self._entry(f"{path}: {key}", key, value)
        ]

    def _entry(self, where: str, key: str, value: Any) -> list[str]:
        option = f"--{key.replace('_', '-')}"
        known = {name: a for a in self._actions for name in a.option_strings if name[:2] == "--"}
        known = {name: a for name, a in known.items() if name not in ("--config", "--help")}
        if option not in known:
            close = [name[2:] for name in get_close_matches(option, known, 3)]
            self.error(
                f"{where}: no such option; "
                + (f"did you mean {' or '.join(close)}?" if close else "--help lists them")
            )
        action = known[option]
        if value is None:
            return []
        if action.nargs == 0:
            if str(value).lower() not in ("true", "false"):
                self.error(f"{where}: expected true or false, got {value!r}")
            if isinstance(action, argparse.BooleanOptionalAction):
                return [option if value.lower() == "true" else f"--no-{option[2:]}"]
            return [option] if value.lower() == "true" else []
        if isinstance(value, dict):
            value = [f"{name}={with_numbers(part)}" for name, part in value.items()]
        values = value if isinstance(value, list) else [value]
        if action.nargs is None and isinstance(value, list):
            self.error(f"{where}: expected one value, got {value!r}")
        for part in values:
            self._check(where, action, part)
        return [option, *values] if action.nargs is not None else [f"{option}={value}"]

    def _check(self, where: str, action: argparse.Action, value: Any) -> None:
        if not isinstance(value, str):
            self.error(f"{where}: expected a plain value, got {value!r}")
        try:
            parsed = action.type(value) if callable(action.type) else value
        except argparse.ArgumentTypeError as error:
            self.error(f"{where}: {error}")
        except (TypeError, ValueError):
            kind = getattr(action.type, "__name__", "value")
            self.error(f"{where}: expected a valid {kind}, got {value!r}")
        if action.choices is not None and parsed not in action.choices:
            choices = ", ".join(map(str, action.choices))
            self.error(f"{where}: expected one of {choices}, got {value!r}")


def number(
    kind: Callable[[str], Any], low: float, high: float = float("inf")
) -> Callable[[str], Any]:
    """For ``type=``: an int or float between the bounds, both included."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
            if low <= value <= high and value != float("inf"):
                return value
        except ValueError:
            pass
        name = "a whole number" if kind is int else "a number"
        bounds = f"of at least {low}" if high == float("inf") else f"from {low} to {high}"
        raise argparse.ArgumentTypeError(f"expected {name} {bounds}, got {text!r}")

    return parse


positive = number(int, 1)
not_negative = number(float, 0)
fraction = number(float, 0, 1)


def key_and_value(text: str) -> tuple[str, Any]:
    """For ``type=``: ``key=value``, the value a Python literal or else a string."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"expected key=value, got {text!r}")
    try:
        literal = ast.literal_eval(value)
        json.dumps(literal)  # raises if the card could not hold it
    except (ValueError, SyntaxError, TypeError):
        return key, value
    return key, literal


def add_option(
    parser: argparse._ActionsContainer,
    name: str,
    kind: Callable[[str], Any] = str,
    default: Any = None,
    help: str = "",
    **more: Any,
) -> None:
    """Declare an option whose help ends with its default, where it has one.

    Args:
        parser: what to declare it to.
        name: such as ``--mixup ALPHA``, where ALPHA is the name of the value in the help; with
            several names the option takes as many values.
        kind: turns a text into a value.
        default: a list if there are several values.
        help: what the option is for.
        more: other arguments of ``add_argument``.
    """
    option, *values = name.split()
    if values:
        more["metavar"] = values[0] if len(values) == 1 else tuple(values)
    if len(values) > 1:
        more["nargs"] = len(values)
    if default is not None:
        shown = " ".join(f"{v:g}" for v in default) if isinstance(default, list) else "%(default)s"
        help = f"{help} (default: {shown})" if help else f"default: {shown}"
    parser.add_argument(option, type=kind, default=default, help=help, **more)


def add_keys_and_values(parser: argparse._ActionsContainer, name: str, purpose: str) -> None:
    """Declare an option of ``KEY=VALUE ...``, such as ``--model-options``."""
    parser.add_argument(
        name, type=key_and_value, nargs="+", default=[], metavar="KEY=VALUE", help=purpose
    )


def default_workers() -> int:
    """The number of cores that this process may use, less the one that it computes on; at most
    4."""
    here = (
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # on this machine, from torchrun
    return max(0, min(MOST_WORKERS, len(here) // processes - 1))


def add_workers(parser: argparse._ActionsContainer) -> None:
    """Declare ``--workers``, for all commands that load samples."""
    parser.add_argument(
        "--workers",
        type=number(int, 0),
        default=default_workers(),
        help="processes that load samples, for each process that computes (default: as many as "
        "it has cores beside one, 4 at most; here %(default)s)",
    )


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Declare every training's options: length, optimizer, processes, precision, checkpoints."""
    add = partial(add_option, parser.add_argument_group("training"))
    add("--epochs", positive, 100)
    add("--steps", positive, help="so many steps, instead of epochs")
    add("--batch-size", positive, 64, "samples per process and pass")
    add("--accumulate PASSES", positive, 1, "passes whose gradients make one step")
    add("--lr", not_negative, 1e-3, "AdamW's learning rate, of cosine schedule")
    rise = "share of the steps over which the learning rate first rises"
    add("--warmup SHARE", fraction, 0.05, rise)
    add("--weight-decay", not_negative, 0.05)
    ratio = "learning rate of a backbone's layer / that of the next one"
    add("--layer-decay FACTOR", fraction, 1.0, ratio)
    add("--clip-grad NORM", not_negative, 1.0, "largest norm of the gradient, 0 for any")
    average = "of the weights' moving average, reached by and by; 0 for none"
    add("--ema-decay DECAY", fraction, 0.9998, average)
    add("--seed", number(int, 0), 0)
    group = parser.add_argument_group("machine")
    add = partial(add_option, group)
    precisions = ("no", "bf16", "fp16")
    add("--precision", str, "no", "of mixed-precision training", choices=precisions)
    group.add_argument(
        "--shard", action="store_true", help="split weights among the processes (FSDP2, not DDP)"
    )
    group.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="recompute the backbone's blocks in backward: slower, less memory",
    )
    add_workers(group)
    group = parser.add_argument_group("output")
    add = partial(add_option, group)
    add("--output DIR", Path, help="a folder that all processes see", required=True)
    add("--config FILE.yaml", Path, help="options, one a line")
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on with the training in --output, if there is one; if that is at its end and more "
        "--epochs or --steps are given, go on along the cosine of their number",
    )
    add("--eval-every STEPS", positive, help="default: once in an epoch, or --steps / 10")
    add("--save-every STEPS", positive, help="checkpoints beside those after each evaluation")
    kinds = ("stop", "skip")
    add("--on-error", str, "stop", "what to do about a broken sample", choices=kinds)
