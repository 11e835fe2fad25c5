# SPDX-License-Identifier: Apache-2.0
"""The ledger as a page in Markdown."""

from collections.abc import Sequence
from statistics import fmean, stdev

from bench.speedruns import ledger
from bench.speedruns.ledger import P, Row, places, races, records
from train.command import markdown
from train.rundir import write_atomically
from train.summary import clock, si

HEAD = f"""# Speedruns

How fast a loss is reached. Useful for exploration, not canonical: what wins here is ported to `grug_model/base`.
Written by `python -m bench.speedruns` from `bench/speedruns/results.json`; a row is added by an entry's `--submit`
([how](../recipes/speedrun.md)).

A row **counts** where its mean loss over seeds is under the target with p < {P}, by a one-sided t test, and where a
commit has its files. It is a **record** where it was the fastest by then. Only rows with the same target, texts and
device race. The time is that of the training steps, its mean over seeds: compiling, evaluating and saving are left
out. Of equal times the lower mean loss is first, then the older row. The rule is modded-nanogpt's.
"""
COUNTS = ("", "entry", "time", "loss", "p", "seeds", "steps", "tokens", "wall time a seed", "commit", "date", "note")
DOES_NOT = ("entry", "time", "loss", "seeds", "commit", "date", "why it does not count")


def page(rows: Sequence[Row]) -> str:
    parts = [HEAD]
    for race in races(rows):
        first = race[0]
        parts.append(f"\n## {first.track}: loss {first.target:g}, on {first.device}, texts {first.texts}\n")
        counting, left = places(race), [row for row in race if row.why_not is not None]
        won = records(race)
        if counting:
            parts += markdown([COUNTS, *(_counting(i, row, row in won) for i, row in enumerate(counting, start=1))])
        else:
            parts.append("No row counts yet.")
        if left:
            parts += ["", *markdown([DOES_NOT, *map(_left_out, left)])]
    return "\n".join([*parts, *([] if rows else ["\nNo row yet."])]) + "\n"


def write() -> None:
    write_atomically(ledger.PAGE, page(ledger.read()))


def _counting(place: int, row: Row, is_record: bool) -> Sequence[str]:
    return (
        f"{place}, record" if is_record else str(place),
        *(_name(row), _time(row), _loss(row), f"{row.p:.1g}", str(len(row.seeds)), str(row.steps), si(row.tokens)),
        *(clock(fmean(row.wall_seconds)), row.commit, row.date[:10], row.note),
    )


def _left_out(row: Row) -> Sequence[str]:
    why = f"{row.why_not}. {row.note}".rstrip()
    return (_name(row), _time(row), _loss(row), str(len(row.seeds)), row.commit, row.date[:10], why)


def _name(row: Row) -> str:
    return f"{row.entry} ({row.variant})"


def _time(row: Row) -> str:
    return _spread(row.training_seconds, 1) + " s"


def _loss(row: Row) -> str:
    return _spread(row.losses, 4)


def _spread(values: Sequence[float], digits: int) -> str:
    """The mean, and the standard deviation where there is one."""
    spread = f" (sd {stdev(values):.{digits}f})" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{spread}"
