# SPDX-License-Identifier: Apache-2.0
"""What is going on, on stderr: named phases with their duration, then one line for the training loop.

On a terminal the line is redrawn in place; elsewhere (a log file, CI) a new one is printed about every ten seconds.
Nothing here touches a device: the numbers shown are those that were logged last.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from time import perf_counter
from typing import TextIO

from train import together
from train.summary import clock, si

REDRAW_SECONDS = 0.1
PRINT_SECONDS = 10.0
BAR_WIDTH = 24


class StatusLine:
    """One line of text that changes: in place on a terminal, else printed anew at most every `PRINT_SECONDS`.

    Of several processes process 0 alone shows any.
    """

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stderr
        self.in_place = self._stream.isatty()
        self._shown_at = float("-inf")

    def show(self, text: str) -> None:
        """Shows `text` unless another was shown a moment ago."""
        now = perf_counter()
        if now - self._shown_at >= (REDRAW_SECONDS if self.in_place else PRINT_SECONDS):
            self._shown_at = now
            self._write(text, "" if self.in_place else "\n")

    def keep(self, text: str) -> None:
        """Shows `text` for good; what is shown next goes below."""
        self._write(text, "\n")

    def _write(self, text: str, end: str) -> None:
        if not together.is_first():
            return
        if self.in_place:
            columns = _columns(self._stream)
            # Back to the first column, and clear what a longer text has left. A wrapped line could not be redrawn.
            text = f"\r{text if end else text[: columns - 1]}\x1b[K"
        self._stream.write(text + end)
        self._stream.flush()


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):  # a pseudo terminal without a size
        return 80


@contextlib.contextmanager
def phase(name: str, *, stream: TextIO | None = None) -> Iterator[Callable[[str], None]]:
    """Says that `name` has begun, and how long it took. Yields a function that shows a detail beside the name.

    with phase("building corpus") as say:
        say("code, 120 of 529 documents")
    """
    line, start = StatusLine(stream), perf_counter()
    line.show(f"{name} ...")
    outcome = "stopped after"
    try:
        yield lambda detail: line.show(f"{name}: {detail}")
        outcome = "done in"
    finally:
        line.keep(f"{name}: {outcome} {clock(perf_counter() - start)}")


class Progress:
    """The line of the training loop: steps, loss, tokens/s, time elapsed and left.

    with Progress(total_steps, start_step) as bar:
        for step in range(start_step, total_steps):
            ...
            bar.update(step + 1, meter.last)
    """

    def __init__(self, total_steps: int, start_step: int = 0, *, stream: TextIO | None = None):
        self._total_steps, self._step = total_steps, start_step
        self._line = StatusLine(stream)
        self._row: Mapping[str, float] = {}
        self._start = perf_counter()
        self._first: tuple[int, float] | None = None  # step and time of the first update

    def update(self, step: int, row: Mapping[str, float]) -> None:
        """Shows that `step` steps are dispatched; `row` is the row logged last, as in `Meter.last`."""
        self._step, self._row = step, row
        # The first step waits for compilation: the time left is reckoned from the ones after it.
        self._first = self._first or (step, perf_counter())
        self._line.show(self._text())

    def say(self, text: str) -> None:
        """Prints a line above the progress."""
        self._line.keep(text)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc_info) -> None:
        self._line.keep(self._text())

    def _text(self) -> str:
        done = self._step / self._total_steps if self._total_steps else 1.0
        filled = round(BAR_WIDTH * done)
        parts = [
            f"{'━' * filled}{'─' * (BAR_WIDTH - filled)} {100 * done:3.0f} %",
            f"step {self._step}/{self._total_steps}",
        ]
        if "train/loss" in self._row:
            parts.append(f"loss {self._row['train/loss']:.3f}")
        if "throughput/tokens_per_second" in self._row:
            parts.append(f"{si(self._row['throughput/tokens_per_second'])} tokens/s")
        parts.append(clock(perf_counter() - self._start))
        if (left := self._seconds_left()) is not None:
            parts.append(f"{clock(left)} left")
        return "  ".join(parts)

    def _seconds_left(self) -> float | None:
        if self._first is None or self._step == self._first[0] or self._step >= self._total_steps:
            return None
        first_step, first_time = self._first
        return (perf_counter() - first_time) / (self._step - first_step) * (self._total_steps - self._step)
