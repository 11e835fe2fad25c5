# SPDX-License-Identifier: Apache-2.0
"""Where metrics go: `<run_dir>/metrics.jsonl`, one row per logged step, flushed as it is written; W&B and TensorBoard
get the same rows when asked. `train/summary.py` reads the file back.
"""

import contextlib
import importlib.util
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from train import lev, together
from train.rundir import flat
from train.watch import Histogram

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
JSON_TRACKER = "json_logger"  # its name among Levanter's
FINISH_SECONDS = 30.0  # that TensorBoard has to write what is left


@dataclass(frozen=True)
class TrackerConfig:
    """Where metrics go besides `<run_dir>/metrics.jsonl`, which is always written."""

    wandb: Literal["auto", "on", "off"] = "auto"
    """auto: when WANDB_API_KEY is set. WANDB_MODE, WANDB_PROJECT and WANDB_ENTITY are honoured."""
    tensorboard: bool = False
    """Write `<run_dir>/tensorboard` (needs `uv sync --extra prof`)."""


class RunTracker:
    """The run's trackers under one name. A context manager; `finish` may be called twice.

    One that fails stops neither the run nor the others: its first failure is said, at the end how many there were.
    """

    def __init__(self, members: Sequence[Any], rows: logging.Handler | None = None):
        self._members = list(members)  # Levanter's trackers
        self._rows = rows  # the file under the first of them
        self._failures: Counter[str] = Counter()

    def log(self, metrics: Mapping[str, Any], *, step: int) -> None:
        for member in self._members:
            self._try(member, "log", _as_taken(metrics, by=member), step=step)

    def log_summary(self, metrics: Mapping[str, Any]) -> None:
        """Facts about the whole run, the last value of a name counts."""
        for member in self._members:
            self._try(member, "log_summary", dict(metrics))

    def log_hyperparameters(self, config: Mapping[str, Any]) -> None:
        for member in self._members:
            self._try(member, "log_hyperparameters", dict(config))

    def finish(self) -> None:
        for member in self._members:
            self._try(member, "finish")
        self._members = []
        if self._rows is not None:
            with contextlib.suppress(OSError):  # of a row that could not be written: which has been said
                self._rows.close()
        for name, count in self._failures.items():
            log.warning("the tracker %s failed %d times: what it shows is not the whole run", name, count)
        self._failures.clear()

    def _try(self, member: Any, method: str, *args: Any, **kwargs: Any) -> None:
        try:
            getattr(member, method)(*args, **kwargs)
        except Exception as error:
            self._failures[member.name] += 1
            if self._failures[member.name] == 1:
                at = f" of step {kwargs['step']}" if "step" in kwargs else ""
                log.warning(
                    "the tracker %s failed in %s%s, training goes on: %s: %s",
                    member.name,
                    method,
                    at,
                    type(error).__name__,
                    error,
                )

    def __enter__(self) -> "RunTracker":
        return self

    def __exit__(self, *exc_info) -> None:
        self.finish()


def _as_taken(metrics: Mapping[str, Any], *, by: Any) -> dict[str, Any]:
    """`metrics` with histograms as this tracker takes them: metrics.jsonl short ones, the others Levanter's."""
    convert = Histogram.short if by.name == JSON_TRACKER else _levanter_histogram
    return {name: convert(value) if isinstance(value, Histogram) else value for name, value in metrics.items()}


def _levanter_histogram(histogram: Histogram) -> Any:
    import numpy as np

    counts, low, high, mean, rms, nonzero = map(np.asarray, histogram)
    size = counts.sum()
    return lev.SummaryStats(
        min=low,
        max=high,
        num=size,
        nonzero_count=nonzero,
        sum=mean * size,
        sum_squares=rms**2 * size,
        mean=mean,
        variance=rms**2 - mean**2,
        rms=rms,
        histogram=lev.Histogram(np.linspace(low, high, len(counts) + 1), counts),
    )


def start_tracker(
    run_dir: Path | str,
    run_id: str,
    config: dict[str, Any],
    where: TrackerConfig = TrackerConfig(),
) -> RunTracker:
    """Opens the trackers of a run and logs `config` to each. A run that goes on appends to its metrics file.

    Call `finish()` in a `finally`, or use the result in a `with`. Only process 0 writes.

    Raises:
      ValueError: W&B without an account to write to, or TensorBoard without tensorboardX.
    """
    use_wandb = together.from_first("whether W&B is used", _wants_wandb(where.wandb))
    if where.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise ValueError(
            "TensorBoard was asked for, but tensorboardX is not installed. Run `uv sync --extra prof`, or leave"
            " --tracker.tensorboard out: metrics.jsonl and report.html need nothing more."
        )
    run_dir, members, rows = Path(run_dir), [], None
    if together.is_first():
        run_dir.mkdir(parents=True, exist_ok=True)
        rows = _open_rows(run_dir / METRICS_FILE)
        members.append(_json_tracker(rows))
        if where.tensorboard:
            writer = lev.TensorboardConfig(logdir=str(run_dir / "tensorboard")).init(None)
            # In the background: where it cannot write any more, tensorboardX waits for ever.
            members.append(lev.BackgroundTracker(writer, finish_timeout=FINISH_SECONDS))
    if use_wandb:
        members += _wandb_trackers(run_dir, run_id, required=where.wandb == "on")
    tracker = RunTracker(members, rows)
    tracker.log_hyperparameters({name: _plain(value) for name, value in flat(config).items()})
    return tracker


class _Rows(logging.FileHandler):
    """A file, flushed after every row. What fails is raised: logging itself would print it and go on."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise


def _open_rows(path: Path) -> logging.FileHandler:
    """Appends to `path`, after cutting off a row that a killed process left unfinished: ours would grow onto it."""
    if path.exists():
        content = path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            log.warning("%s: cutting off an unfinished last row of %d bytes", path, len(content) - end)
            os.truncate(path, end)
    handler = _Rows(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(message)s"))
    return handler


def _json_tracker(handler: logging.FileHandler):
    """Levanter's JSON tracker over a logger of its own, which passes nothing on to the console."""
    rows = logging.getLogger(f"grug.metrics:{handler.baseFilename}")
    rows.propagate = False
    rows.handlers = [handler]
    return lev.JsonLoggerConfig(logger_name=rows.name).init(None)


def _wants_wandb(wandb: str) -> bool:
    mode, has_key = os.environ.get("WANDB_MODE", "online"), bool(os.environ.get("WANDB_API_KEY"))
    if wandb == "on" and mode == "online" and not has_key:
        raise ValueError(
            "W&B was asked for, but WANDB_API_KEY is not set. Set it, or WANDB_MODE=offline to write local files,"
            " or pass --tracker.wandb off."
        )
    return wandb == "on" or (wandb == "auto" and has_key and mode != "disabled")


def _wandb_trackers(run_dir: Path, run_id: str, *, required: bool) -> list:
    """The W&B tracker, or none with a warning: a run that did not ask for W&B by name trains without it."""
    os.environ.setdefault("WANDB_DIR", str(run_dir))
    config = lev.WandbConfig(
        project=os.environ.get("WANDB_PROJECT", "grug"),
        name=run_id,
        mode=os.environ.get("WANDB_MODE", "online"),
        save_code=False,
    )
    try:
        return [config.init(run_id)]
    except Exception as error:
        if required:
            raise
        log.warning("W&B did not start, training goes on without it (--tracker.wandb on makes this fail): %s", error)
        return []


def _plain(value: Any) -> bool | int | float | str:
    """TensorBoard takes no lists, nor None."""
    return value if isinstance(value, bool | int | float | str) else str(value)
