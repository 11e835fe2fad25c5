# SPDX-License-Identifier: Apache-2.0
"""All that a score found out, and the sentence that answers the question."""

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from . import stats
from .contract import Contract
from .cost import Cost
from .runs import SeedRun

MIB = 2**20


@dataclass(frozen=True)
class Row:
    """One variant. config_hash: of its launch configuration, seed 0. parameters: of what was trained."""

    variant: str
    config_hash: str
    parameters: int
    runs: tuple[SeedRun, ...]
    contract: Contract
    cost: Cost

    @property
    def failures(self) -> list[str]:
        return [f"seed {run.seed}: {run.failure}" for run in self.runs if run.failure]

    def values(self, name: str) -> list[float]:
        """Of each run that has it, such as "loss"."""
        return [value for run in self.runs if (value := getattr(run, name)) is not None]

    def mean(self, name: str) -> stats.Mean | None:
        """None where a seed failed: the mean of those that did not would flatter."""
        return None if self.failures or len(self.values(name)) < 2 else stats.mean(self.values(name))


@dataclass(frozen=True)
class Card:
    """The first of `rows` is the baseline. commit: with "+" where files differ from it. flags: given to train.run."""

    rows: tuple[Row, ...]
    preset: str
    steps: int
    seeds: tuple[int, ...]
    flags: tuple[str, ...]
    date: str
    commit: str

    @property
    def base(self) -> Row:
        return self.rows[0]

    @property
    def title(self) -> str:
        return f"{', '.join(row.variant for row in self.rows[1:])} against {self.base.variant}"

    @property
    def devices(self) -> list[str]:
        return sorted({run.device for row in self.rows for run in row.runs if run.device})

    @cached_property
    def differences(self) -> dict[str, stats.Difference]:
        """Of the losses, of every variant that has them all, as the baseline has."""
        if self.base.failures:
            return {}
        return {
            row.variant: stats.difference(self.base.values("loss"), row.values("loss"), comparisons=len(self.rows) - 1)
            for row in self.rows[1:]
            if not row.failures
        }

    @property
    def verdicts(self) -> dict[str, str]:
        return {row.variant: self._verdict(row) for row in self.rows[1:]}

    @property
    def is_sound(self) -> bool:
        """No run and no contract test failed."""
        return not any(row.failures or row.contract.failed for row in self.rows)

    def _verdict(self, row: Row) -> str:
        parts = [self._wins(row), self._costs(row)]
        parts += [
            f"{one.variant} fails {len(one.contract.failed)} of its contract tests"
            for one in (self.base, row)
            if one.contract.failed
        ]
        return "; ".join(part for part in parts if part) + "."

    def _wins(self, row: Row) -> str:
        base = self.base.variant
        for one in (self.base, row):
            if one.failures:
                return f"no verdict on {row.variant}: {one.variant} failed, {'; '.join(one.failures)}"
        found = self.differences[row.variant]
        proof = f"{found.seeds} seeds, {p_text(found.p)}"
        if found.is_shown:
            better = "better" if found.mean < 0 else "worse"
            size = plus_minus(abs(found.mean), found.half_width)
            return f"{row.variant} is {better} than {base} by {size} nats per token ({proof})"
        if found.mean == 0 and found.half_width == 0:
            return f"{row.variant} and {base} have the very same losses ({found.seeds} seeds)"
        size = plus_minus(found.mean, found.half_width, sign=True)
        return f"no difference shown: {row.variant} is {size} nats per token from {base} ({proof}); {_more(found)}"

    def _costs(self, row: Row) -> str:
        """What it costs beside the baseline, predicted."""
        ours, theirs = row.cost, self.base.cost
        for one in (self.base, row):
            if why := one.cost.refused:
                return f"on {one.cost.tpu} the step of {one.variant} is refused: {why}"
        if not (ours.step_seconds and theirs.step_seconds and ours.hbm_bytes and theirs.hbm_bytes):
            return "what it costs on a TPU was not measured"
        time, memory = ours.step_seconds / theirs.step_seconds - 1, (ours.hbm_bytes - theirs.hbm_bytes) / MIB
        return f"on {ours.tpu} a step takes {_percent(time)} time and {_mib(memory)} HBM (compiled, not run)"

    def to_json(self) -> dict[str, Any]:
        rows = {
            row.variant: dataclasses.asdict(row)
            | {"loss": _plain(row.mean("loss")), "bits_per_byte": _plain(row.mean("bits_per_byte"))}
            for row in self.rows
        }
        facts = {name: value for name, value in vars(self).items() if name not in ("rows", "differences")}
        found = {variant: dataclasses.asdict(one) for variant, one in self.differences.items()}
        return {**facts, "devices": self.devices, "baseline": self.base.variant} | {
            "rows": rows,
            "differences": found,
            "verdicts": self.verdicts,
        }


def plus_minus(value: float, half_width: float, *, sign: bool = False) -> str:
    """Both to the second digit of the half width: "0.031 ± 0.012"."""
    digits = 4 if half_width == 0 else min(9, max(0, 1 - math.floor(math.log10(half_width))))
    return f"{value:{'+' if sign else ''}.{digits}f} ± {half_width:.{digits}f}"


def p_text(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def _more(found: stats.Difference) -> str:
    if found.more_seeds is None:
        return f"if the next seeds are like these, {stats.MOST_SEEDS} would not show one"
    return f"if the next seeds are like these, {found.more_seeds} more would show one"


def _percent(part: float) -> str:
    if abs(part) < 5e-4:
        return "as much"
    return f"{abs(100 * part):.1f} % {'more' if part > 0 else 'less'}"


def _mib(size: float) -> str:
    if abs(size) < 0.05:
        return "as much"
    return f"{abs(size):,.1f} MiB {'more' if size > 0 else 'less'}"


def _plain(value: stats.Mean | None) -> dict[str, float] | None:
    return dataclasses.asdict(value) if value else None
