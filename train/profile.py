# SPDX-License-Identifier: Apache-2.0
"""A trace of a few whole steps, for xprof: `--profile.start 50 --profile.steps 3`. No jax until there is one to make.

with Profile(config.profile, run.profiler, tracker) as profile:
    for step in profile.steps(range(start + 1, total_steps + 1), meter):
        ...
"""

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from train import together
from train.metrics import Meter
from train.rundir import say
from train.tracker import RunTracker

log = logging.getLogger(__name__)

FIRST_STEP, NUM_STEPS = 10, 3  # where only the other was given


@dataclass(frozen=True)
class ProfileConfig:
    """A trace of a few steps, written to <run>/profiler for xprof. Off unless one of these is given."""

    # The first step that is traced, counted from 1. None: the tenth, where `steps` is given.
    start: int | None = None
    # How many steps are traced. None: three, where `start` is given.
    steps: int | None = None

    def __post_init__(self):
        for name in ("start", "steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(
                    f"ProfileConfig: {name}={value}; it is at least 1. Leave --profile.start and --profile.steps out"
                    " for a run without a trace."
                )

    @property
    def window(self) -> range:
        """The steps that are asked for, none where the trace is off."""
        if self.start is None and self.steps is None:
            return range(0)
        first = FIRST_STEP if self.start is None else self.start
        return range(first, first + (NUM_STEPS if self.steps is None else self.steps))


class Profile:
    """Traces the steps of `config.window` into `folder`/plugins/profile/<session>/*.xplane.pb, where xprof looks.

    A context manager: what ends the run inside the window also ends the trace, and writes what there is of it. Every
    process traces its own devices, all into one session. The folder has to be local: `rundir.check_fit` sees to it.
    """

    def __init__(self, config: ProfileConfig, folder: Path, tracker: RunTracker):
        self._window, self._folder, self._tracker = config.window, folder, tracker
        self._first: int | None = None  # of the open trace; None: none is open
        self._newest_step = 0
        self._tell: Callable[[str], None] = say

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *exc_info) -> None:
        if self._first is not None:
            self._stop(f", cut off within step {self._newest_step}")

    def steps(self, steps: range, meter: Meter, tell: Callable[[str], None] = say) -> Iterator[int]:
        """`steps`, each within an annotation that xprof takes for a step; the trace begins and ends between them.

        The devices are waited for on both sides, so that it holds whole steps and no others.
        """
        from jax.profiler import StepTraceAnnotation

        self._tell = tell
        window = self._within(steps)
        for step in steps:
            if window and step == window[0]:
                meter.flush()
                with meter.hooks():
                    self._start(window)
            self._newest_step = step
            with StepTraceAnnotation("train", step_num=step):
                yield step
            if window and step == window[-1]:
                meter.flush()
                with meter.hooks():
                    self._stop()

    def _within(self, steps: range) -> range:
        """The part of the window that lies in `steps`; aloud, where that is not all of it."""
        wanted = self._window
        window = range(max(wanted.start, steps.start), min(wanted.stop, steps.stop))
        if len(window) < len(wanted):
            log.warning(
                "profile: steps %d to %d were asked for, and %s traced, since this run goes on after step %d and ends"
                " with step %d. --profile.start and --profile.steps choose others.",
                wanted[0],
                wanted[-1],
                f"only {window[0]} to {window[-1]} will be" if window else "none will be",
                steps.start - 1,
                steps.stop - 1,
            )
        return window

    def _start(self, window: range) -> None:
        import jax

        options = jax.profiler.ProfileOptions()
        options.session_id = together.from_first("the trace's name", self._session(f"steps-{window[0]}-{window[-1]}"))
        options.python_tracer_level = 0  # it would record every call of every thread, and slow the steps down
        jax.profiler.start_trace(self._folder, profiler_options=options)
        self._first = window[0]

    def _session(self, name: str) -> str:
        """`name`, or numbered where there is one: beside a trace xprof keeps what it made of it, and would show that
        for another trace of the same name. The same on every host, unlike a time."""
        sessions = self._folder / "plugins" / "profile"
        names = (name if n == 1 else f"{name}.{n}" for n in count(1))
        return next(name for name in names if not (sessions / name).exists())

    def _stop(self, how: str = "") -> None:
        """Writes the trace, and says where it is."""
        import jax

        first, self._first = self._first, None
        jax.profiler.stop_trace()
        facts = {"first_step": first, "last_step": self._newest_step, "folder": str(self._folder)}
        self._tracker.log_summary({f"profile/{name}": value for name, value in facts.items()})
        traced = f"trace of steps {first} to {self._newest_step}{how}"
        self._tell(f"{traced}; look at it with: {xprof_command(self._folder)}")


def xprof_command(folder: Path | str) -> str:
    """What opens the traces in `folder`."""
    return f"uv run --extra prof xprof --logdir {os.path.relpath(folder)}"
