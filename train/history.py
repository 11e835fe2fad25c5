# SPDX-License-Identifier: Apache-2.0
"""Reads a run's metrics back from its metrics.jsonl: as it goes on, when it has ended, or was killed."""

import json
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.tracker import METRICS_FILE

log = logging.getLogger(__name__)


@dataclass
class History:
    """A metrics file, read back: `rows[step]` holds what was logged for a step, `summary` the facts about the run."""

    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    warm_up: set[int] = field(default_factory=set)  # rows that time a process's first window, compilation included
    profiled: set[int] = field(default_factory=set)  # steps that were traced, which slows them down

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of a metric in order of steps, where it is a finite number."""
        points = [(step, row[name]) for step, row in sorted(self.rows.items()) if name in row]
        return [(step, value) for step, value in points if isinstance(value, int | float) and math.isfinite(value)]

    def typical(self, name: str) -> list[tuple[int, float]]:
        """`series` of a throughput metric, without the windows that warm up and those that were profiled."""
        return [(step, value) for step, value in self.series(name) if step not in self.warm_up | self.profiled]

    def names(self) -> list[str]:
        return sorted({name for row in self.rows.values() for name in row})


def read_history(run_dir: Path | str) -> History:
    """Reads `<run_dir>/metrics.jsonl`. Of a step that was logged again after a resume, the later row wins.

    Rows past the step that a process resumed from belong to a future that was given up, and are dropped. Lines that
    are no JSON (a killed process leaves half a row) are skipped, with a warning that counts them.

    Raises:
      FileNotFoundError: there is no metrics file.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"no {METRICS_FILE} in {str(run_dir)!r}. Expected the directory of a run, which holds one from its first"
            " step on: pass the directory that the run printed when it started."
        )
    history, torn, warming_up = History(), 0, True
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
            kind, metrics = event["event"], event.get("metrics", {})
        except (ValueError, KeyError, TypeError):
            torn += 1
            continue
        if kind == "hparams":
            history.config = event["hparams"]
        elif kind == "summary":
            history.summary |= metrics
            if "run/start_step" in metrics:  # a process starts or resumes
                history.rows = {step: row for step, row in history.rows.items() if step <= metrics["run/start_step"]}
                history.profiled = {step for step in history.profiled if step <= metrics["run/start_step"]}
                warming_up = True
                for stale in ("run/failed_step", "run/failure"):
                    history.summary.pop(stale, None)
            if "profile/first_step" in metrics:
                history.profiled |= {*range(metrics["profile/first_step"], metrics["profile/last_step"] + 1)}
        elif kind == "log" and event["step"] is not None:
            step = event["step"]
            history.rows.setdefault(step, {}).update(metrics)
            if "throughput/duration" in metrics:
                (history.warm_up.add if warming_up else history.warm_up.discard)(step)
                warming_up = False
    if torn:
        log.warning("%s: skipped %d unreadable lines", path, torn)
    return history
