"""The shared memory that a block of csrc/cuda asks for.

Layout (problem.cuh), fits_one_block (launch.cuh) and on_chip/shape.cuh once more: the tables here
are made where no CUDA compiler is. A test holds them against the launches of the emulated device.
"""

from dataclasses import dataclass
from enum import Flag

MOST_RESIDENT = 163 * 1024
MOST_STREAMING = 99 * 1024
MOST_DEPTH = 256


class Needs(Flag):
    """What a pass keeps in shared memory beside the tiles that scores are formed of."""

    SCORES_ONLY = 0
    ROWS = 1
    PLAN = 2
    OPERAND = 4
    STEPS = 8
    POOLS = ROWS | PLAN
    DISTRIBUTES = POOLS | OPERAND
    DIFFERENTIATES = DISTRIBUTES | STEPS


@dataclass(frozen=True)
class Storage:
    """Shape<Storage> of tile.cuh; element and accumulate are sizes in bytes."""

    element: int
    accumulate: int
    rows: int
    depth: int

    @property
    def threads(self) -> int:
        """Of a block: a warp for 16 rows."""
        return 2 * self.rows

    @property
    def padding(self) -> int:
        """Of a row of elements: 16 bytes."""
        return 16 // self.element

    @property
    def parts(self) -> int:
        """kParts: of a factor of products on chip."""
        return 1 if self.element == 2 else 3

    @property
    def head(self) -> int:
        """kHeadBytes"""
        return 2304 + (0 if self.element == 2 else MOST_DEPTH * self.accumulate)


HALF = Storage(element=2, accumulate=4, rows=64, depth=64)
STORAGES = {
    "__half": HALF,
    "__nv_bfloat16": HALF,
    "float": Storage(element=4, accumulate=4, rows=64, depth=32),
    "double": Storage(element=8, accumulate=8, rows=32, depth=32),
}


