"""``setformer export``: a trained model as ONNX, checked against torch at other sizes."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import first_line

if TYPE_CHECKING:
    from .predict.networks import Network


class ExportError(Exception):
    """A model that cannot be exported; the message says why."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "training", type=Path, metavar="RUN", help="the --output folder of a `setformer train`"
    )
    parser.add_argument(
        "file",
        type=Path,
        metavar="FILE.onnx",
        help="takes batches of any number and size (detectors one image of any size) and gives "
        "logits (objects); what images or texts it expects is in its metadata",
    )


def run(options: argparse.Namespace) -> int:
    """Export, check and write the model; returns the exit status."""
    from .predict.loading import RunError
    from .predict.networks import load_network
    from .train.checkpoints import write_atomically
    from .train.task import TrainingError

    try:
        network = load_network(options.training)
        data = _export(network)
        checked = _check(network, data)
        write_atomically(options.file, lambda file: file.write(data))
    except (RunError, ExportError, TrainingError) as error:
        print(f"setformer export: {first_line(error)}", file=sys.stderr)
        return 1
    shown = f"{', '.join(network.inputs)} -> {', '.join(network.outputs)}"
    print(f"{options.file}: {shown}; {checked}")
    return 0


def _export(network: Network) -> bytes:
    """The model with its metadata, as ONNX's file has it.

    Raises:
        ExportError: if torch cannot export it.
    """
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporters, about themselves
            model = network.to_onnx()
    except ModuleNotFoundError:
        raise
    except Exception as error:  # torch.export and torch.onnx raise what they like
        raise ExportError(f"torch cannot export this model: {first_line(error)}") from error
    from onnx.helper import set_model_props

    set_model_props(model, network.metadata)
    return model.SerializeToString()


def _check(network: Network, data: bytes) -> str:
    """Compare onnxruntime's answers with torch's at all sizes; returns what came out.

    Raises:
        ExportError: if they differ, or onnxruntime does not take a size.
    """
    if find_spec("onnxruntime") is None:
        return "not checked, since onnxruntime is not installed"
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(network.with_insides(data))
    worst = 0.0
    for size in network.sizes:
        inputs = network.example(*size)
        given = dict(zip(network.inputs, (x.numpy() for x in inputs), strict=True))
        named = " x ".join(map(str, size))
        try:
            answers = [torch.from_numpy(answer) for answer in session.run(None, given)]
        except Exception as error:  # onnxruntime's errors have no class of their own
            raise ExportError(f"onnxruntime fails at {named}: {first_line(error)}") from error
        difference, allowed = network.compare(inputs, answers)
        if not difference <= allowed:
            raise ExportError(
                f"onnxruntime's answers differ from torch's by {difference:.1e} {network.unit} at "
                f"{named}, more than by rounding"
            )
        worst = max(worst, difference)
    sizes = ", ".join(" x ".join(map(str, size)) for size in network.sizes)
    return f"differs from torch by {worst:.1e} {network.unit}, at {sizes}"
