# SPDX-License-Identifier: Apache-2.0
"""Forward pass of attention on a TPU: the call around `pallas_tpu_forward_kernel`."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from grug_kernels.attention.pallas_tpu_forward_kernel import kernel
from grug_kernels.attention.tpu_forward_blocks import ForwardBlocks
from grug_kernels.attention.tpu_forward_softmax import Outputs, Static
from grug_kernels.attention.tpu_plan import stripes_per_block, tiles_of


def attention_forward(
    q, k, v, intervals, sinks, plan, static: Static, *, with_error: bool, interpret: Any = False
) -> Outputs:
    """out [batch, num_kv_heads, group, q_len, v_head_dim] in the type of q, and of each query in float32 lse and, if
    `static` says so, its largest score, [batch, num_kv_heads, group, q_len]. with_error: what out lost when it was
    rounded, laid out like it.

    q [batch, num_kv_heads, group, q_len, head_dim]; k, v [batch, num_kv_heads, kv_len, head_dim | v_head_dim]; lengths
    are whole numbers of blocks. intervals int32 [batch, q_len]; plan: of `forward_plan`; sinks [num_heads] or None.
    """
    batch, num_kv_heads, group, q_len, head_dim = q.shape
    kv_len, v_head_dim = v.shape[2:]
    blocks = static.blocks
    heads, part, block_q, in_vmem = blocks.kv_heads, blocks.heads_of(group), blocks.block_q, blocks.chunk(kv_len)
    parts = group // part
    grid = (batch, num_kv_heads // heads * parts, q_len // block_q, -(-kv_len // in_vmem))
    per_block = stripes_per_block(plan, batch, grid[2])
    k_norm = jnp.square(k.astype(jnp.float32)).sum(axis=-1).max(axis=-1)
    k_norm = jnp.repeat(k_norm.reshape(batch, -1, heads).max(axis=2), parts, axis=1).reshape(-1)

    def keys(b, h, i, c, plan_ref, *_):
        """Keys that are not visited are not fetched either: the index stays where it was."""
        if grid[3] > 1:
            tiles = tiles_of(plan_ref, b * grid[2] + i, per_block, in_vmem)
            c = jnp.clip(c, tiles.first, jnp.maximum(tiles.last - 1, tiles.first))
        return b, lax.div(h, jnp.int32(parts)), c, 0

    def queries(b, h, i, *_):
        return b, h, 0, i, 0

    bounds = pl.BlockSpec((None, 1, block_q), lambda b, h, i, *_: (b, 0, i))
    out_spec = pl.BlockSpec((None, heads, part, block_q, v_head_dim), queries)
    row_spec = pl.BlockSpec((None, heads, part, 1, block_q), lambda b, h, i, *_: (b, h, 0, 0, i))
    shape_of = partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(q).manual_axis_type)
    in_parts = (batch, num_kv_heads * parts, part, q_len)
    out_type = shape_of((*in_parts, v_head_dim), q.dtype)
    row_type = shape_of((*in_parts[:3], 1, q_len), jnp.float32)

    def results(by_width, by_row):
        return Outputs(by_width, by_row, by_width if with_error else None, by_row if static.with_max_logits else None)

    found = pl.pallas_call(
        partial(kernel, static=static, per_block=per_block),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=grid,
            in_specs=[
                pl.BlockSpec((None, heads, part, block_q, head_dim), queries),
                pl.BlockSpec((None, heads, in_vmem, head_dim), keys),
                pl.BlockSpec((None, heads, in_vmem, v_head_dim), keys),
                bounds,
                bounds,
            ],
            out_specs=results(out_spec, row_spec),
            scratch_shapes=_scratch_shapes(blocks, part, v),
        ),
        out_shape=results(out_type, row_type),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=blocks.vmem_limit
        ),
        cost_estimate=_cost_estimate(q, k, v),
        name="attention_forward",
        interpret=interpret,
    )(
        plan,
        k_norm,
        None if sinks is None else sinks.astype(jnp.float32),
        q.reshape(*in_parts, head_dim),
        k,
        v,
        *(bound[:, None] for bound in intervals[:2]),
    )
    shapes = results((*q.shape[:4], v_head_dim), q.shape[:4])
    return Outputs(*(x if x is None else x.reshape(shape) for x, shape in zip(found, shapes, strict=True)))


def _scratch_shapes(blocks: ForwardBlocks, group_heads: int, v) -> list[Any]:
    """As `_Refs` has them, from reference on."""
    heads = blocks.kv_heads * group_heads
    row = pltpu.VMEM((heads, *blocks.as_tile(1, blocks.block_q)), jnp.float32)
    weighted = pltpu.VMEM((heads, *blocks.as_tile(v.shape[-1], blocks.block_q)), jnp.float32)
    stage = (2, *blocks.as_tile(blocks.block_kv, blocks.row_chunk))
    stages = [pltpu.VMEM(stage, v.dtype), pltpu.VMEM(stage, jnp.float32)]
    return [row, row, row, weighted, row, *stages, row, row, weighted]


def _cost_estimate(q, k, v) -> pl.CostEstimate:
    """As if a causal mask hid half: what it hides is known at run time only."""
    batch, num_kv_heads, group, q_len, head_dim = q.shape
    scores = batch * num_kv_heads * group * q_len * k.shape[2] // 2
    moved = sum(x.size * x.dtype.itemsize for x in (q, k, v)) + q.size // head_dim * v.shape[-1] * q.dtype.itemsize
    return pl.CostEstimate(flops=2 * scores * (head_dim + v.shape[-1]), transcendentals=scores, bytes_accessed=moved)
