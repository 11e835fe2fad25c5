# SPDX-License-Identifier: Apache-2.0
"""Masks as intervals, judged by a dense mask written with Python loops."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grug_kernels.attention.block_sizes import BlockSizes, default_block_sizes
from grug_kernels.attention.mask import AttentionMask, visited_key_blocks

BATCH = 2
LENGTHS = [(1, 1), (12, 12), (4, 12), (1, 7)]  # q_len, kv_len
FULL = AttentionMask(causal=False)


def dense_mask(mask: AttentionMask, batch: int, q_len: int, kv_len: int) -> np.ndarray:
    """bool [batch, q_len, kv_len], by the definition of each field."""
    ids = np.zeros((batch, kv_len), int) if mask.segment_ids is None else np.asarray(mask.segment_ids)
    window = kv_len if mask.sliding_window is None else int(mask.sliding_window)
    prefix = np.asarray(0 if mask.prefix_len is None else mask.prefix_len)
    prefix = np.broadcast_to(prefix[:, None] if prefix.ndim == 1 else prefix, (batch, kv_len))
    seen = np.zeros((batch, q_len, kv_len), bool)
    for b in range(batch):
        for t in range(q_len):
            i = kv_len - q_len + t
            start = i
            while start > 0 and ids[b, start - 1] == ids[b, i]:
                start -= 1
            for j in range(kv_len):
                one_run = len(set(ids[b, min(i, j) : max(i, j) + 1])) == 1
                ahead = not mask.causal or j <= i or j < start + prefix[b, i]
                seen[b, t, j] = one_run and ids[b, i] >= 0 and ahead and abs(i - j) < window
    return seen


@st.composite
def masks(draw, batch: int, kv_len: int) -> AttentionMask:
    """Every field there or not, ids that come back, padding, prefixes longer than their document."""
    row = st.lists(st.sampled_from([-1, 0, 0, 0, 1]), min_size=kv_len, max_size=kv_len)
    rows = partial(st.lists, min_size=batch, max_size=batch)
    prefix = st.integers(0, kv_len + 2)
    per_position = st.lists(prefix, min_size=kv_len, max_size=kv_len)
    causal = draw(st.booleans())
    segment_ids = draw(st.none() | rows(row))
    prefix_len = draw(st.none() | prefix | rows(prefix) | rows(per_position)) if causal else None
    return AttentionMask(
        causal=causal,
        sliding_window=draw(st.none() | st.sampled_from([1, 2, 5, 2**31 - 1])),
        segment_ids=None if segment_ids is None else jnp.asarray(segment_ids, jnp.int32),
        prefix_len=None if prefix_len is None else jnp.asarray(prefix_len, jnp.int32),
    )


def as_dense(intervals, kv_len: int) -> np.ndarray:
    lower, upper = (np.asarray(bound)[..., None] for bound in intervals[:2])
    key = np.arange(kv_len)
    return (lower <= key) & (key < upper)


@settings(deadline=None, max_examples=50)
@given(lengths=st.sampled_from(LENGTHS), data=st.data())
def test_intervals_are_the_dense_mask(lengths, data):
    q_len, kv_len = lengths
    mask = data.draw(masks(BATCH, kv_len))
    lower, upper, _ = mask.intervals(BATCH, q_len, kv_len)
    assert lower.shape == upper.shape == (BATCH, q_len)
    assert lower.dtype == upper.dtype == jnp.int32
    np.testing.assert_array_equal(as_dense((lower, upper), kv_len), dense_mask(mask, BATCH, q_len, kv_len))
    empty = np.asarray(lower >= upper)
    assert not np.asarray(lower)[empty].any()
    assert not np.asarray(upper)[empty].any()


def test_an_id_that_comes_back_is_a_new_document():
    lower, upper, _ = AttentionMask(segment_ids=jnp.array([[7, 7, -1, 7, 3, 3]])).intervals(1, 6, 6)
    assert lower.tolist() == [[0, 0, 0, 3, 4, 4]]
    assert upper.tolist() == [[1, 2, 0, 4, 5, 6]]


def test_a_prefix_is_counted_from_its_document_and_ends_with_it():
    mask = AttentionMask(segment_ids=jnp.array([[0, 0, 0, 1, 1, 1]]), prefix_len=jnp.array([2]))
    assert mask.intervals(1, 6, 6).upper.tolist() == [[2, 2, 3, 5, 5, 6]]
    assert replace(mask, prefix_len=9).intervals(1, 6, 6).upper.tolist() == [[3, 3, 3, 6, 6, 6]]


def test_a_prefix_for_each_position_is_read_at_the_query():
    """The queries are the last two of four positions, and the first two positions' numbers are of no account."""
    mask = AttentionMask(prefix_len=jnp.array([[4, 4, 0, 4]]))
    assert mask.intervals(1, 2, 4).upper.tolist() == [[3, 4]]
    mask = AttentionMask(prefix_len=jnp.array([[0, 0, 4, 0]]))
    assert mask.intervals(1, 2, 4).upper.tolist() == [[4, 4]]


