# SPDX-License-Identifier: Apache-2.0
"""The body of the backward kernel; see `pallas_tpu_backward` for what it computes and in which order."""

from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from grug_kernels.attention.tpu_backward_blocks import BackwardBlocks
from grug_kernels.attention.tpu_plan import Tiles, tiles_of
from grug_kernels.tpu import LOG2_E, matmul

# As the log-sum-exp of a query that sees nothing: exp2(score - this) is 0 for any finite score. Finite itself.
NOTHING_SEEN = 1e30


@dataclass(frozen=True)
class Static:
    """float32_gradients: dq, dk and dv are not rounded to the types of q, k and v."""

    sm_scale: float
    logit_soft_cap: float | None
    blocks: BackwardBlocks
    float32_gradients: bool = False


class _Inputs(NamedTuple):
    """Of one grid step. q, dout, out, out_error [kv_heads, group, block_q, head_dim | v_head_dim]; k, v [kv_heads,
    key_chunk, head_dim | v_head_dim]; lse, dlse [kv_heads, group, block_q]; lower, upper [1, block_q]."""

    q: Any
    k: Any
    v: Any
    out: Any
    dout: Any
    lse: Any
    dlse: Any
    lower: Any
    upper: Any
    out_error: Any


class Scratch(NamedTuple):
    """q_t, dout_t: transposed, [kv_heads, group, head_dim | v_head_dim, block_q].
    lse, shift [kv_heads, group, block_q]: log-sum-exp in base 2, and delta - dlse. shift is what dp is held against.
    dq [kv_heads, group, head_dim, block_q]; dk, dv [kv_heads, tiles, head_dim | v_head_dim, block_kv], or the last two
    exchanged; all float32. p, ds: of the row chunk in the pipeline, two of [block_kv, row_chunk] each.
    """

    q_t: Any
    dout_t: Any
    lse: Any
    shift: Any
    dq: Any
    dk: Any
    dv: Any
    p: Any
    ds: Any


class _Shape(Enum):
    """Of a tile. UPPER: early queries see nothing of its second half of keys, as on the diagonal of a causal mask.
    LOWER: late queries see nothing of its first half, as where a sliding window begins."""

    WHOLE = auto()
    MASKED = auto()
    UPPER = auto()
    LOWER = auto()


class _Chunk(NamedTuple):
    """Queries of one head against keys of a tile: what is in the pipeline at a time."""

    kv_head: int
    head: int
    first_query: int
    first_key: int
    num_keys: int


class Carry(NamedTuple):
    """Of dq between key chunks: read, written [kv_heads, group, block_q, head_dim] float32, is_writing [1] in SMEM."""

    read: Any
    written: Any
    read_done: Any
    write_done: Any
    is_writing: Any


def kernel(
    stripes_ref, begins_ref, *refs, static: Static, has_out_error: bool, num_chunks: int, q_blocks: int, per_block: int
):
    """Grid (batch, kv_head, key_chunk, group_part, step). dk and dv carry across the steps and parts of a chunk."""
    refs = list(refs)
    inputs = _Inputs(*refs[:9], out_error=refs.pop(9) if has_out_error else None)
    refs = refs[9:]
    if num_chunks > 1:
        refs.pop(0)  # The zeros that dq starts from lie where dq does.
    dk_ref, dv_ref, dq_ref = refs[:3]
    delta_ref = refs.pop(3) if num_chunks == 1 else None
    refs = refs[3:]
    scratch = Scratch(*refs[:7], p=refs[7:9], ds=refs[9:11])
    row, head, chunk, part, step = (pl.program_id(axis) for axis in range(5))
    block = query_block(begins_ref, row, chunk, step, num_chunks, q_blocks)
    tiles_per_chunk = scratch.dk.shape[1]
    begin = chunk * tiles_per_chunk
    tiles = tiles_of(stripes_ref, row * q_blocks + block, per_block, static.blocks.block_kv)
    tiles = tiles.of_chunk(begin, tiles_per_chunk)
    tiles = tiles._replace(**{name: getattr(tiles, name) - begin for name in tiles._fields[:4]})  # in the chunk
    # Past the last query block that a chunk visits, steps come to that block again, and have nothing to add.
    is_repeated = begins_ref[row * num_chunks + chunk] + step > block
    is_active = (tiles.first < tiles.last) & ~is_repeated

    @pl.when((part == 0) & (step == 0))
    def start_chunk():
        scratch.dk[...] = jnp.zeros_like(scratch.dk)
        scratch.dv[...] = jnp.zeros_like(scratch.dv)

    _prepare(inputs, scratch, delta_ref)
    if num_chunks == 1:
        _visit_tiles(static, inputs, scratch, tiles)
        _for_heads(inputs, lambda h, g: _write_transposed(dq_ref.at[h, g], scratch.dq[h, g], static.sm_scale))
    else:
        carry = Carry(*refs[11:])
        queries = pl.ds(pl.multiple_of(block * static.blocks.block_q, static.blocks.block_q), static.blocks.block_q)
        heads = pl.ds(head * static.blocks.kv_heads, static.blocks.kv_heads)
        dq_hbm = dq_ref.at[row, heads, part, :, queries, :]
        _add_through_hbm(static, inputs, scratch, carry, dq_hbm, tiles, is_active)

    @pl.when((part == pl.num_programs(3) - 1) & (step == pl.num_programs(4) - 1))
    def finish_chunk():
        _write_keys(static, scratch, dk_ref, dv_ref)


