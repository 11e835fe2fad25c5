# SPDX-License-Identifier: Apache-2.0
"""What the devices wait for: the data, the host, or nothing. Known without a profile, from what the loop sees.

The loop's time is cut where it goes from one thing to the next: loading a batch, dispatching a step, hooks (saving,
evaluating), Python between them, waiting for the devices. At each cut the newest step either is still at work or is
not; where it is not, the devices were idle at the end of that stretch, and the whole stretch is charged to what the
loop did in it. What is charged is therefore at most what was lost: nobody knows when within it the step ended.

    data = loading that was charged / (time - hooks)        host = dispatching and Python that were charged / the same

A window is bound by the one that takes the most, if that is at least `BOUND_PERCENT`; else by the devices, as it ought.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Activity = Literal["data", "host", "hooks", "device"]
Verdict = Literal["device", "data", "host"]

BOUND_PERCENT = 10.0
PATIENCE = 2  # windows in a row before it is said: one alone may be a hiccup of the machine

WAITED_FOR = {"data": "data", "host": "the host"}
ADVICE = {
    "data": (
        "Keep the token cache on a local disk and other work off the host's cores; or take larger batches, whose steps"
        " hide the loading."
    ),
    "host": (
        "Raise --trainer.log-every, leave out trackers and --watch, keep other work off the host's cores; or take"
        " larger batches, whose steps hide Python."
    ),
}


@dataclass(frozen=True)
class Shares:
    """Percent of a window's time without hooks in which the devices waited."""

    data: float
    host: float

    @property
    def verdict(self) -> Verdict:
        if max(self.data, self.host) < BOUND_PERCENT:
            return "device"
        return "data" if self.data >= self.host else "host"


class Stalls:
    """Cuts the loop's time. `clock` gives seconds, `is_idle` whether no step is at work."""

    def __init__(self, clock: Callable[[], float], is_idle: Callable[[], bool]):
        self._clock, self._is_idle = clock, is_idle
        self._cut_at: float | None = None  # None: nothing has been loaded yet, the loop has not begun
        self._seconds: dict[Activity, float] = dict.fromkeys(("data", "host", "hooks", "device"), 0.0)
        self._time = 0.0
        self._windows_bound, self._is_said = 0, False

    def begin(self) -> None:
        """Before the first batch is loaded; what came before (compiling) is no part of the loop."""
        if self._cut_at is None:
            self._cut_at = self._clock()

    def cut(self, activity: Activity) -> None:
        """The stretch since the last cut was spent on `activity`. Dispatching ends before its own step is at work."""
        if self._cut_at is None:
            return
        now = self._clock()
        stretch, self._cut_at = now - self._cut_at, now
        self._time += stretch
        if self._is_idle():
            self._seconds[activity] += stretch

    def shares(self) -> Shares:
        """Of the window that ends here; the next one begins."""
        time = max(self._time - self._seconds["hooks"], 1e-9)
        shares = Shares(100 * self._seconds["data"] / time, 100 * self._seconds["host"] / time)
        self._seconds, self._time = dict.fromkeys(self._seconds, 0.0), 0.0
        return shares

    def complaint(self, shares: Shares) -> str | None:
        """What to say and to do about it, when the run has become bound by data or host; once, until it recovers."""
        verdict = shares.verdict
        self._windows_bound = self._windows_bound + 1 if verdict != "device" else 0
        if not self._windows_bound:
            self._is_said = False
        if self._windows_bound < PATIENCE or self._is_said:
            return None
        self._is_said = True
        waited = f"for {getattr(shares, verdict):.0f} % of the time the devices wait for {WAITED_FOR[verdict]}"
        return f"{waited}. {ADVICE[verdict]}"
