# SPDX-License-Identifier: Apache-2.0
"""Which candidates of a sweep are worth having: more tokens per second, or less memory, than any other."""

from collections.abc import Sequence

from bench.plan.candidates import Outcome
from grug_kernels.chips import GIB
from train.command import aligned


def best(outcomes: Sequence[Outcome], limit_bytes: float) -> Outcome | None:
    """Of what fits the one with most tokens per second, of these the one with the least memory."""
    fitting = [outcome for outcome in outcomes if outcome.fits(limit_bytes)]
    return max(fitting, key=_rank, default=None)


def frontier(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Those predicted which no other beats in both, the least memory first."""
    known = [outcome for outcome in outcomes if outcome.tokens_per_second_per_chip is not None]
    found: list[Outcome] = []
    for outcome in sorted(known, key=lambda one: (one.total_bytes or 0, -_rank(one)[0])):
        if not found or _rank(outcome)[0] > _rank(found[-1])[0]:
            found.append(outcome)
    return found


def _rank(outcome: Outcome) -> tuple[float, float]:
    return outcome.tokens_per_second_per_chip or 0.0, -(outcome.total_bytes or 0)


HEADER = ("remat", "model", "batch", "HBM GiB", "step ms", "tokens/s per chip", "MFU %", "")


def rows(outcomes: Sequence[Outcome], limit_bytes: float) -> list[tuple[str, ...]]:
    """The table's cells, as `HEADER` has them."""
    chosen, kept = best(outcomes, limit_bytes), frontier(outcomes)
    return [_row(outcome, limit_bytes, outcome is chosen, outcome in kept) for outcome in outcomes]


def _row(outcome: Outcome, limit_bytes: float, is_best: bool, on_frontier: bool) -> tuple[str, ...]:
    remat, model, batch = outcome.candidate
    numbers = (
        _number(outcome.total_bytes, 1 / GIB, ".2f" if (outcome.total_bytes or 0) >= GIB else ".4f"),
        _number(outcome.step_seconds, 1e3, ",.1f"),
        _number(outcome.tokens_per_second_per_chip, 1, ",.0f"),
        _number(outcome.mfu, 1, ".1f"),
    )
    too_large = outcome.total_bytes is not None and outcome.total_bytes > limit_bytes
    if outcome.why and not too_large:
        word = outcome.why
    elif not outcome.fits(limit_bytes):
        word = "does not fit"
    else:
        word = "best that fits" if is_best else "on the frontier" if on_frontier else ""
    return remat, str(model), str(batch), *numbers, word


def _number(value: float | None, factor: float, form: str) -> str:
    return "–" if value is None else f"{value * factor:{form}}"


def table(outcomes: Sequence[Outcome], limit_bytes: float) -> str:
    """For a terminal: words to the left, numbers to the right."""
    return "\n".join(aligned([HEADER, *rows(outcomes, limit_bytes)], numbers=range(1, len(HEADER) - 1)))