@dataclass(frozen=True)
class Problem:
    """One call of set_attention: queries are the keys, values as deep as keys (Dv = D)."""

    batch: int
    heads: int
    tokens: int
    depth: int
    references: int
    steps: int = 5  # T
    storage: Storage = HALF

    @property
    def problems(self) -> int:
        """B H"""
        return self.batch * self.heads

    @property
    def tiles(self) -> int:
        """Of one head's tokens."""
        return divide_up(self.tokens, self.storage.rows)

    @property
    def chunks(self) -> int:
        """Tiles of references."""
        return divide_up(self.references, self.storage.rows)

    @property
    def depths(self) -> int:
        """Tiles of the depth."""
        return divide_up(self.depth, self.storage.depth)

    @property
    def on_chip(self) -> "OnChip | None":
        """The shape that holds a head in a block's registers; None: no shape."""
        for most, blocks, *strips_of_parts in ON_CHIP:
            strips = strips_of_parts[self.storage.parts > 1]
            if self.references > most:
                continue
            alone = [OnChip(blocks, 4, 1)] if blocks == 7 else []
            for shape in (*alone, OnChip(blocks, strips, 2), OnChip(blocks, strips, 8)):
                if self.tokens <= shape.tokens and shape.shared(self) <= MOST_ON_CHIP:
                    return shape
            return None
        return None

    @property
    def on_cluster(self) -> "OnChip | None":
        """The same for the smallest cluster that shares a head which no block holds (sm_90)."""
        blocks, strips, _ = next(
            (size for most, *size in ON_CHIP if self.references <= most), (0, 0, 0)
        )
        shapes = [OnChip(blocks, strips, 8, ranks) for ranks in (2, 4, 8) if blocks]
        for shape in shapes:
            if self.tokens <= shape.tokens and shape.shared(self) <= MOST_ON_CLUSTER:
                return shape
        return None

    @property
    def on_shares(self) -> "OnChip | None":
        """What a block computes at once of its share of a head, on devices that give it 163 KiB."""
        blocks, strips, _ = next(
            (size for most, *size in ON_CHIP if self.references <= most), (0, 0, 0)
        )
        strips = 2 if blocks > 8 else strips
        parts = [OnChip(blocks, fewer, 8) for fewer in range(strips, 0, -1)]
        return next((x for x in parts if x.shared(self, x.strips) <= MOST_ON_CHIP), None)

    @property
    def on_chip_backward(self) -> "OnChipBackward | None":
        """The shape of backward on chip; None: there is none."""
        groups = divide_up(self.depth, 32)
        if self.references > 64 or groups > 2 or self.tokens > MOST_ON_CHIP_BACKWARD:
            return None
        blocks = next(blocks for blocks in (4, 7, 8) if self.references <= 8 * blocks)
        alone = self.tokens <= 64 and divide_up(blocks, 2) * groups <= 4
        return OnChipBackward(blocks, 1 if alone else 4)

    def on_shares_backward(self, arch: int) -> "OnChipBackward | None":
        """The shape of backward on shares of a head; None: there is none."""
        if self.references > 128 or divide_up(self.depth, 32) > 2:
            return None
        one_range = self.references <= 64
        shapes = (
            [OnChipBackward(8, 4)] if one_range else [OnChipBackward(16, 8), OnChipBackward(16, 4)]
        )
        most = MOST_ON_CLUSTER if arch in (90, 100) else MOST_ON_CHIP
        return next((shape for shape in shapes if shape.shared(self) <= most), None)

    def resident(self, needs: Needs) -> bool:
        """Whether one block holds a head's keys, on devices that give it 163 KiB (sm_80, sm_90)."""
        return self.shared(needs, resident=True) <= MOST_RESIDENT

    def shared(self, needs: Needs, resident: bool, stages: int = 2) -> int:
        """Layout::total, in bytes."""
        s = self.storage
        lean = not resident and stages == 1
        tile = deep = s.rows * s.element
        tile *= (s.depth if self.depths > 1 else divide_up(self.depth, 16) * 16) + s.padding
        deep *= s.depth + s.padding
        wide = s.rows * (s.rows + 8) * s.accumulate
        operand = s.rows * (s.depth + (8 if s.element == 2 else s.padding)) * s.accumulate
        references = self.chunks * self.depths
        if resident:
            total = (self.tiles * self.depths + references) * tile
        elif lean:  # rows lie in the place of keys, operands in that of references
            total = deep if Needs.ROWS in needs else tile
            total += operand if Needs.OPERAND in needs else tile
        else:
            total = (stages + (1 if references == 1 else stages)) * tile
        if Needs.PLAN in needs:
            total += wide
        if Needs.ROWS in needs and not lean:
            total += deep
        if Needs.OPERAND in needs and not lean:
            total += operand
        sets = self.chunks if resident else 2
        numbers = (
            (self.tiles if resident else 2)  # norms of keys
            + sets * (1 + 3)  # norms and positions of references
            + 2 * s.rows // 16  # sums of the warps
            + 4 * self.chunks
        ) * s.rows
        total += s.head + numbers * s.accumulate
        if Needs.STEPS not in needs:
            return total
        step = 3 * s.rows * s.accumulate
        eight = resident or total + 8 * step <= MOST_STREAMING
        return total + (2 if stages == 1 else 8 if eight else 4) * step


@dataclass(frozen=True)
class OnChip:
    """Shape and ClusterShape of on_chip/shape.cuh: blocks of 8 references, strips of 16 tokens a
    warp, warps; and the blocks that share a head."""

    blocks: int
    strips: int
    warps: int
    ranks: int = 1

    @property
    def tokens(self) -> int:
        """The most of a head."""
        return 16 * self.strips * self.warps * self.ranks

    def shared(self, p: Problem, strips: int | None = None) -> int:
        """Memory::sizes_of, total in bytes; strips: of a warp, None: those of the whole head."""
        if strips is None:
            strips = divide_up(p.tokens, 16 * self.warps * self.ranks)
        references, across = 8 * self.blocks, self.warps > 1
        spread = 64 * divide_up(self.blocks, 8) * self.warps
        total = ON_CHIP_HEAD + references * 4 * (1 + 3)  # terms and positions
        total += 8 * 4 + 16 * self.warps  # largest, valid
        total += 4 * 16 * self.strips * self.warps  # masses
        total += 2 * 4 * spread + across * 2 * 8 * spread  # spread, columns
        total += across * 2 * self.warps * 4 * 32 * 16  # sums
        if self.ranks > 1:  # received, tiles, barriers
            total += 2 * 8 * (64 * divide_up(self.blocks, 8) * 8 + 4 * 32 * 16) + 2 * 8
        bands, parts = 2 * divide_up(p.depth, 32), p.storage.parts
        total += (parts > 1) * MOST_DEPTH * 4  # center
        total += parts * bands * divide_up(self.blocks, 2) * 32 * 16  # operand
        total += references * (parts * 16 * bands + 8) * 2
        # a warp's room: rows by twos of strips, and 64 columns; in parts exactly, and 32
        pitch = parts * 16 * min(bands, 2 if parts > 1 else 4) + 8
        rows = 16 * strips if parts > 1 else 32 * divide_up(strips, 2)
        return total + rows * self.warps * pitch * 2


