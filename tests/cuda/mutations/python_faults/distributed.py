"""Faults in the operation over ranks."""

from __future__ import annotations

from ..seeding import Seeded as Fault

DISTRIBUTED = (
    Fault(
        "gradient of masses of references once for each rank",
        "distributed/operations.py",
        "return gradients._replace(reference_mass=gradients.reference_mass / ranks.count)",
        "return gradients",
    ),
    Fault(
        "ranks merge logarithms to base 2 as natural ones",
        "distributed/ranks.py",
        "(x - base).exp2().sum(0).log2() + base",
        "(x - base).exp().sum(0).log() + base",
    ),
    Fault(
        "mask of the queries is cut where the heads are shared",
        "distributed/sharding.py",
        'of_all_heads = "H" not in TENSORS[name].letters or',
        'of_all_heads = TENSORS[name].letters == ("B", "N") or',
    ),
    Fault(
        "gradient of references is not summed over ranks that share the batch",
        "distributed/dtensors.py",
        "shared = isinstance(own, Replicate) and isinstance(of_key, Shard)",
        "shared = isinstance(own, Replicate) and axis == over_tokens",
    ),
)