def test_chunks_are_documents_cut_further():
    """As the docstring says: a query sees what is in its document and in its chunk. Two documents of 6, chunks of 4."""
    ids = jnp.where(jnp.arange(14) < 12, jnp.arange(14) // 6, -1)[None]
    chunked = AttentionMask(segment_ids=2 * ids + jnp.arange(14) // 4 % 2)
    seen = as_dense(chunked.intervals(1, 14, 14), 14)[0]
    position = np.arange(14)
    same = (position[:, None] // 6 == position // 6) & (position[:, None] // 4 == position // 4)
    expected = same & (position <= position[:, None]) & (position[:, None] < 12) & (position < 12)
    np.testing.assert_array_equal(seen, expected)


def test_a_window_of_w_shows_w_keys():
    """Off-by-one windows are the field's classic: inclusive masks keep W + 1 keys."""
    lower, upper, _ = AttentionMask(sliding_window=3).intervals(1, 9, 9)
    assert (upper - lower).tolist() == [[1, 2, 3, 3, 3, 3, 3, 3, 3]]


def test_windows_are_data():
    """Layers that differ in their window share one compilation; 0 and below see nothing, large ones everything."""
    windows = jnp.array([2, 0, -5, 4, 2**31 - 1], jnp.int32)
    _, seen = jax.lax.scan(
        lambda carry, window: (carry, AttentionMask(sliding_window=window).intervals(1, 4, 4)), None, windows
    )
    assert (seen.upper - seen.lower)[:, 0].tolist() == [
        [1, 2, 2, 2],
        [0, 0, 0, 0],
        [0, 0, 0, 0],
        [1, 2, 3, 4],
        [1, 2, 3, 4],
    ]


def test_a_mask_is_a_pytree_with_causal_static():
    mask = AttentionMask(sliding_window=3, segment_ids=jnp.zeros((1, 4), jnp.int32))
    assert len(jax.tree.leaves(mask)) == 2
    assert jax.tree.map(lambda _: "placeholder", mask).segment_ids == "placeholder"
    assert jax.jit(lambda m: m.intervals(1, 4, 4).upper)(mask).tolist() == [[1, 2, 3, 4]]
    assert jax.tree.structure(mask) != jax.tree.structure(replace(mask, causal=False))


def test_a_million_tokens_make_no_square_array():
    length = 2**20
    mask = AttentionMask(sliding_window=9, segment_ids=jax.ShapeDtypeStruct((1, length), jnp.int32), prefix_len=3)
    compiled = jax.jit(lambda m: m.intervals(1, length, length)).lower(mask).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 64 * length


@settings(deadline=None, max_examples=25)
@given(lengths=st.sampled_from(LENGTHS), blocks=st.sampled_from([(1, 1), (3, 5), (4, 2), (16, 16)]), data=st.data())
def test_the_plan_covers_what_a_block_sees_and_no_more(lengths, blocks, data):
    (q_len, kv_len), (block_q, block_kv) = lengths, blocks
    mask = data.draw(masks(BATCH, kv_len))
    first, last = visited_key_blocks(mask.intervals(BATCH, q_len, kv_len), BlockSizes(*blocks))
    seen = dense_mask(mask, BATCH, q_len, kv_len)
    for row in range(BATCH):
        for block, start in enumerate(range(0, q_len, block_q)):
            keys = np.flatnonzero(seen[row, start : start + block_q].any(axis=0))
            needed = set(keys // block_kv)
            plan = set(range(int(first[row, block]), int(last[row, block])))
            assert needed <= plan
            # Between two documents' keys there may be padding: the plan is the range from the first to the last.
            assert plan == (set(range(min(needed), max(needed) + 1)) if needed else set())


def test_a_window_visits_two_blocks_where_causal_visits_all():
    blocks, length = BlockSizes(64, 64), 1024

    def visited(mask):
        first, last = visited_key_blocks(mask.intervals(1, length, length), blocks)
        return (last - first)[0].tolist()

    assert visited(AttentionMask()) == list(range(1, 17))
    assert visited(AttentionMask(sliding_window=64)) == [1] + [2] * 15
    assert visited(AttentionMask(segment_ids=jnp.repeat(jnp.arange(4), 256)[None])) == [1, 2, 3, 4] * 4
    assert visited(AttentionMask(segment_ids=jnp.full((1, length), -1))) == [0] * 16


@pytest.mark.parametrize(("length", "block"), [(1, 1), (200, 200), (256, 256), (257, 129), (1000, 250), (4096, 256)])
def test_default_blocks_are_equal_and_at_most_256(length, block):
    assert default_block_sizes(length, length) == BlockSizes(block, block)


@pytest.mark.parametrize(
    ("mask", "lengths", "message"),
    [
        (AttentionMask(), (5, 4), r"q_len=5 is above kv_len=4.*AttentionMask\(causal=False\)"),
        (replace(FULL, sliding_window=2), (5, 4), "q_len=5 is above kv_len=4"),
        (replace(FULL, segment_ids=np.zeros((2, 4), int)), (5, 4), "q_len=5 is above kv_len=4"),
        (AttentionMask(sliding_window=0), (4, 4), "sliding_window=0; .* the smallest is 1. For no window pass None"),
        (AttentionMask(sliding_window=-3), (4, 4), "sliding_window=-3"),
        (AttentionMask(sliding_window=np.ones(2, int)), (4, 4), r"sliding_window has shape \(2,\), expected \(\)"),
        (AttentionMask(sliding_window=2.0), (4, 4), "sliding_window is float32, expected an integer type"),
        (
            AttentionMask(segment_ids=np.zeros((2, 3), int)),
            (4, 4),
            r"segment_ids has shape \(2, 3\), expected \(2, 4\) for batch=2, kv_len=4",
        ),
        (AttentionMask(segment_ids=np.zeros((2, 4))), (4, 4), "segment_ids is float.*expected an integer type"),
        (
            AttentionMask(prefix_len=np.zeros(3, int)),
            (4, 4),
            r"prefix_len has shape \(3,\), expected \(\) or \(2,\) or \(2, 4\)",
        ),
        (AttentionMask(causal=False, prefix_len=2), (4, 4), "prefix_len widens a causal mask.*set causal=True"),
    ],
)
def test_messages(mask, lengths, message):
    with pytest.raises(ValueError, match=message):
        mask.intervals(2, *lengths)


def test_more_queries_than_keys_are_fine_where_positions_do_not_count():
    lower, upper, _ = FULL.intervals(2, 5, 3)
    assert lower.tolist() == [[0] * 5] * 2
    assert upper.tolist() == [[3] * 5] * 2


@pytest.mark.parametrize(("sizes", "message"), [((0, 4), "block_q=0"), ((4, -1), "block_kv=-1")])
def test_blocks_hold_something(sizes, message):
    with pytest.raises(ValueError, match=message):
        BlockSizes(*sizes)
