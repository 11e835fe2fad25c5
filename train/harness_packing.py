# SPDX-License-Identifier: Apache-2.0
"""Many texts in one row, each scored by itself: rows of one shape, one compilation, little padding."""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import batched
from typing import NamedTuple

import numpy as np

PADDING = -1  # segment id of what belongs to no piece


class Piece(NamedTuple):
    """Tokens that see each other and no others. The last `scored` of them are predicted, each from all before it."""

    tokens: list[int]
    scored: int


class Span(NamedTuple):
    """Where the losses of a piece are: columns first <= c < last of a row. The loss of a token is at the one before."""

    piece: int
    row: int
    first: int
    last: int


@dataclass(frozen=True)
class PackedBatch:
    """int32, float32, int32 [batch_size, seq_len], as in a `GrugLmExample`; and which losses are whose."""

    tokens: np.ndarray
    loss_weight: np.ndarray  # 1 at every position whose next token is scored
    segment_ids: np.ndarray
    spans: list[Span]


def packed_batches(pieces: Sequence[Piece], seq_len: int, batch_size: int) -> Iterator[PackedBatch]:
    """Batches of rows that hold every piece once. A row without a piece, at the end, is padding.

    Raises:
      ValueError: a piece does not fit into a row, or has no token before the first that is scored.
    """
    for piece in pieces:
        if not piece.scored < len(piece.tokens) <= seq_len:
            raise ValueError(
                f"packing: a piece of {len(piece.tokens)} tokens, the last {piece.scored} of them scored, in rows of"
                f" seq_len={seq_len}; cut it so that it fits and begins with a token that is not scored."
            )
    for rows in batched(_fitted([len(piece.tokens) for piece in pieces], seq_len), batch_size):
        yield _batch(pieces, rows, seq_len, batch_size)


def _fitted(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """The pieces of each row: the longest first, each where it leaves the least room (best fit, decreasing)."""
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (room, row), ascending
    for piece in sorted(range(len(lengths)), key=lambda piece: -lengths[piece]):
        at = bisect_left(open_rows, (lengths[piece], 0))
        if at == len(open_rows):
            rows.append([])
            room, row = seq_len, len(rows) - 1
        else:
            room, row = open_rows.pop(at)
        rows[row].append(piece)
        insort(open_rows, (room - lengths[piece], row))
    return rows


def _batch(pieces: Sequence[Piece], rows: Sequence[list[int]], seq_len: int, batch_size: int) -> PackedBatch:
    shape = (batch_size, seq_len)
    batch = PackedBatch(np.zeros(shape, np.int32), np.zeros(shape, np.float32), np.full(shape, PADDING, np.int32), [])
    for row, members in enumerate(rows):
        start = 0
        for segment, index in enumerate(members):
            tokens, scored = pieces[index]
            end = start + len(tokens)
            span = Span(index, row, end - 1 - scored, end - 1)
            batch.tokens[row, start:end] = tokens
            batch.segment_ids[row, start:end] = segment
            batch.loss_weight[row, span.first : span.last] = 1
            batch.spans.append(span)
            start = end
    return batch
