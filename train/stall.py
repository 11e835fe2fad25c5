# SPDX-License-Identifier: Apache-2.0
"""Notices that a run no longer moves. No jax here.

with Watchdog(30.0, progress, on_stall):
    ...
"""

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

# How often the watchdog looks within its time.
LOOKS = 20

_beats = 0


def beat() -> None:
    """Says that something goes on which is no step: a batch of an evaluation, a part of a failure's bundle."""
    global _beats
    _beats += 1


def beating(items: Iterator[Any]) -> Iterator[Any]:
    """`items`, with a `beat` for each."""
    for item in items:
        beat()
        yield item


class Watchdog:
    """A thread that calls `on_stall`, once, when `progress()` has given the same for `minutes`. None: it never looks.

    Compiling counts as progress, and so does a `beat`. It counts its own looks, not the clock: a process that was
    suspended (a laptop asleep, Ctrl-Z) has not looked meanwhile. It cannot look while a thread holds the interpreter's
    lock.
    """

    def __init__(self, minutes: float | None, progress: Callable[[], Any], on_stall: Callable[[], None]):
        self._minutes, self._progress, self._on_stall = minutes, progress, on_stall
        self._watched = threading.get_ident()
        self._end = threading.Event()

    def __enter__(self) -> Self:
        if self._minutes is not None:
            threading.Thread(target=self._watch, args=(60 * self._minutes / LOOKS,), daemon=True).start()
        return self

    def __exit__(self, *exc_info) -> None:
        self._end.set()

    def _watch(self, seconds: float) -> None:
        seen, same = None, 0
        while not self._end.wait(seconds):
            now = (_beats, self._progress())
            same = 0 if now != seen or is_compiling(self._watched) else same + 1
            seen = now
            if same == LOOKS:
                self._on_stall()
                return


def is_compiling(thread: int) -> bool:
    """Whether that thread waits for XLA to compile a program."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if Path(frame.f_code.co_filename).parts[-3:] == ("jax", "_src", "compiler.py"):
            return True
        frame = frame.f_back
    return False
