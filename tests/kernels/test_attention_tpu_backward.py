# SPDX-License-Identifier: Apache-2.0
"""The backward kernel for TPUs, interpreted: gradients judged by float64, its plan by dense masks, races by JAX."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # has what detect_races found
from jax.experimental.pallas import tpu as pltpu

from bench.tpu import units
from bench.tpu.core import CORES
from bench.tpu.record import compiling
from bench.tpu.topology import LIBTPU_IS_MISSING, has_libtpu, tpu_topology
from grug_kernels.attention.mask import AttentionMask, Intervals
from grug_kernels.attention.pallas_tpu_backward import attention_backward
from grug_kernels.attention.pallas_tpu_backward_kernel import Static
from grug_kernels.attention.tpu_backward_blocks import (
    BackwardBlocks,
    BackwardShape,
    default_backward_blocks,
    vmem_bytes,
)
from grug_kernels.attention.tpu_plan import BackwardPlan, backward_plan, tiles_of
from grug_kernels.chips import TPUS
from grug_kernels.dispatch import UnsupportedError
from grug_kernels.tpu import cores_of
from tests.kernels.test_attention import Case, compiled, oracle, random_mask, rms
from tests.kernels.test_attention_mask import dense_mask, masks

TINY = BackwardBlocks(block_q=16, block_kv=16, row_chunk=8, key_chunk=64)
CASES = {
    "grouped": (Case(2, 48, 48, 4, 2, 16, 16, (0, 0), dtype="bfloat16"), TINY),
    # dq through HBM, the last chunk past the end, three of the six heads of a group at a time
    "chunks": (Case(2, 48, 80, 6, 1, 8, 24, (0, 0), dtype="bfloat16"), replace(TINY, key_chunk=32)),
    "natural": (
        Case(1, 32, 64, 4, 4, 24, 8, (0, 0), logit_soft_cap=2.0, sinks=True),
        replace(TINY, row_chunk=4, kv_heads=2, key_chunk=32, transposed_keys=False),
    ),
    "split": (Case(1, 32, 48, 8, 1, 8, 8, (0, 0), dtype="bfloat16"), replace(TINY, group_splits=2, group_heads=2)),
    "small": (Case(1, 32, 32, 4, 2, 8, 8, (0, 0), dtype="bfloat16"), replace(TINY, key_chunk=32)),
    "small chunks": (Case(1, 32, 32, 4, 2, 8, 8, (0, 0), dtype="bfloat16"), replace(TINY, key_chunk=16, group_heads=1)),
    "small split": (Case(1, 32, 32, 4, 1, 8, 8, (0, 0), dtype="bfloat16"), replace(TINY, key_chunk=16, group_splits=2)),
}


def by_group(x, num_kv_heads: int):
    """[batch, length, heads, width] -> [batch, num_kv_heads, group, length, width]."""
    return x.swapaxes(1, 2).reshape(x.shape[0], num_kv_heads, -1, x.shape[1], x.shape[3])


def from_group(x):
    return x.reshape(x.shape[0], -1, *x.shape[3:]).swapaxes(1, 2)


@cache
def compiled_kernel(name: str, interpret=True):
    """dq, dk, dv, delta from (q, k, v, out, out_error, lse, dout, dlse, intervals), laid out as in the public API."""
    case, blocks = CASES[name]
    static = Static(case.head_dim**-0.5, case.logit_soft_cap, blocks)

    # Tests compile for longer than they run.
    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(q, k, v, out, out_error, lse, dout, dlse, intervals):
        q, out, out_error, dout = (by_group(x, case.num_kv_heads) for x in (q, out, out_error, dout))
        lse, dlse = (x.reshape(q.shape[:4]) for x in (lse, dlse))
        plan = backward_plan(intervals, case.kv_len, blocks)
        dq, dk, dv, delta = attention_backward(
            q,
            k.swapaxes(1, 2),
            v.swapaxes(1, 2),
            out,
            lse,
            dout,
            dlse,
            intervals,
            plan,
            static,
            out_error=out_error,
            interpret=interpret,
        )
        return from_group(dq), dk.swapaxes(1, 2), dv.swapaxes(1, 2), delta.reshape(delta.shape[0], -1, delta.shape[3])

    return run


def run_kernel(name: str, inputs, mask: AttentionMask, interpret=True):
    """The kernel's results, with out and lse as exact as their types allow, and the float64 ones."""
    case, _ = CASES[name]
    q, k, v, _, dout, dlse = inputs
    exact_out, exact_lse, *gradients, _ = oracle(case, inputs, mask)
    out = jnp.asarray(exact_out, case.dtype)
    out_error = jnp.asarray(exact_out - np.asarray(out, np.float64), case.dtype)
    lse = jnp.asarray(exact_lse, jnp.float32)
    intervals = mask.intervals(case.batch, case.q_len, case.kv_len)
    results = compiled_kernel(name, interpret)(q, k, v, out, out_error, lse, dout, dlse, intervals)
    delta = np.einsum("btnh,btnh->bnt", exact_out, np.asarray(dout, np.float64))
    return results, (*gradients, delta)


