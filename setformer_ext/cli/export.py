"""``setformer export``: a trained model as ONNX, checked against torch at other sizes."""

from __future__ import annotations

import argparse
import logging
import warnings
from importlib.util import find_spec
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, first_line

if TYPE_CHECKING:
    from .predict.networks import Network


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


def run(options: argparse.Namespace) -> None:
    """Export, check and write the model."""
    from .predict.networks import load_network
    from .train.checkpoints import write_atomically

    network = load_network(options.training)
    model = _export(network)
    checked = _check(network, model)
    del model.graph.output[len(network.outputs) :]
    write_atomically(options.file, methodcaller("write", model.SerializeToString()))
    shown = f"{', '.join(network.inputs)} -> {', '.join(network.outputs)}"
    print(f"{options.file}: {shown}; {checked}")


def _export(network: Network) -> Any:
    """The model as an ``onnx.ModelProto`` with its metadata.

    Raises:
        UserError: if torch cannot export it.
    """
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings of the exporters about themselves
            model = network.to_onnx()
    except ModuleNotFoundError:
        raise
    except Exception as error:  # torch.export and torch.onnx raise errors of any class
        raise UserError(f"torch cannot export this model: {first_line(error)}") from error
    from onnx.helper import set_model_props

    set_model_props(model, network.metadata)
    return model


def _check(network: Network, model: Any) -> str:
    """Compare onnxruntime's answers with torch's at all sizes; returns the result in words.

    Raises:
        UserError: if they differ, or onnxruntime does not take a size.
    """
    if find_spec("onnxruntime") is None:
        return "not checked, since onnxruntime is not installed"
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(model.SerializeToString())
    worst = 0.0
    for size in network.sizes:
        inputs = network.example(*size)
        given = dict(zip(network.inputs, (x.numpy() for x in inputs), strict=True))
        named = " x ".join(map(str, size))
        try:
            answers = [torch.from_numpy(answer) for answer in session.run(None, given)]
        except Exception as error:  # onnxruntime's errors have no class of their own
            raise UserError(f"onnxruntime fails at {named}: {first_line(error)}") from error
        difference, allowed = network.compare(inputs, answers)
        if not difference <= allowed:
            raise UserError(
                f"onnxruntime's answers differ from torch's by {difference:.1e} {network.unit} at "
                f"{named}, more than by rounding"
            )
        worst = max(worst, difference)
    sizes = ", ".join(" x ".join(map(str, size)) for size in network.sizes)
    return f"differs from torch by {worst:.1e} {network.unit}, at {sizes}"
