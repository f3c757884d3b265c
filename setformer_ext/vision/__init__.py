"""The SeTformer vision backbone and what is built on it.

Importing this registers the backbone's sizes with timm, so that
``timm.create_model("setformer_base")`` knows them.
"""

from .backbone import Setformer
from .fusion import fuse_norms
from .models import setformer_base, setformer_mini, setformer_small, setformer_tiny

__all__ = [
    "Setformer",
    "fuse_norms",
    "setformer_base",
    "setformer_mini",
    "setformer_small",
    "setformer_tiny",
]
