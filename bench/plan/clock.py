# SPDX-License-Identifier: Apache-2.0
"""What is being done, and for how long: redrawn every second on a terminal, a line per stage elsewhere."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import TextIO

from train.progress import StatusLine
from train.summary import clock

REDRAW_SECONDS = 1.0


@contextlib.contextmanager
def stages(stream: TextIO | None = None) -> Iterator[Callable[[str], None]]:
    """Yields a function to be called as each stage begins: the one before is then said to have taken its time."""
    line = StatusLine(stream)
    begun: list[tuple[str, float]] = []
    over = threading.Event()

    def ends() -> None:
        if begun:
            name, start = begun.pop()
            line.keep(f"{name}: {clock(perf_counter() - start)}")

    def begins(name: str) -> None:
        ends()
        begun.append((name, perf_counter()))

    def redraw() -> None:
        while not over.wait(REDRAW_SECONDS):
            for name, start in begun[-1:]:
                line.show(f"{name} ... {clock(perf_counter() - start)}")

    drawing = threading.Thread(target=redraw, daemon=True)
    if line.in_place:
        drawing.start()
    try:
        yield begins
    finally:
        over.set()
        if line.in_place:
            drawing.join()
        ends()