def squared_errors(name: str, inputs, mask: AttentionMask, results, exact) -> np.ndarray:
    """[dq | dk | dv, ours | plain jnp's in the same type]."""
    case, _ = CASES[name]
    plain = compiled(case, "reference")(*inputs, mask)[2:5]
    return np.array(
        [
            [np.square(np.asarray(x, np.float64) - truth).mean() for x in pair]
            for *pair, truth in zip(results[:3], plain, exact[:3], strict=True)
        ]
    )


def assert_good(name: str, inputs, mask: AttentionMask, results, exact) -> None:
    """In the root mean square at most twice as wrong as plain jnp, and nothing for queries that see nothing.

    Twice for a single draw: where the softmax is peaked few numbers matter, and 1.63 was met. `test_errors` has the
    mean. Where gradients cancel to nothing, ten roundings of float32, as in `test_attention`.
    """
    case, _ = CASES[name]
    errors = np.sqrt(squared_errors(name, inputs, mask, results, exact))
    slack = 1e-6 * np.array([1.0, rms(np.asarray(inputs[0], np.float64)), 1.0])
    np.testing.assert_array_less(errors[:, 0], 2 * errors[:, 1] + slack)
    np.testing.assert_allclose(results[3], exact[3], rtol=0, atol=1e-4)
    intervals = mask.intervals(case.batch, case.q_len, case.kv_len)
    empty = np.asarray(intervals.lower >= intervals.upper)
    assert not np.asarray(results[0])[empty].any()
    assert not np.asarray(results[3]).swapaxes(1, 2)[empty].any()


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_errors(scale):
    """Over a few draws at most 1.3 times plain jnp's. What is left above 1 is ds, rounded before it is multiplied;
    plain jnp on a CPU multiplies it in float32, on a TPU it would be rounded too."""
    name, total = "grouped", np.zeros((3, 2))
    for seed in range(5):
        inputs = CASES[name][0].inputs(seed, scale)
        total += squared_errors(name, inputs, AttentionMask(), *run_kernel(name, inputs, AttentionMask()))
    ratios = np.sqrt(total[:, 0] / total[:, 1])
    assert (ratios <= 1.3).all(), ratios


@settings(deadline=None, max_examples=5)
@given(scale=st.sampled_from([1.0, 20.0]), seed=st.integers(0, 10**6))
@pytest.mark.parametrize("name", ["grouped", "chunks", "natural", "split"])
def test_gradients(name, scale, seed):
    """Of every mask, one after another with the same program; at scale 20 the softmax is peaked."""
    case, _ = CASES[name]
    inputs, mask = case.inputs(seed, scale), random_mask(case, np.random.default_rng(seed))
    results, exact = run_kernel(name, inputs, mask)
    assert [x.dtype for x in results] == [case.dtype] * 3 + [jnp.float32]
    assert_good(name, inputs, mask, results, exact)


