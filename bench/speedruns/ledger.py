# SPDX-License-Identifier: Apache-2.0
"""The rows of results.json, which are added to and never edited, and the rule by which one counts.

The rule is modded-nanogpt's: the mean loss over seeds is under the track's target with p < 0.01, by a one-sided t test;
and a row is a record where its time is the shortest on its device. Rows race where track, target, texts and device are
the same; of equal times the lower mean loss is first, then the older row.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from grug_model.score.stats import p_below
from train.git import git
from train.rundir import write_atomically

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results.json"
PAGE = ROOT / "docs" / "reports" / "speedruns.md"
P = 0.01


@dataclass(frozen=True)
class Row:
    """Some seeds of one configuration at one commit.

    config_hash: but for the seed. texts: eight digits of the tokenizer, which is made of them. tokens: that each seed
    was trained on. training_seconds: of the steps, by seed; wall_seconds: of all the process did for it. note: what a
    reader should know of the measurement.
    """

    entry: str
    track: str
    variant: str
    commit: str
    config_hash: str
    device: str
    texts: str
    seeds: tuple[int, ...]
    losses: tuple[float, ...]
    target: float
    steps: int
    tokens: int
    training_seconds: tuple[float, ...]
    wall_seconds: tuple[float, ...]
    date: str
    note: str = ""

    @property
    def race(self) -> tuple[str, float, str, str]:
        return self.track, self.target, self.device, self.texts

    @property
    def time(self) -> tuple[float, float]:
        """Seconds, and the loss that decides between equal ones."""
        return fmean(self.training_seconds), fmean(self.losses)

    @property
    def p(self) -> float:
        """1 where one seed says nothing of the spread."""
        return p_below(self.losses, self.target) if len(self.losses) > 1 else 1.0

    @property
    def why_not(self) -> str | None:
        """Why it does not count; None where it does."""
        if self.commit == "unknown" or self.commit.endswith("+"):
            return f"no commit has these files ({self.commit})"
        if len(self.losses) < 2:
            return "one seed says nothing of the spread"
        if self.p >= P:
            return f"mean loss {fmean(self.losses):.4f} is not under {self.target:g} with p < {P}: p = {self.p:.2g}"
        return None


def read() -> list[Row]:
    """Raises ValueError where a row is none, with its number."""
    rows, file = [], RESULTS
    for number, values in enumerate(json.loads(file.read_text()) if file.is_file() else [], start=1):
        try:
            lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
            row = Row(**(values | lists))
        except (TypeError, AttributeError) as error:
            raise ValueError(
                f"{file}: row {number} is none: {error}. Rows are added by --submit, and not by hand."
            ) from error
        if not len(row.seeds) == len(row.losses) == len(row.training_seconds) == len(row.wall_seconds) > 0:
            raise ValueError(f"{file}: row {number} has not one loss and one time for each of its seeds {row.seeds}.")
        rows.append(row)
    return rows


def add(row: Row) -> None:
    """Writes `row` below those there are.

    Raises:
      ValueError: the same seeds of the same configuration and commit on the same device are there already.
    """
    rows = read()
    for number, other in enumerate(rows, start=1):
        if _measured(other) == _measured(row):
            raise ValueError(
                f"{RESULTS.name}: row {number} has these seeds of {row.entry} at commit {row.commit} already. A row"
                " is not measured until it is fast: change something, commit it, and submit that."
            )
    text = json.dumps([asdict(one) for one in [*rows, row]], indent=1, ensure_ascii=False)
    write_atomically(RESULTS, f"{text}\n")


def _measured(row: Row) -> tuple[object, ...]:
    return row.entry, row.variant, row.commit, row.config_hash, row.device, set(row.seeds)


def races(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows that race with one another, in the order of the ledger."""
    for race in dict.fromkeys(row.race for row in rows):
        yield [row for row in rows if row.race == race]


def places(race: Sequence[Row]) -> list[Row]:
    """Those that count, the fastest first; of rows that are equal in time and loss, the older."""
    return sorted((row for row in race if row.why_not is None), key=lambda row: row.time)


def records(race: Sequence[Row]) -> list[Row]:
    """Those that were faster than all before them that count."""
    found: list[Row] = []
    for row in race:
        if row.why_not is None and (not found or row.time < found[-1].time):
            found.append(row)
    return found


def commit_of_clean_tree(root: Path = ROOT) -> str:
    """The commit whose files these are, but for the ledger and its page.

    Raises:
      ValueError: files differ from it, or there is none: then nobody could run it again.
    """
    ours = [f":!{file}" for file in ("bench/speedruns/results.json", "docs/reports/speedruns.md")]
    try:
        changed = git(root, "status", "--porcelain", "--", ".", *ours)
        head = git(root, "rev-parse", "--short", "HEAD").strip()
    except ValueError as error:
        raise ValueError(f"speedrun: {root} is no git repository, and a row names its commit. {error}") from error
    if changed:
        raise ValueError(
            f"speedrun: a row names the commit that it was made with, and these files differ from {head}:\n{changed}"
            "Commit them first, on a branch if they are an attempt."
        )
    return head
