# SPDX-License-Identifier: Apache-2.0
"""What a few seeds say: means with their intervals, paired differences, p-values. Student's t throughout."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

LEVEL = 0.95
MOST_SEEDS = 100  # beyond which nobody would go


@dataclass(frozen=True)
class Mean:
    """The interval value ± half_width holds the true mean with a confidence of 95 %."""

    value: float
    half_width: float


@dataclass(frozen=True)
class Difference:
    """Of a variant's losses from the baseline's of the same seeds: below zero it is better.

    p: probability of a mean at least this far from zero, were there no difference.
    more_seeds: that would show this mean beside this spread; 0 where it is shown, None where too many would be needed.
    """

    mean: float
    half_width: float
    p: float
    seeds: int
    more_seeds: int | None

    @property
    def is_shown(self) -> bool:
        return self.more_seeds == 0


def mean(values: Sequence[float]) -> Mean:
    """Raises ValueError of fewer than two values, which have no spread."""
    _check(values)
    return Mean(fmean(values), _half_width(stdev(values), len(values), LEVEL))


def difference(base: Sequence[float], other: Sequence[float], *, comparisons: int = 1) -> Difference:
    """The paired t test of `other` against `base`, whose values belong together in order.

    comparisons: with the same baseline. As many chances to be lucky are paid for after Bonferroni: p is multiplied by
    their number, and the interval is as much wider.
    """
    apart = [b - a for a, b in zip(base, other, strict=True)]
    _check(apart)
    middle, spread, seeds = fmean(apart), stdev(apart), len(apart)
    level = 1 - (1 - LEVEL) / comparisons

    def shows(count: int) -> bool:
        return middle != 0 and abs(middle) > _half_width(spread, count, level)

    needed = next((count for count in range(seeds, MOST_SEEDS + 1) if shows(count)), None)
    return Difference(
        mean=middle,
        half_width=_half_width(spread, seeds, level),
        p=min(1.0, comparisons * 2 * _tail(abs(middle), spread, seeds)),
        seeds=seeds,
        more_seeds=None if needed is None else needed - seeds,
    )


def p_below(values: Sequence[float], target: float) -> float:
    """The one-sided t test: probability of a mean this far below `target`, were the true mean the target."""
    _check(values)
    return _tail(target - fmean(values), stdev(values), len(values))


def _check(values: Sequence[float]) -> None:
    if len(values) < 2:
        raise ValueError(f"stats: {len(values)} value has no spread, and so no interval. Give two or more seeds.")


def _half_width(spread: float, count: int, level: float) -> float:
    from scipy.stats import t

    return float(t.ppf(0.5 + level / 2, count - 1)) * spread / math.sqrt(count)


def _tail(middle: float, spread: float, count: int) -> float:
    """P(T > t) of the mean `middle`."""
    from scipy.stats import t

    if spread == 0:  # t is infinite, or undefined
        return 0.5 if middle == 0 else float(middle < 0)
    return float(t.sf(middle / (spread / math.sqrt(count)), count - 1))
