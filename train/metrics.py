# SPDX-License-Identifier: Apache-2.0
"""Where metrics go (`start_tracker`) and how a loop that never waits for its devices measures itself (`Meter`).

Every run writes `<run_dir>/metrics.jsonl`, one row per logged step, flushed as it is written; W&B and TensorBoard get
the same rows when asked. `train/summary.py` reads the file back. Names of metrics are Levanter's.
"""

import contextlib
import importlib.util
import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

from grug_kernels.mfu import TokenFlops, utilisation
from train import lev
from train.rundir import flat

if TYPE_CHECKING:
    from grug_kernels.chips import Peak

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
# A finite loss may have a gradient that is not, and a finite gradient an update that is not: the state is poisoned
# either way. All of them are checked before anything is saved.
MUST_BE_FINITE = ("train/loss", "train/grad_norm", "train/update_norm", "grad/norm/total")


@dataclass(frozen=True)
class TrackerConfig:
    """Where metrics go besides `<run_dir>/metrics.jsonl`, which is always written."""

    wandb: Literal["auto", "on", "off"] = "auto"
    """auto: when WANDB_API_KEY is set. WANDB_MODE, WANDB_PROJECT and WANDB_ENTITY are honoured."""
    tensorboard: bool = False
    """Write `<run_dir>/tensorboard` (needs `uv sync --extra prof`)."""


class NonFiniteLossError(FloatingPointError):
    """A loss or gradient norm was NaN or infinite at `step` (counted from 1, completed)."""

    def __init__(self, step: int, value: float, *, batch_size: int, metric: str = "train/loss"):
        self.step, self.value, self.metric = step, value, metric
        self.first_example, self.last_example = (step - 1) * batch_size, step * batch_size - 1
        super().__init__(
            f"{metric} is {value} at step {step}, expected a finite number. The batch of that step holds examples"
            f" {self.first_example} to {self.last_example} of the training data, counted from 0. The rows before it are"
            " logged. Look at those examples, or go on from a checkpoint before that step with a lower learning rate."
        )


@dataclass
class RunTracker:
    """Levanter's composite tracker, and the file under it. A context manager; `finish` may be called twice."""

    members: Any
    handler: logging.FileHandler | None

    def log(self, metrics: Mapping[str, Any], *, step: int) -> None:
        self.members.log(metrics, step=step)

    def log_summary(self, metrics: Mapping[str, Any]) -> None:
        """Facts about the whole run, the last value of a name counts."""
        self.members.log_summary(dict(metrics))

    def finish(self) -> None:
        if self.members is None:
            return
        self.members.finish()
        if self.handler is not None:
            self.handler.close()
        self.members = None

    def __enter__(self) -> "RunTracker":
        return self

    def __exit__(self, *exc_info) -> None:
        self.finish()


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
    import jax

    use_wandb = _wants_wandb(where.wandb)
    if where.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise ValueError(
            "TensorBoard was asked for, but tensorboardX is not installed. Run `uv sync --extra prof`, or leave"
            " --tracker.tensorboard out: metrics.jsonl and report.html need nothing more."
        )
    run_dir = Path(run_dir)
    handler, members = None, []
    if jax.process_index() == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        handler = _open_rows(run_dir / METRICS_FILE)
        members.append(_json_tracker(handler))
        if where.tensorboard:
            members.append(lev.TensorboardConfig(logdir=str(run_dir / "tensorboard")).init(None))
    if use_wandb:
        members += _wandb_trackers(run_dir, run_id, required=where.wandb == "on")
    tracker = lev.CompositeTracker(members)
    tracker.log_hyperparameters({name: _plain(value) for name, value in flat(config).items()})
    return RunTracker(tracker, handler)


def _open_rows(path: Path) -> logging.FileHandler:
    """Appends to `path`, after cutting off a row that a killed process left unfinished: ours would grow onto it."""
    if path.exists():
        content = path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            log.warning("%s: cutting off an unfinished last row of %d bytes", path, len(content) - end)
            os.truncate(path, end)
    handler = logging.FileHandler(path, encoding="utf-8")  # flushes after every row
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


