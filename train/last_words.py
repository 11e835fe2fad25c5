# SPDX-License-Identifier: Apache-2.0
"""How all processes of a run end when one does.

    with ends_together():            # train.run, around everything
        join(options.distributed)    # calls listen()
        ...

A process that fails leaves its last words with JAX's coordination service, and the others, which listen, end with them.
One that is killed says nothing. Its connections break: where the devices talk by sockets the others fail at once. Its
signs of life stop: after `lost_seconds` process 0 says so in its place. Where process 0 itself is killed the service is
gone with it, and JAX aborts the others at once. It takes no callback; its C++ client does, and ends with std::bad_cast
where that is a Python function (jaxlib 0.11.2). No jax here.
"""

import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from train import together
from train.failure import first_line
from train.together import LostProcessError

log = logging.getLogger(__name__)

LOST = 8  # the exit code of a process that ends because another did

_WORDS, _ALIVE, _LEFT = "grug/last-words", "grug/alive", "grug/left"
_LOOK_SECONDS = 1.0
_SIGN_SECONDS = 3.0  # between two signs of life
# How long a process that has been told of another's end has to end by itself.
_GRACE_SECONDS = 10.0
# For the one that failed first to write its bundle.
_LAST_SECONDS = 120.0
# In errors that are what another's end looks like from here: of gloo, NCCL, libtpu and the coordination service.
_SYMPTOMS = ("gloo", "nccl", "connection closed", "connection reset", "socket closed", "unavailable", "heartbeat",
             "coordination service", "barrier", "deadline_exceeded")  # fmt: skip


@dataclass
class _Here:
    """told: why another process has ended. leaving: this one ends by itself. gone: it gives no more signs of life."""

    listening: bool = False
    told: str | None = None
    leaving: threading.Event = field(default_factory=threading.Event)
    gone: threading.Event = field(default_factory=threading.Event)
    before_end: Callable[[str], None] | None = None


_here = _Here()


def listen(lost_seconds: float) -> None:
    """From now on this process gives signs of life, and ends where another has ended."""
    _here.listening = True
    for look in (_look_for_words, _give_signs, *([lambda: _look_for_the_silent(lost_seconds)] * together.is_first())):
        threading.Thread(target=look, daemon=True).start()


def _give_signs() -> None:
    sign = 0
    while not _here.gone.wait(_SIGN_SECONDS):
        sign += 1
        with suppress(Exception):  # nobody is there to read it: JAX tells, or aborts
            together.client().key_value_set(f"{_ALIVE}/{together.process()}", str(sign), allow_overwrite=True)


def _look_for_the_silent(lost_seconds: float) -> None:
    """In process 0: says in place of a process that gives no signs that it is gone."""
    signs, since = {}, dict.fromkeys(range(together.processes()), time.monotonic())
    while not _here.leaving.wait(_SIGN_SECONDS):
        now, seen = time.monotonic(), _signs()
        since |= {number: now for number, sign in seen.items() if signs.get(number) != sign}
        signs = seen
        if silent := [number for number in since if now - since[number] > lost_seconds]:
            _say_in_their_place(silent)


def _signs() -> dict[int, str]:
    """The newest sign of life of every process that has given one."""
    try:
        found = together.client().key_value_dir_get(_ALIVE)
    except Exception:  # nobody has yet
        return {}
    return {int(name.rpartition("/")[2]): sign for name, sign in found}


def _say_in_their_place(silent: list[int]) -> None:
    them = f"process {', '.join(map(str, silent))}"
    _leave_words(f"{them} ended without a word: it was killed (the host's memory?), or its machine or network is gone")


def _leave_words(words: str) -> bool:
    """Whether nobody has left any before."""
    try:
        together.client().key_value_set(_WORDS, words)
    except Exception:  # somebody has, or nobody is there to keep them
        return False
    return True


def _hear() -> None:
    with suppress(Exception):  # there are no words yet
        _here.told = together.client().key_value_try_get(_WORDS)


def _look_for_words() -> None:
    """Ends this process where another has ended. The main thread cannot be: it waits in C++ for that very process."""
    while not _here.leaving.wait(_LOOK_SECONDS):
        _hear()
        if _here.told and not _here.leaving.wait(_GRACE_SECONDS):
            end_now(f"another process ended, and this one with it: {_here.told}")