@pytest.mark.parametrize("window", [3, 15, 20, 29])
@pytest.mark.parametrize("name", ["grouped", "natural"])
def test_windows(name, window):
    """Between them tiles of every shape: cut in half at either end, masked and not to be cut, whole."""
    case, _ = CASES[name]
    nothing = AttentionMask(
        segment_ids=jnp.zeros((case.batch, case.kv_len), jnp.int32), prefix_len=jnp.zeros(case.batch, jnp.int32)
    )
    inputs, mask = case.inputs(window, 1.0), replace(nothing, sliding_window=jnp.asarray(window, jnp.int32))
    assert_good(name, inputs, mask, *run_kernel(name, inputs, mask))


@pytest.mark.parametrize("name", ["small", "small chunks", "small split"])
def test_no_races_and_nothing_uninitialised(name):
    """Memory starts as NaN, copies run as late as they may, and two cores share the parallel axes."""
    case, _ = CASES[name]
    inputs = case.inputs(0, 1.0)
    ids = jnp.where(jnp.arange(case.kv_len) < case.kv_len - 9, jnp.arange(case.kv_len) // 11, -1)
    mask = AttentionMask(segment_ids=jnp.broadcast_to(ids, (case.batch, case.kv_len)))
    interpret = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    results, exact = run_kernel(name, inputs, mask, interpret)
    assert_good(name, inputs, mask, results, exact)
    assert interpret_pallas_call.races is not None
    assert not interpret_pallas_call.races.races_found


def test_without_out_error_peaked_gradients_are_worse():
    """Why the forward pass returns it: from bfloat16 `out`, delta is off by more than dp - delta often is."""
    name = "grouped"
    case, _ = CASES[name]
    q, k, v, _, dout, dlse = inputs = case.inputs(0, 20.0)
    (dq, *_), (exact_dq, *_) = run_kernel(name, inputs, AttentionMask())
    exact_out, exact_lse, *_ = oracle(case, inputs, AttentionMask())
    out = jnp.asarray(exact_out, case.dtype)
    intervals = AttentionMask().intervals(case.batch, case.q_len, case.kv_len)
    lse = jnp.asarray(exact_lse, jnp.float32)
    rounded, *_ = compiled_kernel(name)(q, k, v, out, jnp.zeros_like(out), lse, dout, dlse, intervals)
    error, rounded_error = (rms(np.asarray(x, np.float64) - exact_dq) for x in (dq, rounded))
    assert rounded_error > 1.5 * error


def test_tiles_outside_the_plan_are_never_touched():
    """NaN in the keys and values that no query's range of tiles has: one visit would spread it to dq, dk or dv."""
    name = "grouped"
    case, _ = CASES[name]
    q, k, v, *rest = case.inputs(0, 1.0)
    ids = jnp.broadcast_to(jnp.where(jnp.arange(48) < 32, -1, 0), (2, 48))
    k, v = (x.at[:, :32].set(jnp.nan) for x in (k, v))
    intervals = AttentionMask(segment_ids=ids).intervals(2, 48, 48)
    out, lse = jnp.zeros_like(q), jnp.zeros((2, case.num_heads, 48))
    results = compiled_kernel(name)(q, k, v, out, out, lse, rest[1], rest[2], intervals)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in results)