def query_block(begins_ref, row, chunk, step, num_chunks: int, q_blocks: int):
    return jnp.minimum(begins_ref[row * num_chunks + chunk] + step, q_blocks - 1)


def _for_heads(inputs: _Inputs, body) -> None:
    for h in range(inputs.q.shape[0]):
        for g in range(inputs.q.shape[1]):
            body(h, g)


def _prepare(inputs: _Inputs, scratch: Scratch, delta_ref) -> None:
    """q and dout transposed, statistics, delta = sum out * dout over v_head_dim, and dq = 0."""
    scratch.dq[...] = jnp.zeros_like(scratch.dq)
    sees = inputs.lower[...] < inputs.upper[...]

    def prepare(h, g):
        scratch.q_t[h, g] = inputs.q[h, g].T
        scratch.dout_t[h, g] = inputs.dout[h, g].T
        out = inputs.out[h, g].astype(jnp.float32)
        if inputs.out_error is not None:
            out += inputs.out_error[h, g].astype(jnp.float32)
        delta = _row_sums(out * inputs.dout[h, g].astype(jnp.float32), inputs.q.dtype)
        delta = jnp.where(sees, delta, 0.0)
        if delta_ref is not None:
            delta_ref[h, pl.ds(g, 1), :] = delta
        lse, dlse = inputs.lse[h, pl.ds(g, 1), :], inputs.dlse[h, pl.ds(g, 1), :]
        scratch.lse[h, pl.ds(g, 1), :] = jnp.where(sees, lse * LOG2_E, NOTHING_SEEN)
        scratch.shift[h, pl.ds(g, 1), :] = jnp.where(sees, delta - dlse, 0.0)

    _for_heads(inputs, prepare)


def _row_sums(x, dtype):
    """Of x [rows, width] float32, as [1, rows]: a product with ones, for the matrix unit is idle here and a sum along
    lanes would have to be transposed. In bfloat16 x goes in as two parts, which keep 16 of its bits."""
    if dtype != jnp.float32:
        high = x.astype(dtype)
        x = jnp.concatenate([high, (x - high.astype(jnp.float32)).astype(dtype)], axis=1)
    return matmul(jnp.ones((8, x.shape[1]), x.dtype), x, (1, 1))[:1]


