# SPDX-License-Identifier: Apache-2.0
"""How a loop that never waits for its devices measures itself. Names of metrics are Levanter's."""

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from grug_kernels.mfu import TokenFlops, utilisation
from train import together
from train.batches import Skipped, batch_number
from train.rundir import say
from train.spikes import RISE, Spikes
from train.stalls import Activity, Stalls
from train.store_metrics import StoreMetrics, store_metrics_every
from train.tracker import RunTracker
from train.watch import Histogram

if TYPE_CHECKING:
    from grug_kernels.chips import Peak

log = logging.getLogger(__name__)

# A finite loss may have a gradient that is not, and a finite gradient an update that is not: the state is poisoned
# either way. All of them are checked before anything is saved.
MUST_BE_FINITE = ("train/loss", "train/grad_norm", "train/update_norm", "grad/norm/total")

# Of these the median and the deciles are logged at the end.
SPREAD = ("duration", "tokens_per_second", "mfu")


class NonFiniteLossError(FloatingPointError):
    """A loss or gradient norm was NaN or infinite at `step` (counted from 1, completed), of batch number `batch`."""

    def __init__(self, step: int, value: float, *, batch: int, batch_size: int, metric: str = "train/loss"):
        self.step, self.value, self.metric, self.batch = step, value, metric, batch
        self.first_example, self.last_example = batch * batch_size, (batch + 1) * batch_size - 1
        super().__init__(
            f"{metric} is {value} at step {step}, expected a finite number. Its batch, number {batch}, holds examples"
            f" {self.first_example} to {self.last_example} of the training data, counted from 0. The rows before it are"
            " logged. Look at those examples; then leave the batch out (data.skip_batches), or go on from a checkpoint"
            " before that step with a lower learning rate."
        )