class Meter:
    """Collects the metrics of every step without waiting for the devices, and logs them every `log_every` steps.

    Steps are dispatched ahead of the devices, so one step alone cannot be timed. A window can: it ends when the loss of
    its last step has materialised. `throughput/duration` is its wall clock over its steps. Time in `loading()` and
    `hooks()` is left out while no step is in flight, since the devices then wait; with steps in flight they work
    meanwhile, and subtracting it would report more speed than there is. So log_every=1 times each step by itself.

    throughput/loading_time and throughput/hook_time are seconds per step spent there, whether hidden or not.
    throughput/mfu = 100 * flops_per_example * examples_per_second / (peak * device_count); throughput/mfu_causal counts
    the keys that a causal mask leaves: see `grug_kernels.mfu`.

    Args:
      batch_size: sequences per step, over all devices.   flops: of one token, `flops_per_token(seq_len)` of the model.
      peak: of one device; None where nobody knows it: then there is no throughput/mfu, and a warning says so.
      start_step: completed steps that this process found done.
    """

    def __init__(
        self,
        tracker: RunTracker,
        *,
        total_steps: int,
        batch_size: int,
        seq_len: int,
        flops: TokenFlops,
        peak: "Peak | None",
        log_every: int = 10,
        start_step: int = 0,
    ):
        import jax

        if log_every < 1:
            raise ValueError(f"Meter: log_every={log_every}, expected at least 1 step between log rows.")
        self.last: dict[str, float] = {}  # the newest logged row, for the progress bar
        self.doing = "stepping"  # or loading, waiting, hooks; where an error came out of one of these, that one
        self._times = 0  # that it has begun something else
        self._tracker, self._total_steps, self._log_every = tracker, total_steps, log_every
        self._batch_size, self._seq_len, self._flops = batch_size, seq_len, flops
        self._peak_flops = peak.flops_per_second * jax.device_count() if peak else None
        self._pending: list[tuple[int, Mapping[str, Any]]] = []
        self._newest_step = start_step
        self._loading_seconds = self._hook_seconds = self._hooks_mark = 0.0
        self._window_start = perf_counter()
        tracker.log_summary({"run/start_step": start_step, "run/total_steps": total_steps})
        tracker.log_summary(_constants(flops, seq_len, peak))

    @property
    def newest_step(self) -> int:
        """The newest step that was dispatched."""
        return self._newest_step

    def newest_good_step(self) -> int:
        """The newest step before the first that failed on the devices; waits for those in flight."""
        import jax

        for step, metrics in self._pending:
            try:
                jax.block_until_ready(metrics)
            except Exception:  # whatever the step failed with
                return step - 1
        return self._newest_step

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Around waiting for the next batch."""
        start = perf_counter()
        try:
            with self._doing("loading"):
                yield
        finally:
            self._loading_seconds += perf_counter() - start
            self._start_window_if_idle()

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """Around everything that is done after a step: evaluation, checkpoints, logging."""
        self._hooks_mark = perf_counter()
        try:
            with self._doing("hooks"):
                yield
        finally:
            # A flush inside moves the mark: waiting for the devices is no hook's time, and no second counts twice.
            self._hook_seconds += perf_counter() - self._hooks_mark
            self._hooks_mark = perf_counter()
            self._start_window_if_idle()

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes the device scalars of the completed `step`, counted from 1. Waits for them at every `log_every`th step.

        Raises:
          NonFiniteLossError: see `flush`.
          ValueError: a step that was there before, or one without train/loss.
        """
        if step <= self._newest_step:
            raise ValueError(
                f"Meter.step: step {step} after step {self._newest_step}. Steps are counted from 1, when complete, and"
                " each is logged once: pass step + 1 from a loop over range(start_step, total_steps)."
            )
        if "train/loss" not in metrics:
            raise ValueError(f"Meter.step: no 'train/loss' among {sorted(metrics)}. The train step has to return it.")
        self._newest_step = step
        self._pending.append((step, metrics))
        if step % self._log_every == 0 or step == self._total_steps:
            self.flush()

    def flush(self) -> None:
        """Waits for the steps in flight, checks and logs them. For before a checkpoint, an evaluation and the end.

        Raises:
          NonFiniteLossError: a loss or gradient norm is not finite; the rows before it are written first.
        """
        if not self._pending:
            return
        import jax

        steps = [step for step, _ in self._pending]
        with self._doing("waiting"):
            # On all devices: to read a number, one that has it would do, while the others are still at work.
            values = jax.device_get(jax.block_until_ready([metrics for _, metrics in self._pending]))
        seconds = perf_counter() - self._window_start
        self._pending.clear()
        with self.hooks():
            rows = [self._row(step, metrics) for step, metrics in zip(steps, values, strict=True)]
            rows[-1] |= self._throughput(steps[-1], len(steps), seconds)
            self._loading_seconds = self._hook_seconds = 0.0
            for step, row in zip(steps, rows, strict=True):
                self._check(step, row)
                self._tracker.log(row, step=step)
            self.last = rows[-1]

    def steps_in_flight(self) -> range:
        """Steps that were dispatched and are not known to be complete. Without waiting, and from any thread."""
        pending = [step for step, metrics in list(self._pending) if not metrics["train/loss"].is_ready()]
        return range(min(pending, default=self._newest_step + 1), self._newest_step + 1)

    def progress(self) -> tuple[int, int]:
        """Changes as long as the loop goes round or steps complete. From any thread."""
        return self._times, self.steps_in_flight().start

    @contextlib.contextmanager
    def _doing(self, name: str) -> Iterator[None]:
        """The time inside carries `name` where a trace is being made, and where a failure is looked into."""
        import jax

        before, self.doing = self.doing, name
        self._times += 1
        with jax.profiler.TraceAnnotation(name):
            yield
        self.doing = before  # not after an error: it tells where the error came from

    def _start_window_if_idle(self) -> None:
        if not self._pending:
            self._window_start = perf_counter()

    def _row(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        import numpy as np

        row = {"global_step": step, "run_progress": step / self._total_steps}
        return row | {name: np.asarray(value, dtype=np.float64).tolist() for name, value in metrics.items()}

    def _throughput(self, step: int, steps: int, seconds: float) -> dict[str, float]:
        """The metrics of a window of `steps` steps that ended with `step` and took `seconds`."""
        examples_per_second = self._batch_size * steps / seconds
        tokens_per_second = examples_per_second * self._seq_len
        total_tokens = step * self._batch_size * self._seq_len
        window = {
            "duration": seconds / steps,
            "examples_per_second": examples_per_second,
            "tokens_per_second": tokens_per_second,
            "total_tokens": total_tokens,
            "gflops_per_second": tokens_per_second * self._flops.training / 1e9,
            "total_gflops": total_tokens * self._flops.training / 1e9,
            "loading_time": self._loading_seconds / steps,
            "hook_time": self._hook_seconds / steps,
        }
        if self._peak_flops:
            percent = utilisation(self._flops, tokens_per_second, self._peak_flops)
            window |= {"mfu": percent["mfu"], "mfu_causal": percent["mfu_causal"]}
        return {f"throughput/{name}": value for name, value in window.items()}

    def _check(self, step: int, row: Mapping[str, Any]) -> None:
        for metric in MUST_BE_FINITE:
            if not math.isfinite(row.get(metric, 0.0)):
                error = NonFiniteLossError(step, row[metric], batch_size=self._batch_size, metric=metric)
                self._tracker.log_summary({"run/failed_step": step, "run/failure": str(error)})
                raise error


def _constants(flops: TokenFlops, seq_len: int, peak: "Peak | None") -> dict[str, Any]:
    """What `throughput/mfu` is made of, logged once."""
    import jax

    kind, count = jax.devices()[0].device_kind, jax.device_count()
    constants = {
        "flops_per_token_analytic": flops.training,
        "flops_per_example_analytic": flops.training * seq_len,
        "flops_per_example": flops.training * seq_len,
        "flops_per_token_causal": flops.training_causal,
        "flops_per_token_executed": flops.executed,
        **{f"flops_per_token/{component}": value for component, value in asdict(flops).items()},
        "device_kind": kind,
        "device_count": count,
    }
    if peak is None:
        log.warning(
            "no peak FLOP/s known for %s: throughput/mfu will not be reported. Pass --peak-tflops to have it.", kind
        )
    else:
        constants |= {
            "theoretical_flops_per_device": peak.flops_per_second,
            "theoretical_flops": peak.flops_per_second * count,
            "peak_source": peak.source,
        }
    return {f"throughput/{name}": value for name, value in constants.items()}