def _visit_tiles(static: Static, inputs: _Inputs, scratch: Scratch, tiles: Tiles) -> None:
    """Adds the key tiles of the plan to dq, dk and dv."""
    visit = partial(_tile, static, inputs, scratch, tiles.begin)
    half = static.blocks.block_kv // 2

    def masked_tile(i, previous):
        tile = tiles.first + i
        tile = jnp.where(tile < tiles.whole_first, tile, tile + tiles.whole_end - tiles.whole_first)
        middle = (tiles.begin + tile) * static.blocks.block_kv + half
        is_early_done, is_late_pending = tiles.early_end <= middle, tiles.late_start >= middle
        shape = jnp.where(is_early_done, 1, jnp.where(is_late_pending, 2, 0))
        bodies = [partial(visit, shape=shape) for shape in (_Shape.MASKED, _Shape.UPPER, _Shape.LOWER)]
        return lax.switch(shape, bodies, tile, previous)

    def whole_tile(tile, previous):
        return visit(tile, previous, shape=_Shape.WHOLE)

    @pl.when(tiles.first < tiles.last)
    def visit_all():
        # Before the first chunk the pipeline holds nothing, which is added to the first tile.
        scratch.p[1][...] = jnp.zeros_like(scratch.p[1])
        scratch.ds[1][...] = jnp.zeros_like(scratch.ds[1])
        masked = tiles.last - tiles.whole_end + tiles.whole_first - tiles.first
        previous = lax.fori_loop(0, masked, masked_tile, tiles.first)
        previous = lax.fori_loop(tiles.whole_first, tiles.whole_end, whole_tile, previous)
        last = _row_chunks(static, inputs, _Shape.WHOLE)[-1]
        _add(static, inputs, scratch, previous, 1, last)


def _row_chunks(static: Static, inputs: _Inputs, shape: _Shape) -> list[_Chunk]:
    """Of a tile of this shape. Their number is even."""
    blocks = static.blocks
    kv_heads, group, block_q, _ = inputs.q.shape

    def keys(start: int) -> tuple[int, int]:
        if shape == _Shape.UPPER and start < block_q // 2:
            return 0, blocks.block_kv // 2
        if shape == _Shape.LOWER and start >= block_q // 2:
            return blocks.block_kv // 2, blocks.block_kv // 2
        return 0, blocks.block_kv

    starts = range(0, block_q, blocks.row_chunk)
    return [_Chunk(h, g, s, *keys(s)) for h in range(kv_heads) for g in range(group) for s in starts]


def _tile(static: Static, inputs: _Inputs, scratch: Scratch, begin, tile, previous, *, shape: _Shape):
    """p and ds of every row chunk with `tile`, and the sums of the chunk before each; those of the last chunk wait for
    the next tile, as those of `previous` did for this one."""
    chunks = _row_chunks(static, inputs, shape)
    last = _row_chunks(static, inputs, _Shape.WHOLE)[-1]
    for n, chunk in enumerate(chunks):
        slot = n % 2
        p, ds = _weights(static, inputs, scratch, begin, tile, chunk, is_masked=shape != _Shape.WHOLE)
        keys = pl.ds(chunk.first_key, chunk.num_keys)
        scratch.p[slot][keys, :] = p.astype(inputs.v.dtype)
        scratch.ds[slot][keys, :] = ds.astype(inputs.k.dtype)
        _add(static, inputs, scratch, tile if n else previous, 1 - slot, chunks[n - 1] if n else last)
    if chunks[-1] != last:  # The next tile adds all the keys of this chunk.
        unseen = pl.ds(0, last.num_keys - chunks[-1].num_keys)
        for ref in (scratch.p[1], scratch.ds[1]):
            ref[unseen, :] = jnp.zeros_like(ref[unseen, :])
    return tile


def _keys(static: Static, tile, chunk: _Chunk):
    """Of k and v."""
    start = pl.multiple_of(tile * static.blocks.block_kv + chunk.first_key, chunk.num_keys)
    return pl.ds(start, chunk.num_keys)


def _weights(static: Static, inputs: _Inputs, scratch: Scratch, begin, tile, chunk: _Chunk, *, is_masked: bool):
    """p and ds / sm_scale [num_keys, row_chunk], float32."""
    h, g, rows = chunk.kv_head, chunk.head, pl.ds(chunk.first_query, static.blocks.row_chunk)
    keys, head = _keys(static, tile, chunk), pl.ds(g, 1)
    z = matmul(inputs.k[h, keys, :], scratch.q_t[h, g, :, rows], (1, 0))
    dp = matmul(inputs.v[h, keys, :], scratch.dout_t[h, g, :, rows], (1, 0))
    if static.logit_soft_cap is None:
        score = z * (static.sm_scale * LOG2_E)
    else:
        z = jnp.tanh(z * (static.sm_scale / static.logit_soft_cap))
        score = z * (static.logit_soft_cap * LOG2_E)
    p = jnp.exp2(score - scratch.lse[h, head, rows])
    if is_masked:
        lower, upper = inputs.lower[:, rows], inputs.upper[:, rows]
        first = (begin + tile) * static.blocks.block_kv + chunk.first_key
        position = first + lax.broadcasted_iota(jnp.int32, z.shape, 0)
        # Below lower, the difference wraps around to more than any length.
        is_seen = (position - lower).astype(jnp.uint32) < (upper - lower).astype(jnp.uint32)
        # An unseen key may overflow exp2; where() drops it.
        p = jnp.where(is_seen, p, 0.0)
    ds = p * (dp - scratch.shift[h, head, rows])
    if static.logit_soft_cap is not None:
        ds = ds * (1.0 - z * z)
    return p, ds


