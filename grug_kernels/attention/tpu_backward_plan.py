# SPDX-License-Identifier: Apache-2.0
"""What the backward kernel visits: decided from the intervals at run time, in a few integers a block."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from grug_kernels.attention.mask import Intervals
from grug_kernels.attention.tpu_backward_blocks import BackwardBlocks

TILE_INTS = 6


class BackwardPlan(NamedTuple):
    """Scalars that the kernel follows.

    tiles: [batch * q_blocks * TILE_INTS]. Of each query block the key tiles first, whole_first, whole_end, last: it
      visits first <= n < last, and in whole_first <= n < whole_end every query that sees anything sees all keys. Then
      two keys: the first half of its queries sees none from early_end on, the second half none before late_start.
    begins: [batch * chunks]. The first query block that each key chunk visits.
    steps: query blocks that a chunk goes through from there; a number known at trace time where one chunk has all keys.
    """

    tiles: Int[Array, " tiles"]
    begins: Int[Array, " chunks_of_rows"]
    steps: int | Int[Array, ""]


def backward_plan(intervals: Intervals, kv_len: int, blocks: BackwardBlocks) -> BackwardPlan:
    """Of `intervals` [batch, q_len]: each block of queries visits one range of key tiles, the least that has all that
    it sees."""
    batch, q_len = intervals.lower.shape
    halves = (batch, q_len // blocks.block_q, 2, blocks.block_q // 2)
    lower, upper = (bound.reshape(halves) for bound in intervals)
    sees = lower < upper
    # A query that sees nothing widens no range, and spoils no whole tile: its weights are 0 whatever the mask.
    starts, ends = jnp.where(sees, lower, kv_len).min(axis=3), jnp.where(sees, upper, 0).max(axis=3)
    last = -(-ends.max(axis=2) // blocks.block_kv)
    first = jnp.minimum(starts.min(axis=2) // blocks.block_kv, last)
    whole_first = -(-jnp.where(sees, lower, 0).max(axis=(2, 3)) // blocks.block_kv)
    whole_end = jnp.where(sees, upper, kv_len).min(axis=(2, 3)) // blocks.block_kv
    whole_first = jnp.clip(whole_first, first, last)
    whole_end = jnp.clip(whole_end, whole_first, last)
    tiles = jnp.stack([first, whole_first, whole_end, last, ends[..., 0], starts[..., 1]], axis=-1)
    tiles = tiles.astype(jnp.int32).reshape(-1)
    chunks = blocks.chunks(kv_len)
    if chunks == 1:  # Every query block is gone through, for its dq is written by the step that it has.
        return BackwardPlan(tiles, jnp.zeros(batch, jnp.int32), q_len // blocks.block_q)
    tiles_per_chunk = blocks.key_chunk // blocks.block_kv
    chunk = jnp.arange(chunks, dtype=jnp.int32)[None, :, None] * tiles_per_chunk
    visits = (first[:, None] < chunk + tiles_per_chunk) & (last[:, None] > chunk) & (first < last)[:, None]
    block = jnp.arange(q_len // blocks.block_q, dtype=jnp.int32)
    ends = jnp.where(visits, block + 1, 0).max(axis=2)
    begins = jnp.minimum(jnp.where(visits, block, q_len // blocks.block_q).min(axis=2), ends)
    return BackwardPlan(tiles, begins.reshape(-1), jnp.maximum(1, (ends - begins).max()))