def test_cotangents_of_queries_that_see_nothing_reach_nothing():
    """However large, and NaN for lse, whose value there is -inf."""
    name = "grouped"
    case, _ = CASES[name]
    inputs = case.inputs(0, 1.0)
    mask = AttentionMask(segment_ids=jnp.broadcast_to(jnp.where(jnp.arange(48) % 24 < 7, -1, 0), (2, 48)))
    empty = jnp.arange(48) % 24 < 7
    q, k, v, sinks, dout, dlse = inputs
    wild = (q, k, v, sinks, jnp.where(empty[:, None, None], 1e30, dout), jnp.where(empty, jnp.nan, dlse))
    calm = (q, k, v, sinks, jnp.where(empty[:, None, None], 0, dout), jnp.where(empty, 0, dlse))
    for ours, expected in zip(run_kernel(name, wild, mask)[0], run_kernel(name, calm, mask)[0], strict=True):
        np.testing.assert_array_equal(ours, expected)


@settings(deadline=None, max_examples=40)
@given(mask=masks(2, 24), key_chunk=st.sampled_from([4, 8, 12, 24]))
def test_plan(mask, key_chunk):
    """Any tile in which a query sees any key is visited, and a range ends with such tiles; whole ones need no mask."""
    blocks = BackwardBlocks(block_q=8, block_kv=4, row_chunk=2, key_chunk=key_chunk)
    plan = backward_plan(mask.intervals(2, 24, 24), 24, blocks)
    seen = dense_mask(mask, 2, 24, 24)
    tiles = np.stack(tiles_of(plan.stripes, np.arange(6), 2, 4)[:6], axis=-1).reshape(2, 3, 6)
    in_tiles = seen.reshape(2, 3, 8, 6, 4)
    for b, i in np.ndindex(2, 3):
        first, whole_first, whole_end, last, early_end, late_start = tiles[b, i]
        needed = np.flatnonzero(in_tiles[b, i].any(axis=(0, 2)))
        assert (first, last) == ((needed[0], needed[-1] + 1) if needed.size else (last, last))
        assert first <= whole_first <= whole_end <= last
        sees = in_tiles[b, i].any(axis=(1, 2))
        assert in_tiles[b, i][sees, whole_first:whole_end].all()
        rows = seen[b, 8 * i : 8 * i + 8]
        assert not rows[:4, early_end:].any()
        assert not rows[4:, :late_start].any()
    chunks = blocks.chunks(24)
    begins, visits = np.asarray(plan.begins).reshape(2, chunks), in_tiles.any(axis=(2, 4))
    for b, c in np.ndindex(2, chunks):
        tiles_per_chunk = key_chunk // 4
        needed = np.flatnonzero(visits[b, :, c * tiles_per_chunk : (c + 1) * tiles_per_chunk].any(axis=1))
        assert all(begins[b, c] <= i < begins[b, c] + plan.steps for i in needed)


def test_plan_of_a_long_causal_row_is_exact():
    """No tile above the diagonal, every tile below it whole; the diagonal is cut in half. 64k tokens, 8 chunks."""
    blocks, length = BackwardBlocks(), 2**16
    position = jnp.arange(length, dtype=jnp.int32)[None]
    plan = backward_plan(Intervals(jnp.zeros_like(position), position + 1), length, blocks)
    block = np.arange(128)
    tiles = np.stack(tiles_of(plan.stripes, block, 2, 512)[:6], axis=-1)
    np.testing.assert_array_equal(tiles[:, 0], 0)
    np.testing.assert_array_equal(tiles[:, 2], block)
    np.testing.assert_array_equal(tiles[:, 3], block + 1)
    np.testing.assert_array_equal(tiles[:, 4], 512 * block + 256)
    np.testing.assert_array_equal(plan.begins, 16 * np.arange(8))
    assert plan.steps == 128


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "tpu7x"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_default_blocks_fit(chip, head_dim):
    vmem = next(tpu.vmem_bytes for tpu in TPUS if tpu.name == chip)
    for kv_len in (512, 8192, 9 * 512, 2**20):
        for num_kv_heads, group, itemsize in ((8, 4, 2), (16, 1, 2), (1, 16, 2), (8, 4, 4)):
            of_ring = kv_len == 9 * 512
            shape = BackwardShape(kv_len, num_kv_heads, group, head_dim, head_dim, itemsize, itemsize, of_ring)
            blocks = default_backward_blocks(shape, chip)
            assert vmem_bytes(shape, blocks) < blocks.vmem_limit < vmem
            assert kv_len % blocks.block_kv == 0
            assert num_kv_heads % blocks.kv_heads == 0
            assert group % blocks.group_splits == 0
            assert num_kv_heads * blocks.group_splits // blocks.kv_heads % cores_of(chip) == 0
            assert blocks.chunks(kv_len) * blocks.key_chunk - kv_len < blocks.chunks(kv_len) * blocks.block_kv
    assert CORES[chip].matrix_width > head_dim or not default_backward_blocks(shape, chip).transposed_keys


