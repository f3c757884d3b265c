"""``setformer export``: a trained model as ONNX, checked against torch at other sizes."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import first_line

if TYPE_CHECKING:
    from .predict.networks import Network

TOLERANCE = 1e-4  # of the largest logit
ROUNDING = 10  # times what torch's own float32 is off, where that is more


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
        help="takes batches of any number and size and gives logits; what images or texts it "
        "expects is in its metadata",
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
    print(f"{options.file}: {', '.join(network.inputs)} -> logits; {checked}")
    return 0


def _export(network: Network) -> bytes:
    """The model with its metadata, as ONNX's file has it.

    Raises:
        ExportError: if torch cannot export it.
    """
    from .onnx import export

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter, about itself
            program = export(
                network.model,
                network.example(*network.sizes[0]),
                dynamic_shapes=network.dynamic_shapes(),
                input_names=network.inputs,
                output_names=["logits"],
                verbose=False,
            )
    except ModuleNotFoundError:
        raise
    except Exception as error:  # torch.export and torch.onnx raise what they like
        raise ExportError(f"torch cannot export this model: {first_line(error)}") from error
    program.model.metadata_props.update(network.metadata)
    return program.model_proto.SerializeToString()


def _check(network: Network, data: bytes) -> str:
    """Compare onnxruntime's answers with torch's at all sizes; returns what came out.

    Raises:
        ExportError: if they differ, or onnxruntime takes none of a size.
    """
    if find_spec("onnxruntime") is None:
        return "not checked, since onnxruntime is not installed"
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(data)
    exact = deepcopy(network.model).double()
    worst = 0.0
    for size in network.sizes:
        inputs = network.example(*size)
        given = dict(zip(network.inputs, (x.numpy() for x in inputs), strict=True))
        with torch.no_grad():
            expected = network.model(*inputs)
            rounding = exact(*(x.double() if x.is_floating_point() else x for x in inputs))
        scale = float(expected.abs().max())
        allowed = max(TOLERANCE, ROUNDING * float((rounding - expected).abs().max()) / scale)
        try:
            answer = torch.from_numpy(session.run(None, given)[0])
        except Exception as error:  # onnxruntime's errors have no class of their own
            raise ExportError(f"onnxruntime cannot run it at {size}: {error}") from error
        difference = float((answer - expected).abs().max()) / scale
        if not difference <= allowed:
            raise ExportError(
                f"onnxruntime's answers are off by {difference:.1e} of the largest logit at {size}"
            )
        worst = max(worst, difference)
    sizes = ", ".join(" x ".join(map(str, size)) for size in network.sizes)
    return f"differs from torch by {worst:.1e} of the largest logit at {sizes}"
