# SPDX-License-Identifier: Apache-2.0
"""Every piece of text is in one row of one batch, whole, and its losses are found again."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.harness_packing import PADDING, Piece, packed_batches

SEQ_LEN = 12
# Lengths that fill a row, that leave one place, and that need one more.
LENGTHS = st.lists(st.tuples(st.integers(2, SEQ_LEN), st.integers(0, SEQ_LEN - 1)), max_size=40)


def pieces_of(lengths) -> list[Piece]:
    """Every token of all of them is another number, counted from 1."""
    number = itertools.count(1)
    return [Piece([next(number) for _ in range(length)], min(scored, length - 1)) for length, scored in lengths]


@settings(deadline=None, max_examples=100)
@given(lengths=LENGTHS, batch_size=st.integers(1, 5))
def test_a_piece_is_one_segment_and_its_span_holds_the_losses_of_its_last_tokens(lengths, batch_size):
    pieces, found = pieces_of(lengths), {}
    for batch in packed_batches(pieces, SEQ_LEN, batch_size):
        assert batch.tokens.shape == batch.loss_weight.shape == batch.segment_ids.shape == (batch_size, SEQ_LEN)
        weight = np.zeros_like(batch.loss_weight)
        for piece, row, first, last in batch.spans:
            assert piece not in found
            segment = batch.segment_ids[row, last]  # of the piece's last token
            place = (batch.segment_ids[row] == segment).nonzero()[0]
            assert segment >= 0
            assert np.all(np.diff(place) == 1)
            # The loss at a position is that of the token after it.
            found[piece] = Piece(batch.tokens[row, place].tolist(), last - first)
            assert last == place[-1]
            assert first >= place[0]
            weight[row, first:last] = 1
        np.testing.assert_array_equal(batch.loss_weight, weight)
        assert not batch.loss_weight[batch.segment_ids == PADDING].any()
        np.testing.assert_array_equal(batch.tokens != 0, batch.segment_ids != PADDING)
    assert found == dict(enumerate(pieces))


@settings(deadline=None, max_examples=50)
@given(lengths=LENGTHS)
def test_no_two_rows_of_which_one_would_do(lengths):
    batches = list(packed_batches(pieces_of(lengths), SEQ_LEN, 4))
    filled = sorted(int((row >= 0).sum()) for batch in batches for row in batch.segment_ids if (row >= 0).any())
    assert all(a + b > SEQ_LEN for a, b in itertools.pairwise(filled))


@pytest.mark.parametrize("piece", [Piece([1] * 13, 3), Piece([1, 2], 2), Piece([], 0)])
def test_a_piece_that_does_not_fit_or_has_nothing_to_begin_with_is_refused(piece):
    with pytest.raises(ValueError, match=f"a piece of {len(piece.tokens)} tokens, the last {piece.scored}"):
        list(packed_batches([Piece([1, 2], 1), piece], SEQ_LEN, 2))