def end_now(why: str) -> None:
    """Says why, and ends this process from whichever thread notices that it must."""
    _say(f"error: {why}")
    if _here.before_end:
        with suppress(Exception):
            _here.before_end(why)
    _exit(LOST)


def claim(words: str) -> bool:
    """Leaves this process's last words for the others, where nobody has before. Whether it is the first that fails.

    From then on it ends by itself, and takes the time that it needs. Alone it always is the first.
    """
    if not _here.listening:
        return True
    mine = f"process {together.process()}: {words}"
    if not _leave_words(mine):
        _hear()
        return _here.told == mine
    _here.leaving.set()
    return True


def ends_by_itself() -> None:
    """From now on this process is not ended when it is told of another's end: it has seen the same, and has work."""
    _here.leaving.set()


def told() -> str | None:
    """Why another process has ended, as far as is known here."""
    return _here.told


@contextmanager
def before_end(call: Callable[[str], None]) -> Iterator[None]:
    """Inside, `call` is told why another process ended, before this one is ended with it."""
    _here.before_end = call
    try:
        yield
    finally:
        _here.before_end = None


def lost(error: BaseException) -> LostProcessError | None:
    """What `error` is where it comes from another process's end; None where it is this one's own."""
    if isinstance(error, LostProcessError):
        return error
    if not _here.listening or not _is_symptom(error):
        return None
    before, until = _signs(), time.monotonic() + 3 * _SIGN_SECONDS
    while not _here.told and time.monotonic() < until:
        time.sleep(0.1)
    if not _here.told:
        after = _signs()
        if silent := [number for number in range(together.processes()) if before.get(number) == after.get(number)]:
            _say_in_their_place(silent)
            _hear()
    if not _here.told:
        return None
    return LostProcessError(f"another process ended, and this one with it: {_here.told} ({first_line(error)})")


def _is_symptom(error: BaseException | None) -> bool:
    while error is not None:
        if any(words in str(error).lower() for words in _SYMPTOMS):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def ends_together() -> Iterator[None]:
    """Inside, a process may `listen`. One that fails then tells the others, and ends without waiting for an answer."""
    try:
        yield
    except BaseException as end:
        if not _here.listening:
            raise
        code = end.code if isinstance(end, SystemExit) else 1
        if code in (None, 0, 130, 143):  # all of them have stopped, after the same step
            _leave()
            raise
        if not isinstance(end, SystemExit):
            traceback.print_exc()
        claim(first_line(end.__cause__ or end))
        _exit(code if isinstance(code, int) else 1)
    _leave()


def _leave() -> None:
    """Waits for the others to have finished, too: process 0 takes the coordination service with it."""
    if not _here.listening:
        return
    import jax

    try:
        together.wait_for_all("all processes having finished")
        _here.leaving.set()
        _here.gone.set()
        jax.distributed.shutdown()
    except Exception as error:
        log.warning("not all processes ended together: %s", first_line(error))
    _here.listening = False


def _exit(code: int) -> None:
    """At once, without the end that JAX would wait for. Process 0 goes last: with it goes what the others listen to."""
    _here.leaving.set()
    go_last()
    _here.gone.set()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def go_last() -> None:
    """In process 0 returns when the others have gone, or give no signs of life; they only say that they go."""
    if not _here.listening:
        return
    if not together.is_first():
        with suppress(Exception):  # process 0 has gone
            together.client().key_value_set(f"{_LEFT}/{together.process()}", "")
        return
    others, until = set(range(1, together.processes())), time.monotonic() + _LAST_SECONDS
    before, look_again = _signs(), time.monotonic() + 3 * _SIGN_SECONDS
    while others and time.monotonic() < until:
        time.sleep(0.1)
        with suppress(Exception):  # nobody has left yet
            others -= {int(name.rpartition("/")[2]) for name, _ in together.client().key_value_dir_get(_LEFT)}
        if time.monotonic() > look_again:
            now = _signs()
            others = {number for number in others if now.get(number) != before.get(number)}
            before, look_again = now, time.monotonic() + 3 * _SIGN_SECONDS


def _say(text: str) -> None:
    print(f"process {together.process()}: {text}", file=sys.stderr, flush=True)
