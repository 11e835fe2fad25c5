# SPDX-License-Identifier: Apache-2.0
"""How the forward kernel is cut: sizes, what VMEM they take, and the choice for each chip."""

from dataclasses import dataclass, replace
from typing import Any

from grug_kernels.attention.tpu_vmem import with_longest_chunk
from grug_kernels.tpu import lanes, vmem_of


@dataclass(frozen=True)
class ForwardBlocks:
    """How the forward pass is cut.

    block_q, block_kv: one tile, queries against keys. Lengths are whole numbers of them.
    row_chunk: queries of one head in a stage of the pipeline; divides block_q, and is all of it or divides its half.
    kv_heads: key heads of one grid step. group_heads: at most so many query heads of each of them. Together with
    block_q they make the row chunks of a tile, and code and compile time grow with their number.
    key_chunk: keys of a head that are in VMEM at a time.
    transposed: scores as [keys, queries], q and the weights being what stays in the matrix unit; else [queries, keys],
    and k and v. Transposed, the unit takes a new weight for each of v_head_dim rows that pass it, not of row_chunk.
    vmem_limit: bytes of VMEM that the compiler may use.

    Raises:
      ValueError: sizes that do not go into one another.
    """

    block_q: int = 512
    block_kv: int = 512
    row_chunk: int = 512
    kv_heads: int = 1
    group_heads: int = 4
    key_chunk: int = 8192
    transposed: bool = True
    vmem_limit: int = 100 * 2**20

    def __post_init__(self):
        if self.block_q % self.row_chunk or (self.row_chunk < self.block_q and self.block_q % (2 * self.row_chunk)):
            raise ValueError(
                f"attention forward: row_chunk={self.row_chunk} is neither block_q={self.block_q} nor a divisor of its"
                " half. Tiles may need half of their queries: choose one that is."
            )
        if self.block_q % 2 or self.block_kv % 2:
            raise ValueError(
                f"attention forward: block_q={self.block_q}, block_kv={self.block_kv}; tiles are cut in half, and both"
                " have to be even."
            )
        if self.key_chunk % self.block_kv:
            raise ValueError(
                f"attention forward: key_chunk={self.key_chunk} is no multiple of block_kv={self.block_kv}."
            )

    def heads_of(self, group: int) -> int:
        """Query heads of a group in one grid step: the most that divide it."""
        return max(n for n in range(1, self.group_heads + 1) if group % n == 0)

    def chunk(self, kv_len: int) -> int:
        return min(self.key_chunk, kv_len)

    def as_tile(self, keys: Any, queries: Any) -> tuple[Any, Any]:
        """In the order of the axes of a tile of scores."""
        return (keys, queries) if self.transposed else (queries, keys)


@dataclass(frozen=True)
class ForwardShape:
    """What VMEM depends on besides the blocks. itemsize: of q, k and v."""

    kv_len: int
    num_kv_heads: int
    group: int
    head_dim: int
    v_head_dim: int
    itemsize: int = 2
    with_error: bool = True


def vmem_terms(shape: ForwardShape, blocks: ForwardBlocks) -> dict[str, int]:
    """Bytes of one grid step by use, without the registers that the compiler spills."""
    heads = blocks.kv_heads * blocks.heads_of(shape.group)
    rows, keys = heads * blocks.block_q, blocks.kv_heads * blocks.chunk(shape.kv_len)
    width, v_width, item = lanes(shape.head_dim), lanes(shape.v_head_dim), shape.itemsize
    statistic = rows * 4 * (1 if blocks.transposed else 128)  # a column takes all lanes of its rows
    weighted = rows * 4 * (shape.v_head_dim if blocks.transposed else v_width)
    return {
        # Windows are doubled, one being filled as one is used.
        "q": 2 * rows * width * item,
        "k": 2 * keys * width * item,
        "v": 2 * keys * v_width * item,
        "bounds": 2 * 2 * blocks.block_q * 4,
        "out": 2 * rows * v_width * item,
        "error of out": 2 * rows * v_width * item if shape.with_error else 0,
        "lse": 2 * rows * 4,
        "statistics": 6 * statistic,  # reference, largest, total, excess; reference and total saved
        "weighted values": 2 * weighted,  # and saved
        "scores": 2 * blocks.block_kv * blocks.row_chunk * 4,
        "weights": 2 * blocks.block_kv * blocks.row_chunk * item,
    }


def vmem_bytes(shape: ForwardShape, blocks: ForwardBlocks) -> int:
    return sum(vmem_terms(shape, blocks).values())


# Left to the compiler of the VMEM that a chip has, for itself and for registers that it spills.
_USABLE, _FOR_BUFFERS = 0.9, 0.7
_ROW_CHUNKS = 4  # of a tile: fewer leave the pipeline nothing to overlap


def default_forward_blocks(shape: ForwardShape, chip: str) -> ForwardBlocks:
    """One choice for all chips and widths, the best that `bench/tune_attention.py` found on each of them: predicted ms
    of the kernel alone, lagged softmax, 2026-11-21; 1x8192, 32/8 heads of 128 | 2x8192, 32 of 64 | 2x8192, 8 of 256:

        v5e    3.16 | 4.92 | 3.05      v6e    1.45 | 2.74 | 0.93
        v5p    1.36 | 2.10 | 1.38      tpu7x  1.06 | 2.07 | 0.76

    Next best at 128: block_kv 1024 (v6e 1.60, v5p 1.43, tpu7x 1.20), block_q 1024 (1.50, 1.43, 1.32). Two key heads of
    four queries each are 5 % faster on v6e and tpu7x, and compile for twice as long. Not transposed: 2.75, 2.03, 2.17.

    Raises:
      UnsupportedError: one tile does not fit into the chip's VMEM.
    """
    blocks = ForwardBlocks(vmem_limit=int(_USABLE * vmem_of(chip)))
    if shape.itemsize > 2:  # Six products for one, each of parts of its operands: less is in flight at a time.
        blocks = replace(blocks, block_q=256, block_kv=256, row_chunk=256)
    wanted = max(1, _ROW_CHUNKS // blocks.heads_of(shape.group))
    blocks = replace(blocks, kv_heads=max(n for n in range(1, wanted + 1) if shape.num_kv_heads % n == 0))
    return fit_forward(blocks, shape, chip)


def fit_forward(blocks: ForwardBlocks, shape: ForwardShape, chip: str) -> ForwardBlocks:
    """`blocks` with the longest key chunk that the chip's VMEM holds.

    Raises:
      UnsupportedError: one tile does not fit; the message adds up what it takes.
    """
    return with_longest_chunk("forward", blocks, shape, chip, _FOR_BUFFERS, vmem_terms)
