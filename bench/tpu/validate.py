# SPDX-License-Identifier: Apache-2.0
"""Predicts every published timing, and says how far off the predictions are and whether their order is right.

    python -m bench.tpu.validate                                    # all: about ten minutes
    python -m bench.tpu.validate --only v6e --json v6e.json --picture v6e.svg

A ratio is predicted over published. "Typically measured = predicted ÷ f" is printed per chip and never applied.
"""

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import jax

from bench.tpu import dump, published, scatter, schedule
from bench.tpu.published import Timing

CLOSE = 2.0  # pairs of timings within this factor are counted on their own: to order others is easy


@dataclass(frozen=True)
class Result:
    """A published timing and its prediction, in milliseconds. notes: what made the reader doubt."""

    chip: str
    what: str
    shape: str
    passes: str
    blocks: str
    published_ms: float
    predicted_ms: float
    source: str
    notes: tuple[str, ...]

    @property
    def ratio(self) -> float:
        return self.predicted_ms / self.published_ms


@dataclass(frozen=True)
class Order:
    """Of pairs of timings on one chip and of one pass: how many are predicted in the order that was measured."""

    right: int
    pairs: int

    def __str__(self) -> str:
        return f"{self.right} of {self.pairs} ({self.right / self.pairs:.0%})" if self.pairs else "no pairs"


def predict(timing: Timing) -> Result:
    """Compiles and counts one case. Raises as `schedule.analyze` does."""
    function, args = timing.case()
    predicted = schedule.analyze(function, args, timing.chip)
    return Result(
        chip=timing.chip,
        what=timing.what,
        shape=timing.shape,
        passes=timing.passes,
        blocks=timing.blocks,
        published_ms=timing.milliseconds,
        predicted_ms=predicted.predicted_ms,
        source=timing.source,
        notes=predicted.notes,
    )


def order(results: Sequence[Result], within: float = math.inf) -> Order:
    """Over pairs whose published timings differ, by a factor of `within` at most."""
    right = pairs = 0
    for a, b in combinations(results, 2):
        slower, faster = max(a.published_ms, b.published_ms), min(a.published_ms, b.published_ms)
        if (a.chip, a.passes) != (b.chip, b.passes) or slower == faster or slower > within * faster:
            continue
        pairs += 1
        right += (a.predicted_ms - b.predicted_ms) * (a.published_ms - b.published_ms) > 0
    return Order(right, pairs)


def factor(results: Sequence[Result]) -> tuple[float, float]:
    """(geometric mean of the ratios, their spread: the factor of one standard deviation)."""
    logs = [math.log(result.ratio) for result in results]
    mean = sum(logs) / len(logs)
    return math.exp(mean), math.exp(math.sqrt(sum((log - mean) ** 2 for log in logs) / len(logs)))


def summary(results: Sequence[Result]) -> str:
    """Factor and spread per chip, and the order, in words."""
    lines = []
    for chip in dict.fromkeys(result.chip for result in results):
        ours = [result for result in results if result.chip == chip]
        mean, spread = factor(ours)
        ratios = [result.ratio for result in ours]
        lines.append(
            f"{chip}: typically measured = predicted ÷ {mean:.2f}, spread ×÷ {spread:.2f}"
            f" ({min(ratios):.2f} to {max(ratios):.2f}; {len(ours)} timings)"
        )
    lines.append(f"order of two timings on one chip, one pass: right in {order(results)}")
    lines.append(f"  where they differ by less than {CLOSE:g}×: right in {order(results, CLOSE)}")
    return "\n".join(lines)


def _row(result: Result) -> str:
    return (
        f"{result.chip:6} {result.what:44} {result.shape:18} {result.passes:17} {result.predicted_ms:9.3f}"
        f" {result.published_ms:9.3f} {result.ratio:6.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tpu.validate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", metavar="SUBSTR", help="timings whose chip, name, shape or pass has it")
    parser.add_argument("--json", type=Path, help="write all results there")
    parser.add_argument("--picture", type=Path, help="write an SVG: predicted against published")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    logging.getLogger("bench.tpu.schedule").setLevel(logging.ERROR)  # notes are kept in the results
    timings = [timing for timing in published.TIMINGS if options.only in str(timing)]
    if not timings:
        parser.error(f"--only {options.only}: no published timing is called so, e.g. {published.TIMINGS[0]}.")
    print(f"{'chip':6} {'what':44} {'shape':18} {'pass':17} {'predicted':>9} {'published':>9}  ratio   (ms)")
    results, start = [], time.monotonic()
    for number, timing in enumerate(timings, 1):
        try:
            results.append(predict(timing))
        except (dump.Refused, RuntimeError) as error:
            print(f"{timing}: not predicted: {error}", file=sys.stderr)
            continue
        minutes = (time.monotonic() - start) / 60
        print(f"{_row(results[-1])}   [{number}/{len(timings)}, {minutes:.1f} min]", flush=True)
    if not results:
        parser.error("nothing was predicted; the reasons are above.")
    print(f"\n{summary(results)}")
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    if options.picture:
        options.picture.write_text(
            scatter.svg(
                "Predicted against published, ms",
                [
                    scatter.Point(r.published_ms, r.predicted_ms, r.chip, f"{r.what}, {r.shape}, {r.passes}")
                    for r in results
                ],
            )
        )
    if len(results) < len(timings):
        raise SystemExit(f"{len(timings) - len(results)} of {len(timings)} timings were not predicted.")


if __name__ == "__main__":
    main()
