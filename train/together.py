# SPDX-License-Identifier: Apache-2.0
"""What the processes of one run agree on: who goes first, what process 0 decided, whether all of them have got there.

All of it goes through JAX's coordination service, which lives in process 0 and which `train/distributed.py` starts: by
host, in a millisecond, while the devices work on. With one process every function here returns at once. No jax here.

Each but `newest_of_all` has to be called by all processes, in the same order; `what` names it in messages.
"""

import json
import logging
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger(__name__)

# A process that waits says so after this long, and again and again.
PATIENCE_SECONDS = 60.0
# Longer than any process may be behind the others, but for preparing data: that has no limit.
LIMIT_MINUTES = 30.0

_turns: Counter[str] = Counter()  # how often something was agreed on under a name


class LostProcessError(RuntimeError):
    """Another process of the run has ended, or does not answer."""


def process() -> int:
    """Which of the run's processes this is, from 0."""
    return _jax_state().process_id if "jax" in sys.modules else 0


def processes() -> int:
    return _jax_state().num_processes if "jax" in sys.modules else 1


def is_first() -> bool:
    """Whether this process writes the run's files."""
    return process() == 0


def wait_for_all(what: str, *, minutes: float = LIMIT_MINUTES) -> None:
    """Returns when every process has got here.

    Raises:
      LostProcessError: not all of them have after `minutes`; the message names those that have not.
    """
    if processes() == 1:
        return
    try:
        client().wait_at_barrier(_name(what), round(60_000 * minutes))
    except Exception as error:  # JaxRuntimeError, of which this module knows nothing
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        missing = missing_processes(str(error))
        who = f"process {', '.join(map(str, missing))}" if missing else "another process"
        raise LostProcessError(
            f"process {process()} waited {minutes:g} minutes ({what}), and {who} did not come. Its own log says what it"
            " does instead."
        ) from error


def from_first(what: str, value: Any, *, minutes: float | None = LIMIT_MINUTES) -> Any:
    """`value`, which JSON can hold, as it is on process 0; the others wait for it. minutes None: as long as it lives.

    Raises:
      LostProcessError: process 0 has not said it after `minutes`.
    """
    if processes() == 1:
        return value
    name = _name(what)
    if is_first():
        client().key_value_set(name, json.dumps(value))
        return value
    began = time.monotonic()
    while True:
        try:
            return json.loads(client().blocking_key_value_get(name, round(1000 * PATIENCE_SECONDS)))
        except Exception as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            waited = (time.monotonic() - began) / 60
            if minutes is not None and waited >= minutes:
                raise LostProcessError(
                    f"process {process()} waited {waited:.0f} minutes for process 0 ({what}), which did not come. Its"
                    " own log says what it does instead."
                ) from error
            log.warning("waiting for process 0 (%s), for %.0f min so far", what, waited)


def from_all(what: str, value: Any) -> list[Any]:
    """The `value` of every process, which JSON can hold, in the order of the processes."""
    if processes() == 1:
        return [value]
    name = _name(what)
    client().key_value_set(f"{name}/{process()}", json.dumps(value))
    wait_for_all(what)
    found = {int(key.rpartition("/")[2]): json.loads(text) for key, text in client().key_value_dir_get(name)}
    return [found[number] for number in range(processes())]


def true_on_all(what: str, here: bool) -> bool:
    return all(from_all(what, bool(here)))


def check_same(what: str, facts: dict[str, Any], advice: str) -> None:
    """Raises ValueError, in every process, unless all of them have the same `facts`; it names the first that differ."""
    everywhere = from_all(what, facts)
    for other, found in enumerate(everywhere):
        # Of all that either knows of: the one that knows less is to raise it, too.
        different = [name for name in everywhere[0] | found if found.get(name) != everywhere[0].get(name)]
        if different:
            name = different[0]
            raise ValueError(
                f"{what}: {name} is {everywhere[0].get(name)!r} in process 0 and {found.get(name)!r} in process"
                f" {other}. {advice}"
            )


def newest_of_all(what: str, value: Any) -> dict[int, Any]:
    """In process 0 what every process said under this name last, as far as it has come; nobody waits for anybody."""
    if processes() == 1:
        return {0: value}
    name = f"grug/newest/{what}"
    client().key_value_set(f"{name}/{process()}", json.dumps(value), allow_overwrite=True)
    said = client().key_value_dir_get(name) if is_first() else []
    return {int(key.rpartition("/")[2]): json.loads(text) for key, text in said}


@contextmanager
def first_process_first(what: str) -> Iterator[None]:
    """Process 0 goes through the body before the others begin it: what it leaves on a disk that all see, they find.

    It may take hours; the others wait as long as process 0 lives, and say so.
    """
    if not is_first():
        from_first(what, None, minutes=None)
    yield
    if is_first():
        from_first(what, None)


def missing_processes(message: str) -> list[int]:
    """The processes that did not come, as the coordination service says of a barrier: a line for each."""
    _, _, names = message.partition("timed out task names:")
    return sorted(map(int, re.findall(r"^\d+$", names, re.MULTILINE)))


def client() -> Any:
    """JAX's own, of the coordination service.

    Raises:
      RuntimeError: the service was not started.
    """
    found = _jax_state().client
    if found is None:
        raise RuntimeError("together: jax.distributed is not started; train.run does so where it is one of several.")
    return found


def _name(what: str) -> str:
    """Never the same twice, and the same on every process."""
    _turns[what] += 1
    return f"grug/{what}/{_turns[what]}"


def _jax_state() -> Any:
    from jax._src import distributed

    return distributed.global_state
