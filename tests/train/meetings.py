# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.train.meetings FOLDER`: several processes that meet, agree and end, without training anything.

Every process is forked from this one, which has started no jax backend, and is then what `python -m train.run` is, but
that something short is in the place of the variant's run. Prints one JSON object: {meeting: [[exit code, or "hung",
what it said] of each process]}, for `test_together.py`, which runs this.
"""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from grug_model.array_stacked import launch
from train import last_words, together
from train import run as train_run
from train.distributed import environment_of
from train.launch_local import free_port
from train.prove_resume import forked, wait_for
from train.rundir import open_run, say, say_here

Run = Callable[[Any], None]  # what is in the place of launch.run
HANG_SECONDS = 90.0  # of all meetings together


def quicken() -> None:
    """What takes seconds for the sake of machines that are slow to answer."""
    last_words._LOOK_SECONDS, last_words._SIGN_SECONDS, last_words._GRACE_SECONDS = 0.1, 1.0, 2.0
    together.PATIENCE_SECONDS = 0.3


def member(run: Run, argv: list[str], place: dict[str, str]) -> None:
    os.environ.update(place)
    quicken()
    launch.run = run
    train_run.main(["--stacked", *argv])


def start(name: str, *runs: Run | None, argv: tuple[str, ...] = (), of_1: tuple[str, ...] = ()) -> list[int]:
    """Process ids. runs: of each process; None: it is not started. of_1: flags that process 1 alone has."""
    coordinator, argv = f"127.0.0.1:{free_port()}", ("--run-id", name.replace(" ", "-"), *argv)
    return [
        forked(
            partial(member, run, [*argv, *(of_1 * number)], environment_of(len(runs), number, coordinator)),
            Path(f"{name}-{number}.log"),
        )
        for number, run in enumerate(runs)
        if run
    ]


def end_of(child: int, until: float) -> int | str:
    """Its exit code; where it goes on after `until`, which none should, it is killed."""
    code = wait_for(child, lambda: time.monotonic() > until)
    if code is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return "hung" if code is None else code


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def agree(_: Any) -> None:
    """Each part with a process that is late, or alone with what it says."""
    me, said = together.process(), {}
    say("once")
    say_here("each")
    logging.getLogger("train").info("all is well")
    said["from first"] = [together.from_first("x", me + turn) for turn in (10, 20)]
    said["from all"] = together.from_all("y", 2 * me)
    said["true"] = [together.true_on_all("z", True), together.true_on_all("z", me != 1)]
    facts = {"a": 1, "b": 2}
    for other in (facts, facts | {"b": 3}, facts | {"c": 4}):
        mine = other if me == 2 else facts
        said.setdefault("same", []).append(error_of(lambda mine=mine: together.check_same("texts", mine, "Mend it.")))
    if me:
        together.newest_of_all("speed", "old")
        together.newest_of_all("speed", "new")
    together.wait_for_all("all having said how fast they are")
    said["newest"] = together.newest_of_all("speed", "newest") if me == 0 else None
    late(1, "late")
    together.wait_for_all("the late one")
    said["waited"] = Path("late").exists()
    with together.first_process_first("preparing"):
        said["after the first"] = Path("prepared").exists()
        late(0, "prepared")
    if me != 2:
        said["never came"] = error_of(lambda: together.wait_for_all("the moon", minutes=0.05))
    if me != 0:
        said["never said"] = error_of(lambda: together.from_first("the sun", None, minutes=0.01))
    print(json.dumps(said), flush=True)
    late(2, "last of all")  # process 0 is not to go before


def late(who: int, file: str) -> None:
    if together.process() == who:
        time.sleep(0.5)
        Path(file).touch()


def opens(config: Any) -> None:
    open_run("array_stacked", config)


def opens_slowly(config: Any) -> None:
    """A disk on which a file takes its time."""
    touch = Path.touch
    Path.touch = lambda file: (time.sleep(0.5), touch(file))
    opens(config)


def opens_elsewhere(config: Any) -> None:
    Path("elsewhere").mkdir()
    os.chdir("elsewhere")
    opens(config)


def fails(_: Any) -> None:
    raise KeyError("a planted error")


def fails_late(config: Any) -> None:
    """When the other has finished."""
    time.sleep(1)
    fails(config)


def claims(config: Any) -> None:
    """As a run does, which has its bundle to write."""
    print("claims:", last_words.claim("KeyError: 'a planted error'"), flush=True)
    fails(config)


def claims_too(config: Any) -> None:
    """When it has been told of the other."""
    while not last_words.told():
        time.sleep(0.05)
    claims(config)


def waits(_: Any) -> None:
    """In C++, where no exception reaches it; and needs longer for its end than one that is alive is silent."""
    with last_words.before_end(lambda why: (time.sleep(4 * last_words._SIGN_SECONDS), print(f"the end: {why}"))):
        together.wait_for_all("the end of days")


def is_killed(_: Any) -> None:
    time.sleep(2.5 * last_words._SIGN_SECONDS)  # it was alive, and the others know it
    os.kill(os.getpid(), signal.SIGKILL)


def sees_it(_: Any) -> None:
    """As gloo says that the other has gone; before that, as it says so where nobody has."""
    print("own:", last_words.lost(ValueError("no ink")))
    print("nobody gone:", last_words.lost(RuntimeError("[gloo] connection closed by peer")), flush=True)
    Path("now").touch()
    time.sleep(1)
    try:
        raise RuntimeError("[gloo] connection closed by peer")
    except RuntimeError as cause:
        raise ValueError("the step failed") from cause


def is_killed_then(_: Any) -> None:
    while not Path("now").exists():
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path) -> None:
    os.chdir(folder)
    soon, impatient = ("--distributed.lost-seconds", "6"), ("--distributed.start-seconds", "2")
    meetings = {
        "agree": (agree, agree, agree),
        "another configuration": (opens, opens),
        "another folder": (opens, opens_elsewhere),
        "one folder": (opens_slowly, opens),
        "fails": (waits, fails),
        "the first fails": (fails, waits),
        "fails last": (lambda _: None, fails_late),
        "both fail": (claims_too, claims),
        "killed": (waits, waits, is_killed),
        "killed, and it shows": (sees_it, is_killed_then),
        "without 1": (waits, None),
        "without 0": (None, waits),
    }
    argv = {"killed": soon, "without 0": impatient, "without 1": impatient}
    of_1 = {"another configuration": ("--steps", "70")}
    children = {
        name: start(name, *runs, argv=argv.get(name, ()), of_1=of_1.get(name, ())) for name, runs in meetings.items()
    }
    found, until = {}, time.monotonic() + HANG_SECONDS
    for name, ids in children.items():
        codes = [end_of(child, until) for child in ids]
        said = [log.read_text() for log in sorted(Path().glob(f"{name}-?.log"))]
        found[name] = list(zip(codes, said, strict=True))
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
