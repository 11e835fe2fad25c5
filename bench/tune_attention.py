# SPDX-License-Identifier: Apache-2.0
"""Which block sizes are fastest: one attention kernel compiled with several, and the times predicted for them.

    python -m bench.tune_attention forward v6e                         # 1x8192x32/8x128, softmax with a maximum
    python -m bench.tune_attention forward v6e --softmax bounded
    python -m bench.tune_attention backward v5p 2x8192x8x256 --sliding-window 1024

The kernel's own choice comes first, then what `CANDIDATES` changes of it, one at a time. The tables in
`grug_kernels/attention/tpu_forward_blocks.py` and `tpu_backward_blocks.py` were found so. Nothing is measured: times
are predicted from schedules (docs/explanations/tpu_schedule.md), and differences below some percent mean nothing.
"""

import argparse
import logging
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
from jax import ShapeDtypeStruct

from bench.shapes import TPU_ATTENTION_COMPILED, AttentionShape, named, names
from bench.tpu.topology import CHIPS, stay_on_cpu
from bench.tuning import Case, Change, Result, counted, sweep
from grug_kernels.attention import AttentionMask
from grug_kernels.attention.mask import Intervals
from grug_kernels.attention.pallas_tpu_backward import attention_backward
from grug_kernels.attention.pallas_tpu_backward_kernel import Static as BackwardStatic
from grug_kernels.attention.pallas_tpu_forward import attention_forward
from grug_kernels.attention.tpu_backward_blocks import (
    BackwardBlocks,
    BackwardShape,
    default_backward_blocks,
    fit_backward,
)
from grug_kernels.attention.tpu_forward_blocks import ForwardBlocks, ForwardShape, default_forward_blocks, fit_forward
from grug_kernels.attention.tpu_forward_softmax import Softmax
from grug_kernels.attention.tpu_forward_softmax import Static as ForwardStatic
from grug_kernels.attention.tpu_plan import BackwardPlan, backward_plan, forward_plan

Passes = Literal["forward", "backward"]

# The key chunk is always the longest that fits.
CANDIDATES: dict[Passes, tuple[Change, ...]] = {
    "forward": (
        {},
        {"block_q": 256, "row_chunk": 256},
        {"block_q": 1024},
        {"block_kv": 256},
        {"block_kv": 1024},
        {"row_chunk": 256},
        {"row_chunk": 256, "block_kv": 256},
        {"kv_heads": 2},
        {"group_heads": 2},
        {"transposed": False},
        {"transposed": False, "row_chunk": 256},
    ),
    "backward": (
        {},
        {"block_q": 256, "row_chunk": 128},
        {"block_q": 1024},
        {"block_q": 1024, "row_chunk": 512},
        {"block_kv": 256},
        {"block_kv": 1024},
        {"row_chunk": 128},
        {"kv_heads": 2},
        {"group_heads": 2},
        {"transposed_keys": False},
        {"transposed_keys": True},
    ),
}


def forward_blocks(shape: AttentionShape, chip: str, change: Change) -> ForwardBlocks:
    sizes = ForwardShape(*_sizes(shape), with_error=False)
    return fit_forward(_changed(default_forward_blocks(sizes, chip), change), sizes, chip)


def forward_case(shape: AttentionShape, blocks: ForwardBlocks, softmax: Softmax) -> Case:
    q, k, v, bounds, intervals = _inputs(shape)
    plan = forward_plan(intervals, shape.seq_len, blocks.block_q)
    static = ForwardStatic(shape.head_dim**-0.5, None, blocks, softmax=softmax)

    def forward(q, k, v, lower, upper, plan):
        return attention_forward(q, k, v, Intervals(lower, upper), None, plan, static, with_error=False)[:2]

    return Case(forward, (q, k, v, bounds, bounds, plan), {("attention_forward", 0): np.asarray(plan)})