@pytest.mark.skipif(not has_libtpu(), reason=LIBTPU_IS_MISSING)
@pytest.mark.parametrize(("key_chunk", "float32_gradients"), [(512, False), (1024, True)])
def test_vmem_is_what_the_compiler_says(key_chunk, float32_gradients):
    """Sizes that fill no register; two chunks, dq through HBM, and one. The batch is large because XLA would keep
    arrays of a few MiB in VMEM as they are; the smallest it still does."""
    blocks = BackwardBlocks(key_chunk=key_chunk)
    shape = BackwardShape(1024, 2, 2, 96, 64, out_error_itemsize=2, float32_gradients=float32_gradients)
    queries, keys, bounds = (32, 2, 2, 1024), (32, 2, 1024), jax.ShapeDtypeStruct((32, 1024), jnp.int32)
    q, out = (jax.ShapeDtypeStruct((*queries, width), jnp.bfloat16) for width in (96, 64))
    k, v = (jax.ShapeDtypeStruct((*keys, width), jnp.bfloat16) for width in (96, 64))
    lse = jax.ShapeDtypeStruct(queries, jnp.float32)

    def backward(q, k, v, out, lse, dout, dlse, out_error, lower, upper):
        intervals = Intervals(lower, upper)
        plan = backward_plan(intervals, 1024, blocks)
        static = Static(0.1, None, blocks, float32_gradients)
        return attention_backward(q, k, v, out, lse, dout, dlse, intervals, plan, static, out_error=out_error)[:3]

    args = (q, k, v, out, lse, out, lse, out, bounds, bounds)
    with compiling(backward, *args, topology=tpu_topology("v6e"), schedules=True) as (_, program):
        assert program is not None
        (name,) = [i.name for block in program.module.computations.values() for i in block if i.is_pallas]
        found = program.compiled.kernel(name)
    assert found is not None
    _, files = found
    assert vmem_bytes(shape, blocks) == pytest.approx(units.vmem_bytes(files.allocations), rel=0.08)


def test_messages():
    with pytest.raises(ValueError, match="row_chunk=96"):
        BackwardBlocks(row_chunk=96)
    with pytest.raises(ValueError, match="key_chunk=700"):
        BackwardBlocks(key_chunk=700)
    with pytest.raises(ValueError, match="group_splits=2 with kv_heads=2"):
        BackwardBlocks(group_splits=2, kv_heads=2)
    with pytest.raises(UnsupportedError, match=r"head_dim=4096.*v4 has 12.8 MiB"):
        default_backward_blocks(BackwardShape(8192, 1, 4, 4096, 4096), "v4")
    _, blocks = CASES["grouped"]
    q = jnp.zeros((1, 2, 2, 40, 16))
    stat, bounds = jnp.zeros((1, 2, 2, 40)), Intervals(*jnp.zeros((2, 1, 40), jnp.int32))
    plan = BackwardPlan(bounds.lower[0], bounds.lower[0], 1)
    with pytest.raises(ValueError, match="q_len=40 is no multiple of block_q=16"):
        attention_backward(q, q[:, :, 0], q[:, :, 0], q, stat, q, stat, bounds, plan, Static(1.0, None, blocks))
