# SPDX-License-Identifier: Apache-2.0
"""How many queries and keys the blockwise implementations take at once."""

from dataclasses import dataclass

# On 2 CPU cores, 8/4 heads, float32, forward and backward: 256 x 256 takes 71 ms at batch 2, length 1024, head_dim 32
# (512 x 512: 182 ms, its scores leave the cache; 128 x 128: 69), and 81 ms at length 2048, head_dim 64 (185; 88).
_XLA_BLOCK = 256


@dataclass(frozen=True)
class BlockSizes:
    """`block_q` queries against `block_kv` keys: one block of scores. Lengths need not divide by either.

    Raises:
      ValueError: a size below 1.
    """

    block_q: int
    block_kv: int

    def __post_init__(self):
        for name, size in (("block_q", self.block_q), ("block_kv", self.block_kv)):
            if size < 1:
                raise ValueError(
                    f"attention: {name}={size}; a block holds at least 1 position, such as BlockSizes(256, 256)."
                )


def default_block_sizes(q_len: int, kv_len: int) -> BlockSizes:
    """For "xla": one block where the length allows it, else equal blocks of at most 256."""
    return BlockSizes(*(_equal_blocks(length) for length in (q_len, kv_len)))


def _equal_blocks(length: int) -> int:
    # Length 300 as 150 + 150: 256 + 256 would be 70 % more work.
    return -(-length // -(-length // _XLA_BLOCK))