def backward_blocks(shape: AttentionShape, chip: str, change: Change) -> BackwardBlocks:
    sizes = BackwardShape(*_sizes(shape), out_error_itemsize=2)
    return fit_backward(_changed(default_backward_blocks(sizes, chip), change), sizes, chip)


def backward_case(shape: AttentionShape, blocks: BackwardBlocks) -> Case:
    q, k, v, bounds, intervals = _inputs(shape)
    out = ShapeDtypeStruct((*q.shape[:4], v.shape[3]), q.dtype)
    lse = ShapeDtypeStruct(q.shape[:4], jnp.float32)
    plan = backward_plan(intervals, shape.seq_len, blocks)
    steps = int(plan.steps)
    static = BackwardStatic(shape.head_dim**-0.5, None, blocks)

    def backward(q, k, v, out, error, lse, dout, dlse, lower, upper, stripes, begins):
        intervals, plan = Intervals(lower, upper), BackwardPlan(stripes, begins, steps)
        return attention_backward(q, k, v, out, lse, dout, dlse, intervals, plan, static, out_error=error)

    args = (q, k, v, out, out, lse, out, lse, bounds, bounds, plan.stripes, plan.begins)
    tables = (plan.stripes, plan.begins)
    return Case(backward, args, {("attention_backward", n): np.asarray(table) for n, table in enumerate(tables)})


def _changed(blocks: Any, change: Change) -> Any:
    """With a key chunk of one tile: it is fitted anew."""
    return replace(blocks, **change, key_chunk=change.get("block_kv", blocks.block_kv))


def _sizes(shape: AttentionShape) -> tuple[int, ...]:
    """As the shapes of the block tables begin."""
    group = shape.num_heads // shape.num_kv_heads
    return shape.seq_len, shape.num_kv_heads, group, shape.head_dim, shape.v_head_dim or shape.head_dim


def _inputs(shape: AttentionShape):
    """q, k, v as the kernels take them, a bound of the intervals, and the intervals as numbers."""
    seq_len, num_kv_heads, group, head_dim, v_head_dim = _sizes(shape)
    q = ShapeDtypeStruct((shape.batch, num_kv_heads, group, seq_len, head_dim), jnp.bfloat16)
    k, v = (ShapeDtypeStruct((*q.shape[:2], seq_len, width), jnp.bfloat16) for width in (head_dim, v_head_dim))
    mask = AttentionMask(causal=True, sliding_window=shape.sliding_window)
    bounds = ShapeDtypeStruct((shape.batch, seq_len), jnp.int32)
    return q, k, v, bounds, mask.intervals(shape.batch, seq_len, seq_len)


def measured(passes: Passes, chip: str, shape: AttentionShape, softmax: Softmax, change: Change) -> Result:
    def case_of(change: Change) -> Case:
        if passes == "forward":
            return forward_case(shape, forward_blocks(shape, chip, change), softmax)
        return backward_case(shape, backward_blocks(shape, chip, change))

    return counted(change, case_of, chip)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tune_attention", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("passes", choices=get_args(Passes))
    parser.add_argument("chip", choices=CHIPS)
    parser.add_argument("shape", nargs="?", choices=names(TPU_ATTENTION_COMPILED), default="1x8192x32/8x128")
    parser.add_argument("--softmax", choices=get_args(Softmax), default="lagged", help="of the forward pass")
    parser.add_argument("--sliding-window", type=int, help="in place of the shape's own")
    options = parser.parse_args()
    stay_on_cpu()
    logging.getLogger("bench.tpu.schedule").setLevel(logging.ERROR)
    shape = named(TPU_ATTENTION_COMPILED, options.shape)
    if options.sliding_window:
        shape = replace(shape, name=f"{shape}, window {options.sliding_window}", sliding_window=options.sliding_window)
    softmax = f", {options.softmax} softmax" if options.passes == "forward" else ""
    measure = partial(measured, options.passes, options.chip, shape, options.softmax)
    sweep(measure, CANDIDATES[options.passes], f"{options.passes}, {options.chip}, {shape}{softmax}")


if __name__ == "__main__":
    main()
