# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and Ctrl-C: the first one lets a run save its step and end, the second one ends it at once. No jax here.

    with catch_signals():              # train.run, around everything
        checkpoints.on_step(...)       # after each step: saves and raises `Stopped` where a signal has come

Between two calls of `on_step` a signal is only noted. Before the first of them nothing would be lost, and `Stopped` is
raised wherever the program is. It is a KeyboardInterrupt: whoever lets Ctrl-C through lets it through.

With several processes JAX listens to SIGTERM from `jax.distributed.initialize` on: a signal that reaches one of them
makes all of them save the same step.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from train import together
from train.rundir import say_here

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(KeyboardInterrupt):
    """A signal ended the run: after `step`, which is saved at `path`, or before there was anything to save."""

    def __init__(self, number: int, *, step: int | None = None, path: str | None = None):
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name}" + (f" after step {step}, which is saved: {path}" if path else ""))
        self.number, self.path = number, path

    @property
    def exit_code(self) -> int:
        """What a shell makes of a process that the signal killed: 143 for SIGTERM, 130 for Ctrl-C."""
        return 128 + self.number


@dataclass
class _Now:
    """number: the signal that has come. deferred: whether it has to wait for `requested` to be asked."""

    number: int | None = None
    deferred: bool = False


_now = _Now()


@contextmanager
def catch_signals() -> Iterator[None]:
    """Inside, SIGNALS mean what this module says; those that whoever started the program has blocked stay so."""
    _now.number, _now.deferred = None, False
    if threading.current_thread() is not threading.main_thread():
        say_here(
            "warning: not in the main thread, where Python handles signals: SIGTERM and Ctrl-C will not save the run."
        )
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = {number: signal.getsignal(number) for number in SIGNALS if not _belongs_to_another(number)}
    for number in before:
        signal.signal(number, _handle)
    before_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watch = threading.Thread(target=_watch, args=(reader,), daemon=True)
    watch.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before_fd)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)  # ends the watch
        watch.join()
        os.close(reader)


def requested(step: int) -> int | None:
    """The signal that asks for an end after `step`, at the same step on every process; to be asked after each."""
    from jax.experimental import multihost_utils

    if multihost_utils.reached_preemption_sync_point(step):
        return _now.number or signal.SIGTERM
    return _now.number if together.processes() == 1 else None


def defer(on: bool) -> None:
    """Whether the next signal is only noted. Raises `Stopped` where one was noted and is waited for no longer."""
    _now.deferred = on
    if not on and _now.number and not _listens_to_sigterm():
        raise Stopped(_now.number)


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, a signal is only noted; afterwards it is what it was before."""
    before = _now.deferred
    _now.deferred = True
    try:
        yield
    finally:
        defer(before)


def _handle(number: int, _frame: object) -> None:
    """Runs in the main thread, between two of Python's instructions."""
    if _now.number is not None:
        return
    _now.number = number
    if _listens_to_sigterm():
        signal.raise_signal(signal.SIGTERM)  # JAX tells the other processes
    elif not _now.deferred:
        raise Stopped(number)


def _watch(reader: int) -> None:
    """Says what a signal does, at once: the main thread may be compiling for minutes, and handles none meanwhile."""
    seen = 0
    while number := int.from_bytes(os.read(reader, 1)):
        if number not in SIGNALS:
            continue
        seen += 1
        name = signal.Signals(number).name
        if seen > 1:
            say_here(f"\n{name} again: ending at once.")
            os._exit(128 + number)
        when = " after this step, which is saved first" if _now.deferred else ""
        say_here(f"\n{name}: stopping{when}. Once more ends it at once.")


def _belongs_to_another(number: int) -> bool:
    """Ignored, as in a shell's background job, or listened to by JAX."""
    return signal.getsignal(number) is signal.SIG_IGN or (number == signal.SIGTERM and _listens_to_sigterm())


def _listens_to_sigterm() -> bool:
    """Whether JAX does, in one of several processes."""
    if "jax" not in sys.modules:
        return False
    from jax._src import distributed

    return distributed.global_state.preemption_sync_manager is not None
