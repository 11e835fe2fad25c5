# SPDX-License-Identifier: Apache-2.0
"""The batch of a step, as a person reads it: which examples, what they say, and what is odd about their tokens."""

from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from train.batches import documents_in
from train.data import iter_from_step

BATCH_FILE = "batch.npz"
# Examples whose text is decoded.
SHOWN = 4


def batch_of(loader: Any, step: int) -> dict[str, np.ndarray]:
    """tokens, loss_weight, segment_ids of `step`, [rows, seq_len] each; rows: those of this process, by number."""
    with iter_from_step(loader, step - 1) as batches:
        batch = next(batches)
    rows, tokens = _local(batch.tokens)
    return {
        "rows": rows,
        "tokens": tokens,
        "loss_weight": _local(batch.loss_weight)[1],
        "segment_ids": _local(batch.attn_mask.segment_ids[0])[1],
    }


def described(arrays: dict[str, np.ndarray], number: int, batch_size: int, vocab_size: int, tokenizer_dir: Path) -> Any:
    """What the bundle says of batch `number`; `arrays` as from `batch_of`."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    tokens, weight, segments = (arrays[name] for name in ("tokens", "loss_weight", "segment_ids"))
    first = number * batch_size
    odd = min(range(len(tokens)), key=lambda row: len(np.unique(tokens[row])))
    shown = [*range(min(SHOWN, len(tokens)))]
    shown += [odd] * (odd not in shown)
    ids, counts = np.unique(tokens, return_counts=True)
    most = int(ids[counts.argmax()])
    return {
        "number": number,
        "first_example": first,
        "last_example": first + batch_size - 1,
        "rows_here": len(tokens),
        "seq_len": tokens.shape[1],
        "statistics": {
            "tokens": tokens.size,
            "distinct tokens": len(ids),
            "most frequent": f"{_piece(tokenizer, most)} (token {most}), {counts.max() / tokens.size:.1%} of all",
            "longest run of one token": _longest_run(tokenizer, tokens),
            "documents, or parts of them": sum(len(documents_in(row)) for row in segments),
            "with a weight in the loss": f"{np.count_nonzero(weight)}, of {weight.min():g} to {weight.max():g}",
            f"ids outside of the model's vocabulary of {vocab_size}": int(((ids < 0) | (ids >= vocab_size)).sum()),
            "fewest distinct tokens": f"{len(np.unique(tokens[odd]))}, in example {first + int(arrays['rows'][odd])}",
        },
        "examples": [
            {
                "index": first + int(arrays["rows"][row]),
                "documents": [
                    tokenizer.decode(tokens[row, part].tolist(), skip_special_tokens=False)
                    for part in documents_in(segments[row])
                ],
            }
            for row in shown
        ],
    }


def _local(array: Any) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a sharded [batch, seq_len] that are on this process's devices: their numbers, and they themselves."""
    parts = {shard.index[0].start or 0: np.asarray(shard.data) for shard in array.addressable_shards}
    numbers = [np.arange(start, start + len(parts[start])) for start in sorted(parts)]
    return np.concatenate(numbers), np.concatenate([parts[start] for start in sorted(parts)])


def _longest_run(tokenizer: Any, tokens: np.ndarray) -> str:
    runs = ((len(list(run)), token) for row in tokens.tolist() for token, run in groupby(row))
    length, token = max(runs)
    return f"{length} × {_piece(tokenizer, token)} (token {token})"


def _piece(tokenizer: Any, token: int) -> str:
    return repr(tokenizer.decode([token], skip_special_tokens=False))
