# SPDX-License-Identifier: Apache-2.0
"""How the backward kernel is cut: sizes, what VMEM they take, and the choice for each chip."""

from dataclasses import dataclass, replace

from grug_kernels.attention.tpu_vmem import with_longest_chunk
from grug_kernels.tpu import cores_of, lanes, vmem_of


@dataclass(frozen=True)
class BackwardBlocks:
    """How the backward pass is cut.

    block_q, block_kv: one tile, queries against keys. Lengths are whole numbers of them.
    row_chunk: queries of one head that are in the pipeline at a time; an even number of them is in a block.
    kv_heads: key heads of one grid step.
    group_heads: at most so many query heads of each of them. Code, and compile time, grow with their number.
    group_splits: parts of a group that go to different TensorCores, each with sums of dk and dv of its own, in float32,
    added by XLA. For chips with two of them and a single key head, which would leave one idle.
    key_chunk: keys whose dk and dv are summed in VMEM at once. Beyond that length dq goes through HBM between chunks.
    transposed_keys: sum dk and dv as [head_dim, keys]. Better where the matrix unit is wider than head_dim.
    vmem_limit: bytes of VMEM that the compiler may use.

    Raises:
      ValueError: sizes that do not go into one another.
    """

    block_q: int = 512
    block_kv: int = 512
    row_chunk: int = 256
    kv_heads: int = 1
    group_heads: int = 4
    group_splits: int = 1
    key_chunk: int = 8192
    transposed_keys: bool = True
    vmem_limit: int = 100 * 2**20

    def __post_init__(self):
        if self.block_q % (2 * self.row_chunk):
            raise ValueError(
                f"attention backward: block_q={self.block_q} is no even number of row_chunk={self.row_chunk}. Chunks"
                " take turns in two buffers, from one tile to the next: choose a row_chunk that divides block_q / 2."
            )
        if self.key_chunk % self.block_kv:
            raise ValueError(
                f"attention backward: key_chunk={self.key_chunk} is no multiple of block_kv={self.block_kv}."
            )

        if self.group_splits > 1 and self.kv_heads > 1:
            raise ValueError(
                f"attention backward: group_splits={self.group_splits} with kv_heads={self.kv_heads}. A group is split"
                " where there are too few key heads: take kv_heads=1."
            )

    def heads_of(self, group: int) -> int:
        """Query heads of a group in one grid step: the most that divide a part of it."""
        return max(n for n in range(1, self.group_heads + 1) if group // self.group_splits % n == 0)

    def chunk(self, kv_len: int) -> int:
        return min(self.key_chunk, kv_len)

    def chunks(self, kv_len: int) -> int:
        """Key chunks of a row; the last may run past its end, where no tile is ever visited."""
        return -(-kv_len // self.chunk(kv_len))


@dataclass(frozen=True)
class BackwardShape:
    """What VMEM depends on besides the blocks. itemsize: of q, k and v, and of their gradients, unless these are in
    float32; out_error_itemsize: 0 without one."""

    kv_len: int
    num_kv_heads: int
    group: int
    head_dim: int
    v_head_dim: int
    itemsize: int = 2
    out_error_itemsize: int = 0
    float32_gradients: bool = False


def vmem_terms(shape: BackwardShape, blocks: BackwardBlocks) -> dict[str, int]:
    """Bytes of one grid step by use. What the compiler adds, spilled registers, is a few KiB in bfloat16."""
    heads, block_q, block_kv = blocks.kv_heads, blocks.block_q, blocks.block_kv
    group, chunk = blocks.heads_of(shape.group), blocks.chunk(shape.kv_len)
    width, v_width = (lanes(x) for x in (shape.head_dim, shape.v_head_dim))
    queries, keys, item = heads * group * block_q, heads * chunk, shape.itemsize
    statistic = heads * _sublanes(group) * block_q * 4
    has_one_chunk = blocks.chunks(shape.kv_len) == 1
    item_out = 4 if shape.float32_gradients else item
    key_sums = shape.head_dim + shape.v_head_dim if blocks.transposed_keys else width + v_width
    return {
        # Windows are doubled, one being filled as one is used.
        "q": 2 * queries * width * item,
        "dq": 2 * queries * width * (item_out if has_one_chunk else 4),  # float32 from and to HBM between chunks
        "out, dout": 2 * 2 * queries * v_width * item,
        "error of out": 2 * queries * v_width * shape.out_error_itemsize,
        "k, v": 2 * keys * (width + v_width) * item,
        "dk, dv": 2 * keys * (width + v_width) * (item_out if blocks.group_splits == 1 else 4),
        "lse, dlse, delta": 2 * 3 * statistic,
        "bounds": 2 * 2 * block_q * 4,
        "q, dout transposed": heads * group * (shape.head_dim + shape.v_head_dim) * block_q * item,
        "statistics": 2 * statistic,  # lse in base 2, shift
        "sum of dq": heads * group * shape.head_dim * block_q * 4,
        "sums of dk, dv": keys * key_sums * 4,
        "p, ds": 4 * block_kv * lanes(blocks.row_chunk) * item,
    }


def vmem_bytes(shape: BackwardShape, blocks: BackwardBlocks) -> int:
    return sum(vmem_terms(shape, blocks).values())


# Left to the compiler of the VMEM that a chip has, for itself and for registers that it spills.
_USABLE, _FOR_BUFFERS = 0.9, 0.8
_MATRIX_WIDTH = {"v6e": 256, "tpu7x": 256}


def default_backward_blocks(shape: BackwardShape, chip: str) -> BackwardBlocks:
    """One choice but for the order of dk and dv, the best that `bench/tune_attention.py` found: predicted ms of the
    kernel alone, 2026-11-21; 1x8192, 32/8 heads of 128 | 2x8192, 32 of 64 | 2x8192, 8 of 256:

        v5e    7.63 | 11.82 | 8.15      v6e    2.66 | 5.18 | 2.16
        v5p    3.28 |  5.01 | 3.55      tpu7x  2.02 | 4.17 | 1.79

    At 128, v6e: row_chunk 512 11 % slower, 128 30 %; block_q 256 6 %; block_kv 256 7 %, 1024 15 %; v5p: block_kv 1024
    6 %, block_q 1024 4 %. The other order of dk and dv: tpu7x 20 % slower, v5p at 64 29 %, v6e at 256 1 %.

    Raises:
      UnsupportedError: one tile does not fit into the chip's VMEM.
    """
    cores = cores_of(chip)
    blocks = BackwardBlocks(
        # Two heads for row chunks to take turns, an even number of grid steps for two cores.
        kv_heads=2 if shape.group == 1 and shape.num_kv_heads % (2 * cores) == 0 else 1,
        group_splits=2 if cores == 2 and shape.num_kv_heads % 2 and shape.group % 2 == 0 else 1,
        transposed_keys=_MATRIX_WIDTH.get(chip, 128) > shape.head_dim,
        vmem_limit=int(_USABLE * vmem_of(chip)),
    )
    if shape.itemsize > 2:  # Six products for one, each of parts of its operands: less is in flight at a time.
        blocks = replace(blocks, block_q=256, block_kv=256, row_chunk=128, key_chunk=256)
    return fit_backward(blocks, shape, chip)


def fit_backward(blocks: BackwardBlocks, shape: BackwardShape, chip: str) -> BackwardBlocks:
    """`blocks` with the longest key chunk that the chip's VMEM holds.

    Raises:
      UnsupportedError: one tile does not fit; the message adds up what it takes.
    """
    return with_longest_chunk("backward", blocks, shape, chip, _FOR_BUFFERS, vmem_terms)


def _sublanes(rows: int) -> int:
    # A window of fewer than 8 rows is padded to the next power of two.
    return -(-rows // 8) * 8 if rows > 4 else 1 << (rows - 1).bit_length()
