# SPDX-License-Identifier: Apache-2.0
"""Sudden rises of the loss and of the gradient norm, told from noise. They are said, and change nothing.

With x = ln(value), over the last `WINDOW` steps:

    median = median of x            spread = 1.4826 * median of |x - median|    (for a normal distribution its sigma)
    a value is a spike where x - median > max(SIGMAS * spread, ln(1 + rise))

Logarithms, since noise grows with the value and gradient norms are skewed; medians, since they do not move with the
spikes themselves. `rise` keeps a very steady series from crying at nothing. A falling loss lies below its median. There
is no verdict before the window holds `AT_LEAST` steps: so none while a run, or a process that resumes one, warms up.
"""

import math
from collections import deque
from statistics import median

WINDOW, AT_LEAST = 128, 64
SIGMAS = 6.0
NORMAL = 1.4826
# How far above the median a value has to be whatever the noise: the loss by a tenth, the gradient norm twice as high.
RISE = {"train/loss": 0.1, "train/grad_norm": 1.0}


class Spikes:
    """Of one metric. `look` at its value of every step in turn."""

    def __init__(self, metric: str):
        self.metric = metric
        self._window: deque[float] = deque(maxlen=WINDOW)
        self._is_inside = False

    def look(self, value: float) -> tuple[float, str] | None:
        """How many times its median a spike is, and a sentence about it: "" within a spike that has been spoken of."""
        x = math.log(max(value, 1e-30))
        found, steps = self._found(x), len(self._window)
        self._window.append(x)
        sentence = ""
        if found and not self._is_inside:
            ratio, sigmas = found
            sentence = (
                f"{self.metric} is {value:.4g}, {ratio:.2f} times the median of the last {steps} steps"
                f" ({sigmas:.0f} robust deviations above it)"
            )
        self._is_inside = found is not None
        return (found[0], sentence) if found else None

    def _found(self, x: float) -> tuple[float, float] | None:
        """(times the median, deviations above it) of a spike."""
        if len(self._window) < AT_LEAST:
            return None
        middle = median(self._window)
        spread = NORMAL * median(abs(other - middle) for other in self._window)
        above = x - middle
        if above <= max(SIGMAS * spread, math.log1p(RISE[self.metric])):
            return None
        return math.exp(above), above / max(spread, 1e-9)
