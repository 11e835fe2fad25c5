# SPDX-License-Identifier: Apache-2.0
"""Which key tiles a block of queries visits, from the stripes of its mask: scalar arithmetic inside the kernels.

Stripes depend on the mask alone. One array of them serves every layer, forward and backward, whatever its blocks.
"""

from functools import reduce
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from grug_kernels.attention.mask import STRIPE, Intervals, stripes_of
from grug_kernels.attention.tpu_backward_blocks import BackwardBlocks


class Tiles(NamedTuple):
    """Of a block of queries: it visits the key tiles first <= n < last, and in whole_first <= n < whole_end every query
    that sees anything sees all keys. The first half of its queries sees no key from early_end on, the second half none
    before late_start. begin: the first tile of the chunk of keys that they were cut to."""

    first: Any
    whole_first: Any
    whole_end: Any
    last: Any
    early_end: Any
    late_start: Any
    begin: Any = 0

    def of_chunk(self, begin, num_tiles: int) -> "Tiles":
        cut = {name: jnp.clip(getattr(self, name), begin, begin + num_tiles) for name in self._fields[:4]}
        return self._replace(**cut, begin=begin)


class BackwardPlan(NamedTuple):
    """stripes: as for the forward pass. begins: [batch * chunks], the first query block that each key chunk visits.
    steps: query blocks that a chunk goes through from there; a number known at trace time where one chunk has all keys.
    """

    stripes: Int[Array, " stripes"]
    begins: Int[Array, " chunks_of_rows"]
    steps: int | Int[Array, ""]


def forward_plan(intervals: Intervals, kv_len: int, block_q: int) -> Int[Array, " stripes"]:
    """Flat stripes for `tiles_of`, of queries that are a whole number of blocks: those that come with the intervals, if
    halves of blocks are whole numbers of them."""
    stripes = intervals.stripes
    if stripes is None or block_q % (2 * STRIPE) or stripes.shape[1] * STRIPE != intervals.lower.shape[1]:
        stripes = stripes_of(intervals, kv_len, block_q // 2)
    return stripes.reshape(-1)


def backward_plan(intervals: Intervals, kv_len: int, blocks: BackwardBlocks) -> BackwardPlan:
    """The same, with the query blocks that each chunk of keys has to do with."""
    stripes, chunks = forward_plan(intervals, kv_len, blocks.block_q), blocks.chunks(kv_len)
    batch, q_len = intervals.lower.shape
    q_blocks = q_len // blocks.block_q
    if chunks == 1:  # Every query block is gone through, for its dq is written by the step that it has.
        return BackwardPlan(stripes, jnp.zeros(batch, jnp.int32), q_blocks)
    of_blocks = stripes.reshape(batch, 1, q_blocks, -1, 4)
    first, last = of_blocks[..., 0].min(axis=3), of_blocks[..., 3].max(axis=3)
    chunk = jnp.arange(chunks, dtype=jnp.int32)[None, :, None] * blocks.key_chunk
    visits = (first < chunk + blocks.key_chunk) & (last > chunk)
    block = jnp.arange(q_blocks, dtype=jnp.int32)
    ends = jnp.where(visits, block + 1, 0).max(axis=2)
    begins = jnp.minimum(jnp.where(visits, block, q_blocks).min(axis=2), ends)
    return BackwardPlan(stripes, begins.reshape(-1), jnp.maximum(1, (ends - begins).max()))


def stripes_per_block(stripes, batch: int, q_blocks: int) -> int:
    return stripes.shape[0] // (4 * batch * q_blocks)


def tiles_of(stripes, block, per_block: int, block_kv: int) -> Tiles:
    """stripes: flat, an array or a reference to scalar memory. block: counted over the rows of the batch."""

    def column(i: int) -> list[Any]:
        return [stripes[4 * (block * per_block + n) + i] for n in range(per_block)]

    starts, all_from, all_until, ends = (column(i) for i in range(4))
    size = jnp.int32(block_kv)

    def up(key):
        return lax.div(key + size - 1, size)

    last = up(_greatest(ends))
    first = jnp.minimum(lax.div(_least(starts), size), last)
    whole_first = jnp.clip(up(_greatest(all_from)), first, last)
    whole_end = jnp.clip(lax.div(_least(all_until), size), whole_first, last)
    half = per_block // 2
    return Tiles(first, whole_first, whole_end, last, _greatest(ends[:half]), _least(starts[half:]))


def _least(numbers: list[Any]):
    return reduce(jnp.minimum, numbers)


def _greatest(numbers: list[Any]):
    return reduce(jnp.maximum, numbers)
