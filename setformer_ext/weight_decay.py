"""The parameters that modules exempt from weight decay."""

from __future__ import annotations

import re
from fnmatch import fnmatch

from torch import nn

_PARAMETRISED = re.compile(r"(?<![^.])parametrizations\.(\w+)\.original\d*$")


def undecayed(model: nn.Module) -> set[int]:
    """The id of every parameter that a module of the model exempts by ``no_weight_decay()``.

    This is timm's convention: the method returns names, or patterns of names, of parameters for
    which 0 has no special meaning. A parameter stays exempt while torch.nn.utils.parametrize holds
    it.
    """
    return {
        id(parameter)
        for module in model.modules()
        for pattern in getattr(module, "no_weight_decay", tuple)()
        for name, parameter in module.named_parameters()
        if fnmatch(_PARAMETRISED.sub(r"\1", name), pattern)
    }