def _add(static: Static, inputs: _Inputs, scratch: Scratch, tile, slot: int, chunk: _Chunk) -> None:
    """Adds the row chunk in `slot` of the pipeline, which belongs to `tile`, to dq, dk and dv."""
    h, g, rows = chunk.kv_head, chunk.head, pl.ds(chunk.first_query, static.blocks.row_chunk)
    keys = pl.ds(chunk.first_key, chunk.num_keys)
    p, ds = scratch.p[slot][keys, :], scratch.ds[slot][keys, :]
    if static.blocks.transposed_keys:
        scratch.dv[h, tile, :, keys] += matmul(scratch.dout_t[h, g, :, rows], p, (1, 1))
        scratch.dk[h, tile, :, keys] += matmul(scratch.q_t[h, g, :, rows], ds, (1, 1))
    else:
        scratch.dv[h, tile, keys, :] += matmul(p, inputs.dout[h, g, rows, :], (1, 0))
        scratch.dk[h, tile, keys, :] += matmul(ds, inputs.q[h, g, rows, :], (1, 0))
    scratch.dq[h, g, :, rows] += matmul(inputs.k[h, _keys(static, tile, chunk), :], ds, (0, 0))


def _write_transposed(ref, x, scale: float) -> None:
    ref[...] = (scale * x).T.astype(ref.dtype)


def _write_keys(static: Static, scratch: Scratch, dk_ref, dv_ref) -> None:
    (kv_heads, tiles_per_chunk), block_kv = scratch.dk.shape[:2], static.blocks.block_kv

    def write(tile, _):
        for h in range(kv_heads):
            keys = pl.ds(pl.multiple_of(tile * block_kv, block_kv), block_kv)
            for ref, gradient, scale in ((dk_ref, scratch.dk, static.sm_scale), (dv_ref, scratch.dv, 1.0)):
                x = gradient[h, tile]
                ref[h, keys, :] = (scale * (x.T if static.blocks.transposed_keys else x)).astype(ref.dtype)

    lax.fori_loop(0, tiles_per_chunk, write, None)


def _add_through_hbm(static, inputs, scratch, carry: Carry, dq_hbm, tiles, is_active) -> None:
    """Adds this chunk's part of dq to what earlier chunks left in HBM.

    Reading overlaps with the tiles, writing with the next step. That step reads another block, unless it is the first
    of its chunk: then it waits before it reads.
    """
    chunk, part, step = (pl.program_id(axis) for axis in (2, 3, 4))
    is_first = (chunk == 0) & (part == 0) & (step == 0)
    ends = [pl.program_id(axis) == pl.num_programs(axis) - 1 for axis in (2, 3, 4)]
    is_last = ends[0] & ends[1] & ends[2]
    read = pltpu.make_async_copy(dq_hbm, carry.read, carry.read_done)
    write = pltpu.make_async_copy(carry.written, dq_hbm, carry.write_done)

    def finish_write():
        @pl.when(carry.is_writing[0] == 1)
        def wait():
            write.wait()
            carry.is_writing[0] = 0

    @pl.when(is_first)
    def start_head():
        carry.is_writing[0] = 0

    pl.when(step == 0)(finish_write)

    def add_head(h, g):
        carry.written[h, g] = carry.read[h, g] + (static.sm_scale * scratch.dq[h, g]).T

    @pl.when(is_active)
    def add():
        read.start()
        _visit_tiles(static, inputs, scratch, tiles)
        read.wait()
        finish_write()
        _for_heads(inputs, add_head)
        write.start()
        carry.is_writing[0] = 1

    pl.when(is_last)(finish_write)
