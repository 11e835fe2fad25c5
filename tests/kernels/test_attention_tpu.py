# SPDX-License-Identifier: Apache-2.0
"""The TPU kernels, forward and backward together, interpreted on a CPU and held against float64."""

from dataclasses import replace
from functools import cache, partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from grug_kernels.attention import AttentionMask, BlockSizes, api, attention_with_lse, pallas_tpu
from grug_kernels.attention.tpu_plan import forward_plan, tiles_of
from grug_kernels.dispatch import UnsupportedError
from tests.kernels.test_attention import Case, assert_as_good_as_plain, random_mask

RACES = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
BLOCKS = (8, 8)
CASES = [
    Case(2, 21, 21, 4, 2, 80, 80, BLOCKS),  # three tiles, the last of 5
    Case(2, 7, 19, 3, 1, 192, 128, BLOCKS, sinks=True),  # MQA, the last of more keys, v_head_dim of its own
    Case(2, 9, 9, 6, 3, 96, 256, BLOCKS, causal=False, logit_soft_cap=2.0, sinks=True),
    Case(2, 96, 96, 4, 2, 32, 32, (32, 32), sinks=True, dtype="bfloat16"),
]


@cache
def compiled(case: Case, interpret=True):
    """As `test_attention.compiled`, of the TPU kernels."""

    def forward(q, k, v, sinks, mask):
        return attention_with_lse(
            q,
            k,
            v,
            mask,
            sinks=sinks,
            logit_soft_cap=case.logit_soft_cap,
            implementation="pallas_tpu",
            block_sizes=BlockSizes(*case.blocks),
        )

    # Tests compile for longer than they run.
    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(q, k, v, sinks, dout, dlse, mask):
        interpreted = {"pallas_tpu": partial(pallas_tpu.attention, interpret=interpret)}
        with mock.patch.dict(api.IMPLEMENTATIONS, interpreted):
            results, pull_back = jax.vjp(lambda *arrays: forward(*arrays, mask), q, k, v, sinks)
            return *results, *pull_back((dout, dlse))

    return run


@pytest.mark.parametrize("case", CASES)
@settings(deadline=None, max_examples=3)
@given(scale=st.sampled_from([1.0, 30.0]), seed=st.integers(0, 10**6))
def test_results_and_gradients(case, scale, seed):
    """Random cotangents for out and for lse; at scale 30 the softmax is peaked, and needs a maximum."""
    inputs, mask = case.inputs(seed, scale), random_mask(case, np.random.default_rng(seed))
    results = compiled(case)(*inputs, mask)
    assert [x.dtype for x in results[:5]] == [case.dtype, jnp.float32] + [case.dtype] * 3
    assert_as_good_as_plain(case, inputs, mask, results, from_lse=True)


def everything_seen(case: Case) -> AttentionMask:
    """Of a causal mask; every field is there, so that nothing is compiled anew."""
    ids, prefixes = jnp.zeros((case.batch, case.kv_len), jnp.int32), jnp.zeros(case.batch, jnp.int32)
    return AttentionMask(sliding_window=jnp.int32(2**31 - 1), segment_ids=ids, prefix_len=prefixes)


@pytest.mark.parametrize(
    "kind", ["huge scores", "equal keys", "window of 1", "documents of a tile", "documents across"]
)
def test_adversarial(kind):
    """Documents of a tile end where tiles of 8 keys do, those across them three keys before."""
    case = CASES[0]
    q, k, v, sinks, *cotangents = case.inputs(5, 1000.0 if kind == "huge scores" else 1.0)
    mask = everything_seen(case)
    if kind == "equal keys":
        k = jnp.broadcast_to(k[:, :1], k.shape) + 1e-3 * k
    if kind == "window of 1":
        mask = replace(mask, sliding_window=jnp.int32(1))
    if kind.startswith("documents"):
        ids = (jnp.arange(21) + (3 if kind == "documents across" else 0)) // 8
        mask = replace(mask, segment_ids=jnp.broadcast_to(ids, (2, 21)).astype(jnp.int32))
    inputs = q, k, v, sinks, *cotangents
    assert_as_good_as_plain(case, inputs, mask, compiled(case)(*inputs, mask), from_lse=True)


def test_one_token():
    case = Case(1, 1, 1, 2, 1, 64, 64, BLOCKS, sinks=True)
    inputs, mask = case.inputs(0, 1.0), everything_seen(case)
    assert_as_good_as_plain(case, inputs, mask, compiled(case)(*inputs, mask), from_lse=True)


@pytest.mark.parametrize("sinks", [False, True])
def test_rows_that_see_nothing(sinks):
    """Zeros and lse = -inf, or the sink; their cotangents, however large, reach q, k and v nowhere."""
    q, k, v, sink, dout, dlse = CASES[1].inputs(0, 1.0)
    sink = sink if sinks else None
    padding = 13  # of 19 positions, of which the last 7 are queries
    mask = AttentionMask(segment_ids=jnp.broadcast_to(jnp.where(jnp.arange(19) < padding, -1, 0), (2, 19)))
    out, lse, dq, dk, dv, dsinks = compiled(CASES[1])(q, k, v, sink, 1e30 * dout, 1e30 * dlse, mask)
    assert not out[:, :1].any()
    expected = -np.inf if sink is None else np.broadcast_to(sink[:, None], (2, 3, 1))
    np.testing.assert_allclose(lse[:, :, :1], expected, rtol=2**-22)  # to base 2 and back, a rounding each
    assert not dq[:, :1].any()
    for gradient in (dk, dv):
        assert not gradient[:, :padding].any()
        assert np.isfinite(gradient).all()
    assert dsinks is None or np.isfinite(dsinks).all()


