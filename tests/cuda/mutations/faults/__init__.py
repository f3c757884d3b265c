"""The seeded faults of csrc/cuda."""

from .fault import Fault
from .inputs import IN_PARTS, PACKED, SCALED
from .on_chip import ON_CHIP, ON_CLUSTER
from .on_chip_backward import ON_CHIP_BACKWARD
from .on_shares import BACKWARD_ON_SHARES, ON_SHARES
from .streaming import BACKWARD, FORWARD, IN_GROUP

FAULTS = (
    FORWARD
    + ON_CHIP
    + ON_CLUSTER
    + ON_SHARES
    + IN_PARTS
    + BACKWARD
    + ON_CHIP_BACKWARD
    + BACKWARD_ON_SHARES
    + SCALED
    + IN_GROUP
    + PACKED
)

__all__ = ["FAULTS", "Fault"]
