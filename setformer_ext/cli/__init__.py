"""The command ``setformer``; each subcommand is a module with ``add_arguments`` and ``run``.

The exit status is what ``run`` returns, if anything. It is 1 if ``run`` raises a
:class:`UserError`, whose message is printed on stderr.
"""

import argparse
import importlib
import io
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import UserError, first_line

COMMANDS = {
    "info": "print versions, processor, threads and CUDA: what a bug report needs",
    "demo": "train a small vision classifier with SeT attention, then with softmax, on real images",
    "train": "train a network with SeT attention on your own images or texts",
    "predict": "ask a trained network about your images or texts: classes, boxes, masks, words",
    "evaluate": "measure a trained network on a data set, as its training does",
    "export": "write a trained network as ONNX, for images or texts of any size and number",
    "explain": "draw where the references of a layer take their mass from in your image or text",
    "profile": "run one shape in a loop, for Nsight Systems and Nsight Compute to look at",
    "selftest": "check every result on this machine and measure its speed: report for bug reports",
}
# The extras of the commands that need more than torch.
EXTRAS = {
    "demo": "demo",
    "train": "train",
    "predict": "train",
    "evaluate": "train",
    "export": "train,onnx",
    "explain": "train",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status.

    Only the chosen module is imported, so that ``info`` needs nothing that ``demo`` needs.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a class's name may have any letters
        sys.stdout.reconfigure(errors="backslashreplace")
    command = arguments[0] if arguments else ""
    try:
        return _run(command, arguments)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("setformer_ext"):
            raise
        remedy = f"pip install {error.name}"
        if command in EXTRAS:
            remedy = f'In the source folder: pip install ".[{EXTRAS[command]}]"'
        needs = f"needs the package {error.name}, which is not installed"
        sys.exit(f"setformer {command}: {needs}. {remedy}")
    except (UserError, OSError) as error:
        print(f"setformer {command}: {first_line(error)}", file=sys.stderr)
        return 1


def _run(command: str, arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="setformer", description="SeT attention.")
    parser.add_argument("--version", action="version", version=f"setformer_ext {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        if name == command:
            module = importlib.import_module(f"{__package__}.{name}")
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    # Options may stand between files; argparse does not support that if a task follows.
    if command in COMMANDS and command != "train":
        options = subparsers.choices[command].parse_intermixed_args(arguments[1:])
    else:
        options = parser.parse_args(arguments)  # may import what options depend on
    return options.run(options) or 0