@dataclass(frozen=True)
class OnChipBackward:
    """StripShape of on_chip/strip.cuh: blocks of 8 references, and warps with a strip each. More
    than 8 blocks are two ranges, beside which rows of one round fit instead of two."""

    blocks: int
    warps: int

    def shared(self, p: Problem) -> int:
        """StripMemory::sizes, total in bytes."""
        references, pairs = 8 * self.blocks, divide_up(self.blocks, 2)
        spread = 64 * divide_up(self.blocks, 8) * self.warps
        total = ON_CHIP_HEAD + references * 4 * (1 + 3) + 8 * 4 + 16 * self.warps
        total += 4 * 16 * self.warps + 2 * 4 * spread + (self.warps > 1) * 2 * 8 * spread
        ranges = 2 if self.blocks > 8 else 1
        total += 384 + 4 * references * 4 + 4 * self.warps * ranges  # gradients, numbers, units
        total += 4 * 16 * self.warps  # lengths
        total = 16 * divide_up(total, 16)
        pitch = 32 * divide_up(p.depth, 32) + 8
        total += 5 * 16 * pairs * pitch * 2  # references, A and dA in two parts each
        total += self.warps * 16 * (16 * pairs + 8) * 2  # plan
        total += self.warps * (2 // ranges) * 3 * 16 * pitch * 2  # rows
        return total + max(p.steps, 1) * 2 * references * 4


ON_CHIP_HEAD = 320
# Most references, blocks, strips of half types and of float32.
ON_CHIP = ((32, 4, 7, 6), (56, 7, 7, 4), (64, 8, 6, 4), (128, 16, 3, 2))
MOST_ON_CHIP = 163 * 1024  # what sm_80 gives a block
MOST_ON_CLUSTER = 227 * 1024  # what sm_90 does
MOST_ON_CHIP_BACKWARD = 4096  # tokens

NEEDS = {
    "attention_forward_resident_kernel": Needs.DISTRIBUTES,
    "attention_backward_resident_kernel": Needs.DIFFERENTIATES,
    "sinkhorn_step_kernel": Needs.SCORES_ONLY,
    "collect_kernel": Needs.POOLS,
    "distribute_kernel": Needs.DISTRIBUTES,
    "distribute_backward_kernel": Needs.POOLS,
    "sinkhorn_step_backward_kernel": Needs.SCORES_ONLY,  # of the step that collects: DISTRIBUTES
    "gradient_kernel": Needs.DIFFERENTIATES,
}
# Kernels without tiles: with the Head alone, or with nothing.
HEAD_ONLY = {"output_product_kernel", "merge_pooled_gradient_kernel", "merge_gradient_kernel"}
NOTHING = {
    "merge_columns_kernel",
    "merge_pooled_kernel",
    "merge_shares_kernel",
    "scale_rank_kernel",
    "select_shared_heads_kernel",
    "merge_sums_kernel",
    "merge_blocks_kernel",
    "rescale_pooled_kernel",
    "head_gradient_kernel",
    "unit_length_kernel",
    "unit_length_backward_kernel",
}


def dynamic_shared(kernel: str, p: Problem, arch: int = 80, collects: bool = False) -> int:
    """Bytes that the launch of `kernel` asks for, beside what it declares."""
    if kernel in NOTHING:
        return 0
    if kernel == "attention_forward_on_chip_kernel":
        assert p.on_chip
        return p.on_chip.shared(p)
    if kernel == "attention_forward_on_cluster_kernel":
        assert p.on_cluster
        return p.on_cluster.shared(p)
    if kernel == "attention_forward_on_shares_kernel":
        assert p.on_shares
        return p.on_shares.shared(p, p.on_shares.strips)
    if kernel == "attention_backward_on_chip_kernel":
        assert p.on_chip_backward
        return p.on_chip_backward.shared(p)
    if kernel == "attention_backward_on_shares_kernel":
        shape = p.on_shares_backward(arch)
        assert shape
        return shape.shared(p)
    if kernel in HEAD_ONLY:
        return p.storage.head
    needs = Needs.DISTRIBUTES if collects else NEEDS[kernel]
    return p.shared(needs, "resident" in kernel, stages=2 if arch >= 80 else 1)


def divide_up(x: int, y: int) -> int:
    """Rounded up."""
    return -(-x // y)
