"""The faults that are seeded into files of setformer_ext, by the area whose tests are to find them:
those of python.AREAS."""

from __future__ import annotations

from ..seeding import Seeded
from .distributed import DISTRIBUTED
from .explain import EXPLAIN
from .language import LANGUAGE
from .operation import OPERATION
from .predict import PREDICT
from .train import TRAIN
from .vision import VISION

PYTHON_FAULTS: dict[str, tuple[Seeded, ...]] = {
    "operation": OPERATION,
    "vision": VISION,
    "language": LANGUAGE,
    "train": TRAIN,
    "predict": PREDICT,
    "explain": EXPLAIN,
    "distributed": DISTRIBUTED,
}