class Meter:
    """Collects the metrics of every step without waiting for the devices, and logs them every `log_every` steps.

    Steps are dispatched ahead of the devices, so one step alone cannot be timed. A window can: it ends when the loss of
    its last step has materialised. `throughput/duration` is its wall clock over its steps. Time in `loading()` and
    `hooks()` is left out while no step is in flight, since the devices then wait; with steps in flight they work
    meanwhile, and subtracting it would report more speed than there is. So log_every=1 times each step by itself.

    throughput/loading_time and throughput/hook_time are seconds per step spent there, whether hidden or not;
    throughput/waiting_for_data and waiting_for_host are percent of the time in which the devices stood idle for it:
    see `stalls.py`. A loss or gradient norm that jumps is logged as train/loss_spike, train/grad_norm_spike: see
    `spikes.py`. Both are said through `tell`.
    throughput/mfu = 100 * flops_per_example * examples_per_second / (peak * device_count); throughput/mfu_causal counts
    the keys that a causal mask leaves: see `grug_kernels.mfu`.

    Args:
      batch_size: sequences per step, over all devices.   flops: of one token, `flops_per_token(seq_len)` of the model.
      peak: of one device; None where nobody knows it: then there is no throughput/mfu, and a warning says so.
      start_step: completed steps that this process found done.   skipped: batches that no step is trained on.
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
        skipped: Skipped = (),
    ):
        import jax

        if log_every < 1:
            raise ValueError(f"Meter: log_every={log_every}, expected at least 1 step between log rows.")
        self.last: dict[str, float] = {}  # the newest logged row, for the progress bar
        self.doing = "stepping"  # or loading, waiting, hooks; where an error came out of one of these, that one
        self._times = 0  # that it has begun something else
        self._tracker, self._total_steps, self._log_every = tracker, total_steps, log_every
        self._batch_size, self._seq_len, self._flops = batch_size, seq_len, flops
        self._skipped = skipped
        self._peak_flops = peak.flops_per_second * jax.device_count() if peak else None
        self._pending: list[tuple[int, Mapping[str, Any]]] = []
        self._newest_step = start_step
        self._loading_seconds = self._hook_seconds = self._hooks_mark = 0.0
        self._window_start = perf_counter()
        self.tell: Callable[[str], None] = say  # a line for the person who watches
        self._stalls = Stalls(perf_counter, lambda: not self._pending or _is_ready(self._pending[-1][1]["train/loss"]))
        self._activity: Activity = "host"
        self._spikes = [Spikes(metric) for metric in RISE]
        self._store = StoreMetrics(store_metrics_every())
        # Of the windows of this process, but for the first, which warms up.
        self._values: dict[str, list[float]] = {f"throughput/{name}": [] for name in SPREAD}
        self._is_warm = False
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
        self._stalls.begin()
        self._stalls.cut("host")
        try:
            with self._doing("loading"):
                yield
        finally:
            self._stalls.cut("data")
            self._loading_seconds += perf_counter() - start
            self._start_window_if_idle()

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """Around everything that is done after a step: evaluation, checkpoints, logging."""
        with self._beside_the_steps("hooks"):
            yield

    @contextlib.contextmanager
    def _beside_the_steps(self, activity: Activity) -> Iterator[None]:
        self._hooks_mark = perf_counter()
        self._stalls.cut(self._activity)
        outer, self._activity = self._activity, activity
        try:
            with self._doing("hooks"):
                yield
        finally:
            self._stalls.cut(activity)
            self._activity = outer
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
        self._stalls.cut("host")
        self._pending.append((step, {**metrics, **self._store.of(step)}))
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

        self._stalls.cut(self._activity)
        steps = [step for step, _ in self._pending]
        with self._doing("waiting"):
            # On all devices: to read a number, one that has it would do, while the others are still at work.
            values = jax.device_get(jax.block_until_ready([metrics for _, metrics in self._pending]))
        seconds = perf_counter() - self._window_start
        self._pending.clear()
        self._stalls.cut("device")
        with self._beside_the_steps("host"):
            rows = [self._row(step, metrics) for step, metrics in zip(steps, values, strict=True)]
            rows[-1] |= self._throughput(steps[-1], len(steps), seconds) | self._waiting(steps[-1])
            self._loading_seconds = self._hook_seconds = 0.0
            for step, row in zip(steps, rows, strict=True):
                self._check(step, row)
                self._tracker.log(row | self._spikes_in(step, row), step=step)
            self.last = rows[-1]
            self._log_spread(steps[-1])

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
        from train.tree_stats import PerParameter

        row: dict[str, Any] = {"global_step": step, "run_progress": step / self._total_steps}
        for name, value in metrics.items():
            if isinstance(value, PerParameter):
                row |= {f"{name}/{of}": _number(one) for of, one in value.each()}
            else:
                row[name] = _number(value)
        return row

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
        if together.processes() > 1:
            window |= _slowest_to_load(window["loading_time"])
        if self._peak_flops:
            percent = utilisation(self._flops, tokens_per_second, self._peak_flops)
            window |= {"mfu": percent["mfu"], "mfu_causal": percent["mfu_causal"]}
        return {f"throughput/{name}": value for name, value in window.items()}

    def _waiting(self, step: int) -> dict[str, float]:
        """What the devices waited for in the window that ends with `step`, and the memory of this process."""
        shares = self._stalls.shares()
        if self._is_warm and (complaint := self._stalls.complaint(shares)):
            self.tell(f"step {step}: {complaint}")
        waiting = {"throughput/waiting_for_data": shares.data, "throughput/waiting_for_host": shares.host}
        return waiting | host_memory()

    def _spikes_in(self, step: int, row: Mapping[str, Any]) -> dict[str, float]:
        found = {}
        for spikes in self._spikes:
            if spikes.metric in row and (spike := spikes.look(row[spikes.metric])):
                found[f"{spikes.metric}_spike"], sentence = spike
                if sentence:
                    batch = batch_number(step, self._skipped)
                    first = batch * self._batch_size
                    examples = f"examples {first} to {first + self._batch_size - 1}, batch {batch} counted from 0"
                    self.tell(f"spike at step {step} ({examples}): {sentence}")
        return found

    def _log_spread(self, step: int) -> None:
        """At the last step the deciles and the median of the windows of this process, the first one left out."""
        for name, values in self._values.items() if self._is_warm else ():
            values += [self.last[name]] if name in self.last else []
        self._is_warm = True
        if step == self._total_steps:
            for name, values in self._values.items():
                if values:
                    named = {name.replace("/", f"/{which}_"): value for which, value in spread(values).items()}
                    self._tracker.log_summary(named)

    def _check(self, step: int, row: Mapping[str, Any]) -> None:
        for metric in MUST_BE_FINITE:
            if not math.isfinite(row.get(metric, 0.0)):
                batch = batch_number(step, self._skipped)
                error = NonFiniteLossError(step, row[metric], batch=batch, batch_size=self._batch_size, metric=metric)
                self._tracker.log_summary({"run/failed_step": step, "run/failure": str(error)})
                raise error


def _slowest_to_load(seconds: float) -> dict[str, float]:
    """Of all processes, each with its newest window: how long the slowest waits for data, and which it is."""
    of_each = together.newest_of_all("loading time", seconds)
    slowest = max(of_each, key=of_each.__getitem__, default=0)
    return {"loading_time_slowest": of_each.get(slowest, seconds), "slowest_process": slowest}


def spread(values: Sequence[float]) -> dict[str, float]:
    """The tenth, the fiftieth and the ninetieth percentile, as Levanter names them."""
    ordered = sorted(values)

    def at(share: float) -> float:
        below, part = divmod(share * (len(ordered) - 1), 1)
        low, high = ordered[int(below)], ordered[min(int(below) + 1, len(ordered) - 1)]
        return low + part * (high - low)

    return {"p10": at(0.1), "p50": at(0.5), "p90": at(0.9)}


def host_memory() -> dict[str, float]:
    """The resident memory of this process, where Linux tells it: one that grows and grows is a leak."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return {}
    return {"memory/host_rss_bytes": float(pages * os.sysconf("SC_PAGE_SIZE"))}


def _number(value: Any) -> Any:
    import numpy as np

    return value if isinstance(value, Histogram) else np.asarray(value, dtype=np.float64).tolist()


def _is_ready(value: Any) -> bool:
    """Whether a device scalar is there; a plain number is."""
    return value.is_ready() if hasattr(value, "is_ready") else True


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
