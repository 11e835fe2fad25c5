# SPDX-License-Identifier: Apache-2.0
"""What a compiled step says of scaling, and results.json, where it is kept."""

import datetime
import importlib.metadata
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench.plan.plan import Plan, make_plan
from bench.scaling.cases import VARIANT, Case
from bench.tpu.topology import tpu_topology
from train.rundir import write_atomically

RESULTS = Path(__file__).parent / "results.json"


@dataclass(frozen=True)
class Row:
    """Of one device but for `tokens_per_second`, which is of the slice. Every time is predicted, none is measured.

    rows: of the batch. hbm_bytes: set aside; None where the step was refused before that was known. milliseconds: of
    a step, by what it goes to; empty where none is predicted, and `why` says why. collective_ms: all that collectives
    take, beside kernels or not. sent_bytes: what goes in or comes out of the collectives of a step, by kind. mfu: in
    percent, see `grug_kernels.mfu.utilisation`. made: when, and with what.
    """

    case: Case
    rows: int
    batch_tokens: int
    made: str
    hbm_bytes: int | None
    limit_bytes: int
    compile_seconds: float
    milliseconds: dict[str, float] = field(default_factory=dict)
    collective_ms: float | None = None
    sent_bytes: dict[str, float] = field(default_factory=dict)
    mfu: dict[str, float] = field(default_factory=dict)
    why: str | None = None

    @property
    def fits(self) -> bool:
        return self.hbm_bytes is not None and self.hbm_bytes <= self.limit_bytes

    @property
    def step_ms(self) -> float | None:
        return sum(self.milliseconds.values()) if self.milliseconds else None

    @property
    def tokens_per_second(self) -> float | None:
        return None if self.step_ms is None else 1e3 * self.batch_tokens / self.step_ms


def compiled(case: Case) -> Row:
    """Minutes, and gigabytes of this machine's memory."""
    plan = make_plan(VARIANT, case.config(), tpu_topology(case.topology))
    why = _why(plan)
    schedule = plan.prediction.schedule if plan.prediction and not why else None
    kinds = plan.record.collectives.kinds if plan.record.collectives else {}
    trainer = plan.config.trainer
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))
    return Row(
        case=case,
        rows=plan.rows,
        batch_tokens=trainer.batch_size * trainer.seq_len,
        made=f"{datetime.date.today()} with {versions}",
        hbm_bytes=plan.memory.total_bytes if plan.memory else None,
        limit_bytes=plan.limit_bytes,
        compile_seconds=sum(plan.record.seconds.values()),
        milliseconds=plan.milliseconds if schedule else {},
        collective_ms=schedule.collective_ms if schedule else None,
        sent_bytes={name: kind.payload_bytes for name, kind in kinds.items()},
        mfu=plan.mfu if schedule else {},
        why=why,
    )


def _why(plan: Plan) -> str | None:
    if plan.record.refusal:
        return plan.record.refusal.sentence
    if plan.prediction is None:
        return "no time: its schedule cannot be read"
    doubts = plan.prediction.schedule.doubts
    return f"no time: {'; '.join(doubts)}" if doubts else None


def read(path: Path = RESULTS) -> dict[Case, Row]:
    """Rows by case, in the order of the file; empty where there is none."""
    if not path.is_file():
        return {}
    found = [Row(**row | {"case": Case(**row["case"])}) for row in json.loads(path.read_text())]
    return {row.case: row for row in found}


def write(rows: dict[Case, Row], path: Path = RESULTS) -> None:
    """In the order of the cases' fields."""
    ordered = [asdict(rows[case]) | {"case": case._asdict()} for case in sorted(rows)]
    write_atomically(path, json.dumps(ordered, indent=1) + "\n")
