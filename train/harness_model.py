# SPDX-License-Identifier: Apache-2.0
"""The model as lm-eval sees it: texts in, log-likelihoods out. Imports lm-eval: import this module late."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from train.harness_packing import PackedBatch, Piece, packed_batches
from train.stall import beating

log = logging.getLogger(__name__)

# A batch -> for every position the nats of the next token, and whether it is the likeliest: each [batch, seq_len].
Score = Callable[[PackedBatch], tuple[np.ndarray, np.ndarray]]


class HarnessModel(LM):
    """Log-likelihoods of texts, many requests in a row of `seq_len` tokens; `score` runs the model.

    tokenizer: the one that the data was tokenized with. A beginning-of-document token, where it has one, begins every
    request; where a request has no context, that token or the end-of-document token is what its first token follows.
    say: is told how far it is.   remarks: (task, what is odd about requests of it) -> how many; those that are in it
    already have been said.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        seq_len: int,
        batch_size: int,
        score: Score,
        say: Callable[[str], None],
        remarks: dict[tuple[str, str], int],
    ):
        super().__init__()
        self._tokenizer, self._seq_len, self._batch_size = tokenizer, seq_len, batch_size
        self._score, self._say, self._remarks = score, say, remarks
        bos = tokenizer.bos_token_id
        self._begin = [] if bos is None else [bos]
        self._prefix = tokenizer.eos_token_id if bos is None else bos

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """log p(continuation | context) in nats, and whether each of its tokens is the likeliest where it stands."""
        pairs = [self._encoded(*request.args) for request in requests]
        too_long = f"are longer than {self._seq_len} tokens: the beginning of their context is left out"
        self._remark(requests, too_long, [len(before) + len(scored) > self._seq_len for before, scored in pairs])
        empty = "have a continuation that begins within a token of the context: it counts as certain"
        self._remark(requests, empty, [not scored for _, scored in pairs])
        return self._sums([self._pieces(before, scored) for before, scored in pairs], "loglikelihood")

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """log p(text) in nats: every token predicted once, in windows of at most seq_len tokens."""
        texts = [self._pieces([self._prefix], self._encode(request.args[0])) for request in requests]
        return [log_likelihood for log_likelihood, _ in self._sums(texts, "loglikelihood_rolling")]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        raise ValueError(no_generation({str(request.task_name) for request in requests}))

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _encoded(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encoded as one text and cut after the context, whose trailing space goes with the continuation."""
        words = context.rstrip()
        before, whole = self._encode(words), self._encode(context + continuation)
        if not context and whole[:1] == [self._prefix]:
            return whole[:1], whole[1:]
        return self._begin + before or [self._prefix], whole[len(before) :]

    def _pieces(self, context: list[int], continuation: list[int]) -> list[Piece]:
        """What to score for one request: with as much of the end of the context as a row has room for. A continuation
        that fills a row by itself is cut into windows, the first of which begins with the context's last token."""
        if not continuation:
            return []
        if len(continuation) < self._seq_len:
            return [Piece((context + continuation)[-self._seq_len :], len(continuation))]
        windows = get_rolling_token_windows(continuation, context[-1], self._seq_len - 1, context_len=1)
        return [Piece(before + scored, len(scored)) for before, scored in map(make_disjoint_window, windows)]

    def _sums(self, texts: Sequence[list[Piece]], kind: str) -> list[tuple[float, bool]]:
        """Of each text: minus the sum of the nats of its scored tokens, and whether all of them are the likeliest."""
        text_of = [index for index, pieces in enumerate(texts) for _ in pieces]
        log_likelihoods, is_greedy, done = np.zeros(len(texts)), np.ones(len(texts), bool), 0
        for batch in beating(packed_batches(list(chain.from_iterable(texts)), self._seq_len, self._batch_size)):
            nats, likeliest = self._score(batch)
            for piece, row, first, last in batch.spans:
                log_likelihoods[text_of[piece]] -= nats[row, first:last].sum(dtype=np.float64)
                is_greedy[text_of[piece]] &= likeliest[row, first:last].all()
            done += len(batch.spans)
            self._say(f"{kind}, {done} of {len(text_of)} sequences")
        if not np.isfinite(log_likelihoods).all():
            raise ValueError(
                f"lm_eval: {np.count_nonzero(~np.isfinite(log_likelihoods))} of {len(texts)} log-likelihoods are not"
                " finite numbers, so the weights are not either. Take an earlier checkpoint."
            )
        return list(zip(log_likelihoods.tolist(), is_greedy.tolist(), strict=True))

    def _remark(self, requests: Sequence[Instance], what: str, applies: Sequence[bool]) -> None:
        """Says, once for each task, of how many of its requests `what` is true."""
        total = Counter(str(request.task_name) for request in requests)
        odd = Counter(str(request.task_name) for request, yes in zip(requests, applies, strict=True) if yes)
        for task, count in odd.items():
            if (task, what) not in self._remarks:
                log.warning("lm_eval: %d of %d requests of %s %s", count, total[task], task, what)
            self._remarks[task, what] = count


def no_generation(tasks: set[str]) -> str:
    return (
        f"lm_eval: {', '.join(sorted(tasks))}: generated text (generate_until) cannot be evaluated. Choose tasks that"
        " compare likelihoods: multiple_choice, loglikelihood or loglikelihood_rolling."
    )
