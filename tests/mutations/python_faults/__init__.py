"""The faults that are seeded into Python files, by the area whose tests are to find them."""

from __future__ import annotations

from .distributed import DISTRIBUTED
from .explain import EXPLAIN
from .fault import PythonFault
from .language import LANGUAGE
from .operation import OPERATION
from .predict import PREDICT
from .train import TRAIN
from .vision import VISION

__all__ = ["PYTHON_FAULTS", "PythonFault"]

PYTHON_FAULTS = (*OPERATION, *VISION, *LANGUAGE, *TRAIN, *PREDICT, *EXPLAIN, *DISTRIBUTED)
