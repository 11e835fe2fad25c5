# SPDX-License-Identifier: Apache-2.0
"""Compiles candidates, two at a time, each batch after the smaller ones of its policy and mesh: one that does not fit
spares the larger ones."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from time import perf_counter
from typing import Any, TextIO

from bench.plan.candidates import Candidate, Kept, Outcome, tried
from bench.tpu import schedule
from bench.tpu.topology import stay_on_cpu
from train.progress import StatusLine
from train.summary import clock

WORKERS = 2  # a compile of a large step takes gigabytes


def sweep(
    variant: str,
    config: Any,
    topology: str,
    groups: Sequence[Sequence[Candidate]],
    kept: Kept,
    limit_bytes: float,
    stream: TextIO | None = None,
) -> list[Outcome]:
    """What came of every candidate, in their order. groups: see `candidates.groups`. stream: of the progress."""
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn"), initializer=quietly) as pool:
        going = _Sweep(pool, (variant, config, topology), groups, kept, limit_bytes, StatusLine(stream))
        try:
            return going.run()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def quietly() -> None:
    """Of a process that compiles: what it warns of is in what it returns."""
    stay_on_cpu()
    logging.getLogger(schedule.__name__).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


@dataclass
class _Sweep:
    pool: Executor
    what: tuple[str, Any, str]
    groups: Sequence[Sequence[Candidate]]
    kept: Kept
    limit_bytes: float
    line: StatusLine
    outcomes: dict[Candidate, Outcome] = field(default_factory=dict)
    compiled: int = 0
    start: float = field(default_factory=perf_counter)

    def run(self) -> list[Outcome]:
        waiting = [iter(group) for group in self.groups]
        running: dict[Future[Outcome], Iterator[Candidate]] = {}
        while waiting or running:
            while waiting and len(running) < WORKERS:
                self._submit(waiting.pop(0), running)
            done, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in done:
                rest = running.pop(future)
                self.compiled += 1
                self.kept.put(future.result())
                if self._note(future.result(), rest):
                    waiting.insert(0, rest)
            self.line.show(self._progress(len(running)))
        self.line.keep(self._progress(0))
        return [self.outcomes[candidate] for group in self.groups for candidate in group]

    def _submit(self, rest: Iterator[Candidate], running: dict[Future[Outcome], Iterator[Candidate]]) -> None:
        """Starts the next of a group that is not on disk."""
        for candidate in rest:
            if (found := self.kept.get(candidate)) is None:
                running[self.pool.submit(tried, *self.what, candidate)] = rest
                return
            self._note(found, rest)

    def _note(self, outcome: Outcome, rest: Iterator[Candidate]) -> bool:
        """Whether a larger batch is worth trying; where it is not, what is left of the group is skipped."""
        self.outcomes[outcome.candidate] = outcome
        if outcome.total_bytes is None or outcome.total_bytes <= self.limit_bytes:
            return True  # also where it was refused for another reason: that may be the batch's own
        for larger in rest:
            self.outcomes[larger] = Outcome(
                larger, skipped=True, why=f"not compiled: batch {outcome.candidate.batch} did not fit"
            )
        return False

    def _progress(self, running: int) -> str:
        total, spent = sum(map(len, self.groups)), perf_counter() - self.start
        left = total - len(self.outcomes)
        text = f"{len(self.outcomes)} of {total} candidates, {clock(spent)}"
        with suppress(ZeroDivisionError):
            text += f", at most {clock(spent / self.compiled * left)} left" if left else ""
        return text + (f", {running} compiling" if running else "")