@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_memory_is_used_as_a_tpu_would(scale):
    """With races looked for, memory that starts as NaN, and the grid in random order; both ways to take the softmax."""
    case = CASES[0]
    inputs, mask = case.inputs(3, scale), random_mask(case, np.random.default_rng(3))
    results = compiled(case, RACES)(*inputs, mask)
    assert_as_good_as_plain(case, inputs, mask, results, from_lse=True)


def test_named_where_there_is_no_tpu_it_says_so():
    q, k, v, *_ = CASES[0].inputs(0, 1.0)
    with pytest.raises(UnsupportedError, match="'pallas_tpu' is for TPUs, and there is none here"):
        attention_with_lse(q, k, v, AttentionMask(), implementation="pallas_tpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sm_scale": -1.0}, "a positive sm_scale, not -1.0"),
        ({"dtype": jnp.float16}, "bfloat16 and float32, not float16"),
    ],
)
def test_what_it_does_not_take(change, message):
    q, k, v, *_ = CASES[0].inputs(0, 1.0)
    q, k, v = (x.astype(change.get("dtype", x.dtype)) for x in (q, k, v))
    intervals = AttentionMask().intervals(q.shape[0], q.shape[1], k.shape[1])
    options = {"sm_scale": change.get("sm_scale", 1.0), "logit_soft_cap": None, "block_sizes": None}
    options |= {"with_max_logits": False}
    with pytest.raises(UnsupportedError, match=message):
        pallas_tpu.attention(q, k, v, intervals, None, interpret=True, **options)


def test_blocks_that_do_not_fit_are_refused_with_what_they_take():
    q = jnp.zeros((1, 8192, 4, 128), jnp.bfloat16)
    intervals = AttentionMask().intervals(1, 8192, 8192)
    options = {"sm_scale": 1.0, "logit_soft_cap": None, "with_max_logits": False, "interpret": True}
    with pytest.raises(UnsupportedError, match=r"block_q=4096.*MiB of VMEM \(scores 128.0, weights 64.0.*v6e has 89.6"):
        pallas_tpu.attention(q, q, q, intervals, None, block_sizes=BlockSizes(4096, 4096), **options)


@pytest.mark.parametrize("lengths", [(16, 16), (8, 24)])
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_the_plan_visits_what_is_seen_and_calls_whole_what_is(lengths, data):
    """Of every query block: no seen key outside first..last, and in whole tiles every key seen by all that see any."""
    q_len, kv_len = lengths
    block_q, block_kv = data.draw(st.sampled_from([(4, 4), (8, 4), (4, 8)]))
    case = Case(1, q_len, kv_len, 1, 1, 1, 1, (block_q, block_kv))
    mask = random_mask(case, np.random.default_rng(data.draw(st.integers(0, 10**6))))
    intervals = mask.intervals(1, q_len, kv_len)
    stripes = forward_plan(intervals, kv_len, block_q)
    plan = np.stack(tiles_of(stripes, np.arange(q_len // block_q), 2, block_kv)[:6], axis=-1)
    key = np.arange(kv_len)
    seen = (np.asarray(intervals.lower[0])[:, None] <= key) & (key < np.asarray(intervals.upper[0])[:, None])
    for block, (first, whole_first, whole_end, last, early_end, late_start) in enumerate(plan):
        assert first <= whole_first <= whole_end <= last
        rows = seen[block * block_q : (block + 1) * block_q]
        assert not rows[:, : first * block_kv].any()
        assert not rows[:, last * block_kv :].any()
        assert not rows[: block_q // 2, early_end:].any()
        assert not rows[block_q // 2 :, :late_start].any()
        assert rows[rows.any(axis=1)][:, whole_first * block_kv : whole_end * block_kv].all()
        visited = rows.any(axis=0).reshape(-1, block_kv).any(axis=1)
        assert last - first == (visited.nonzero()[0][-1] - visited.nonzero()[0][0] + 1 if visited.any() else 0)


def test_one_plan_serves_blocks_of_any_size():
    """The stripes that come with the intervals tell as much as those made for the blocks."""
    case = Case(2, 1024, 1536, 1, 1, 1, 1, (512, 512))
    intervals = random_mask(case, np.random.default_rng(7)).intervals(2, 1024, 1536)
    assert intervals.stripes is not None
    for block_q, block_kv in ((256, 512), (512, 256), (1024, 128)):
        ready, made = (forward_plan(given, 1536, block_q) for given in (intervals, intervals._replace(stripes=None)))
        np.testing.assert_array_equal(ready, intervals.stripes.reshape(-1))
        blocks = np.arange(2 * 1024 // block_q)
        of_ready = tiles_of(ready, blocks, block_q // 128, block_kv)
        for one, other in zip(of_ready, tiles_of(made, blocks, 2, block_kv), strict=True):
            np.testing.assert_array_equal(one, other)
