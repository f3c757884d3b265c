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
    Fault(
        "references of each sample are cut by samples where heads are sharded",
        "distributed/sharding.py",
        "Shard(1 if per_sample else 0)",
        "Shard(0 if TENSORS[name].shared else 1)",
    ),
    Fault(
        "references of each sample on every rank where samples are sharded",
        "distributed/sharding.py",
        "return Shard(0) if per_sample else Replicate()",
        "return Shard(0) if per_sample and not TENSORS[name].shared else Replicate()",
    ),
    Fault(
        "checksum that ignores the order",
        "distributed/ranks.py",
        "return (bits * torch.arange(1, 2 * bits.numel(), 2, device=x.device)).sum()",
        "return bits.sum()",
    ),
    Fault(
        "ranks with and without a query agree",
        "distributed/ranks.py",
        'GIVEN = ("query", "reference_positions"',
        'GIVEN = ("reference_positions"',
    ),
)
