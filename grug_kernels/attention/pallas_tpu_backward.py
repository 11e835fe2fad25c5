# SPDX-License-Identifier: Apache-2.0
"""Backward pass of attention on a TPU: one kernel, five matmuls a tile, dq, dk and dv summed in float32.

One grid step takes `block_q` queries of a few heads of a group against the keys of one chunk (mostly: all of them),
whose k, v, dk and dv stay in VMEM from one query block to the next. It loops over the key tiles that its plan names.
In a tile queries come in row chunks of one head; scores lie [keys, queries], statistics of queries are rows:

    z  = k q^T       dp = v dout^T        p = exp(z - lse)        ds = p * (dp - delta + dlse)
    dq^T += k^T ds   dk^T += q^T ds^T     dv^T += dout^T p^T

Transposed, the gradients have the tile of p or ds as the operand that stays in the matrix unit, 256 wide, and only
head_dim rows pass it: with head_dim 128, half the time of the usual order.

Row chunks are a pipeline of two stages: z to ds, whose p and ds go to VMEM in the type of the inputs, and the sums.
The sums of chunk n - 1 are issued with the scores of chunk n, across tiles too. Handed over as values instead, and not
across tiles, the compiler spills registers and takes a tenth longer.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from grug_kernels.attention.mask import Intervals
from grug_kernels.attention.pallas_tpu_backward_kernel import Static, kernel, query_block
from grug_kernels.attention.results import delta_of
from grug_kernels.attention.tpu_backward_blocks import BackwardBlocks
from grug_kernels.attention.tpu_plan import BackwardPlan, stripes_per_block
from grug_kernels.sharding import vary_with


def attention_backward(
    q,
    k,
    v,
    out,
    lse,
    dout,
    dlse,
    intervals: Intervals,
    plan: BackwardPlan,
    static: Static,
    *,
    out_error=None,
    interpret: Any = False,
):
    """dq, dk, dv in the types of q, k, v, or as static.float32_gradients says; and delta = sum out * dout, float32
    [batch, num_kv_heads, group, q_len].

    q, out, dout [batch, num_kv_heads, group, q_len, head_dim | v_head_dim]; k, v [batch, num_kv_heads, kv_len,
    head_dim | v_head_dim]; lse, dlse like delta; intervals [batch, q_len]; lengths whole numbers of blocks. A query
    that sees nothing has dq and delta 0, whatever its lse, out and cotangents.

    Up to blocks.key_chunk keys dq stays in VMEM. Beyond, chunks of keys take turns, and add to dq in HBM, in float32:
    twice 4 bytes an element and chunk, beside a matmul of all of the chunk's keys.

    out_error: what `out` lost when it was rounded, laid out like it, in any floating-point type. With it delta is as
    good as from out in float32. Without it, where one key has most of the weight, dq and dk are up to three times as
    wrong as plain jnp's in bfloat16: dp - delta is then a small difference of large numbers.

    Raises:
      ValueError: lengths or heads that are no whole number of blocks.
    """
    blocks = static.blocks
    _check(q, k, blocks)
    batch, num_kv_heads, group, q_len, head_dim = q.shape
    kv_len, v_head_dim = v.shape[2:]
    heads, block_q, chunk, chunks = blocks.kv_heads, blocks.block_q, blocks.chunk(kv_len), blocks.chunks(kv_len)
    q_blocks, splits = q_len // block_q, blocks.group_splits
    parts = group // splits // blocks.heads_of(group)

    def in_parts(x):
        return x.reshape(batch, num_kv_heads * splits, parts, blocks.heads_of(group), *x.shape[3:])

    def block(b, c, i, begins_ref):
        return query_block(begins_ref, b, c, i, chunks, q_blocks)

    def by_query(b, h, c, part, i, _, begins_ref):
        return b, h, part, 0, block(b, c, i, begins_ref), 0

    def by_key(b, h, c, *_):
        return b, lax.div(h, jnp.int32(splits)), c, 0

    def by_split(b, h, c, *_):
        return b, h, c, 0

    q_spec = pl.BlockSpec((None, heads, None, blocks.heads_of(group), block_q, head_dim), by_query)
    out_spec = pl.BlockSpec((None, heads, None, blocks.heads_of(group), block_q, v_head_dim), by_query)
    k_spec, v_spec = (pl.BlockSpec((None, heads, chunk, width), by_key) for width in (head_dim, v_head_dim))
    dk_spec, dv_spec = (pl.BlockSpec((None, heads, chunk, width), by_split) for width in (head_dim, v_head_dim))
    stat_spec = pl.BlockSpec((None, heads, None, blocks.heads_of(group), block_q), lambda *at: by_query(*at)[:5])
    bound_spec = pl.BlockSpec(
        (None, 1, block_q), lambda b, h, c, part, i, _, begins_ref: (b, 0, block(b, c, i, begins_ref))
    )

    lower, upper = (bound[:, None] for bound in intervals[:2])
    operands = [in_parts(q), k, v, *map(in_parts, (out, dout, lse, dlse)), lower, upper]
    in_specs = [q_spec, k_spec, v_spec, out_spec, out_spec, stat_spec, stat_spec, bound_spec, bound_spec]
    if out_error is not None:
        operands.append(in_parts(out_error))
        in_specs.append(out_spec)
    out_specs = [dk_spec, dv_spec, q_spec, stat_spec]
    shape_of = partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(q).manual_axis_type)
    dtype = jnp.float32 if static.float32_gradients else q.dtype
    key_dtype = dtype if splits == 1 else jnp.float32
    out_shapes = [
        shape_of((batch, num_kv_heads * splits, kv_len, head_dim), key_dtype),
        shape_of((batch, num_kv_heads * splits, kv_len, v_head_dim), key_dtype),
        shape_of(in_parts(q).shape, dtype),
        shape_of(in_parts(lse).shape, jnp.float32),
    ]
    aliases = {}
    if chunks > 1:
        # dq is read and written by the kernel's own copies. delta would be written once for each chunk.
        out_specs[2:] = [pl.BlockSpec(memory_space=pl.ANY)]
        out_shapes[2:] = [shape_of(in_parts(q).shape, jnp.float32)]
        in_specs.append(out_specs[2])
        aliases = {2 + len(operands): 2}
        operands.append(vary_with(q, jnp.zeros(in_parts(q).shape, jnp.float32)))

    dk, dv, dq, *in_kernel = pl.pallas_call(
        partial(
            kernel,
            static=static,
            has_out_error=out_error is not None,
            num_chunks=chunks,
            q_blocks=q_blocks,
            per_block=stripes_per_block(plan.stripes, batch, q_blocks),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, num_kv_heads * splits // heads, chunks, parts, plan.steps),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=_scratch_shapes(q, v, blocks),
        ),
        out_shape=out_shapes,
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary", "arbitrary"),
            vmem_limit_bytes=blocks.vmem_limit,
        ),
        cost_estimate=_cost_estimate(q, k, v),
        name="attention_backward",
        interpret=interpret,
    )(plan.stripes, plan.begins, *operands)
    if splits > 1:
        dk, dv = (x.reshape(*k.shape[:2], splits, *x.shape[2:]).sum(axis=2).astype(dtype) for x in (dk, dv))
    delta = in_kernel[0].reshape(lse.shape) if in_kernel else _delta(out, out_error, dout, intervals)
    return dq.reshape(q.shape).astype(dtype), dk, dv, delta


def _delta(out, out_error, dout, intervals: Intervals):
    """As the kernel makes it for itself; where nobody asks for it XLA drops this."""
    delta = delta_of(out, out_error, dout)[..., 0]
    return jnp.where((intervals.lower < intervals.upper)[:, None, None], delta, 0.0)


def _scratch_shapes(q, v, blocks: BackwardBlocks) -> list[Any]:
    """In the order of `Scratch`, then of `Carry`."""
    (_, _, group, _, head_dim), (_, _, kv_len, v_head_dim) = q.shape, v.shape
    heads, block_q, block_kv = blocks.kv_heads, blocks.block_q, blocks.block_kv
    group = blocks.heads_of(group)
    tiles = blocks.chunk(kv_len) // block_kv

    def keys_of(width: int):
        shape = (width, block_kv) if blocks.transposed_keys else (block_kv, width)
        return pltpu.VMEM((heads, tiles, *shape), jnp.float32)

    shapes = [
        pltpu.VMEM((heads, group, head_dim, block_q), q.dtype),
        pltpu.VMEM((heads, group, v_head_dim, block_q), q.dtype),
        pltpu.VMEM((heads, group, block_q), jnp.float32),
        pltpu.VMEM((heads, group, block_q), jnp.float32),
        pltpu.VMEM((heads, group, head_dim, block_q), jnp.float32),
        keys_of(head_dim),
        keys_of(v_head_dim),
        *[pltpu.VMEM((block_kv, blocks.row_chunk), q.dtype)] * 4,
    ]
    if blocks.chunks(kv_len) > 1:
        part = pltpu.VMEM((heads, group, block_q, head_dim), jnp.float32)
        shapes += [part, part, pltpu.SemaphoreType.DMA, pltpu.SemaphoreType.DMA, pltpu.SMEM((1,), jnp.int32)]
    return shapes


def _cost_estimate(q, k, v) -> pl.CostEstimate:
    """Of a causal mask: the plan is data, and XLA has to be told a number."""
    batch, num_kv_heads, group, q_len, head_dim = q.shape
    scores = batch * num_kv_heads * group * q_len * k.shape[2] // 2
    by_query = q.size // head_dim * (2 * head_dim + 2 * v.shape[3])
    return pl.CostEstimate(
        flops=2 * scores * (3 * head_dim + 2 * v.shape[3]),
        transcendentals=scores,
        bytes_accessed=(by_query + 2 * k.size + 2 * v.size) * q.dtype.itemsize,
    )


def _check(q, k, blocks: BackwardBlocks) -> None:
    extents = {
        "q_len": (q.shape[3], "block_q", blocks.block_q),
        "kv_len": (k.shape[2], "block_kv", blocks.block_kv),
        "num_kv_heads": (q.shape[1], "kv_heads", blocks.kv_heads),
        "group": (q.shape[2], "group_splits", blocks.group_splits),
    }
    for name, (extent, block, size) in extents.items():
        if extent % size:
            raise ValueError(
                f"attention backward: {name}={extent} is no multiple of {block}={size} (q {q.shape}, k {k.shape})."
                " Pad it, with queries that see nothing and keys that none sees, or choose another size."
            )
