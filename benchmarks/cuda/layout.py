"""How csrc/cuda splits a problem over blocks, and the shared memory of a block.

Splits, Layout (problem.cuh) and fits_one_block (launch.cuh) once more: the tables here are made
where no CUDA compiler is. A test holds them against the launches of the emulated device.
"""

from dataclasses import dataclass

MOST_RESIDENT = 96 * 1024
MOST_SPLITS = 256
TILES_OF_A_BLOCK = 4
MOST_DEPTH = 256
STEPS_AT_ONCE = 8


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
    def groups(self) -> int:
        """Of depth tiles that a block sums up at once."""
        return divide_up(self.depth, max(self.storage.rows, self.storage.depth))

    @property
    def splits(self) -> int:
        """Blocks that share a head where it is not resident."""
        return divide_up(self.tiles, max(TILES_OF_A_BLOCK, divide_up(self.tiles, MOST_SPLITS)))

    @property
    def resident(self) -> bool:
        """Whether one block holds a head's keys, on devices that give it 96 KiB."""
        return self.shared(resident=True) + 3 * self.storage.head <= MOST_RESIDENT

    def shared(self, resident: bool, stages: int = 2) -> int:
        """Layout::total, in bytes."""
        s = self.storage
        width = s.depth if self.depths > 1 else divide_up(self.depth, 16) * 16
        references = self.chunks * self.depths
        slots = self.tiles * self.depths + references
        if not resident:
            slots = stages + (1 if references == 1 else stages)
        tiles = slots * s.rows * (width + s.padding) * s.element
        rows = s.rows * (s.depth + s.padding) * s.element
        formed = s.rows * (s.rows + 8 + s.depth + (8 if s.element == 2 else s.padding))
        sets = self.chunks if resident else 2
        numbers = (
            (self.tiles if resident else 2)  # norms of keys
            + sets * (1 + 3)  # norms and positions of references
            + 2 * s.rows // 16  # sums of the warps
            + 4 * self.chunks
            + 3 * STEPS_AT_ONCE
        ) * s.rows
        return s.head + tiles + rows + (formed + numbers) * s.accumulate


# Kernels with less in shared memory than Layout: nothing, or the Head alone.
WITHOUT = {
    "merge_columns_kernel",
    "merge_pooled_kernel",
    "merge_sums_kernel",
    "reference_mass_gradient_kernel",
}
HEAD_ONLY = {"output_product_kernel", "merge_pooled_gradient_kernel"}


def dynamic_shared(kernel: str, p: Problem, arch: int = 80) -> int:
    """Bytes that the launch of `kernel` asks for, beside what it declares."""
    if kernel in WITHOUT:
        return 0
    if kernel in HEAD_ONLY:
        return p.storage.head
    total = p.shared("resident" in kernel, stages=2 if arch >= 80 else 1)
    if kernel == "attention_backward_resident_kernel":
        return divide_up(total, 16) * 16 + 2 * p.storage.head
    return total


def divide_up(x: int, y: int) -> int:
    """Rounded up."""
    return -(-x // y)
