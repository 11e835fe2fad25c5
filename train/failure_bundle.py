# SPDX-License-Identifier: Apache-2.0
"""One folder about a failure: `<run>/failures/<UTC time>-<kind>/`, written before the run ends. No jax until then.

    failure.json, failure.html     everything below, and the page for people
    batch.npz                      tokens, loss_weight, segment_ids of the batch, and the numbers of its rows
    stacks.txt                     of a stall: where every thread was

What is cheap is written first: a device that no longer answers costs the rest alone. Of several processes the first
that fails writes it, process 0 where all do at once; of another than process 0 its name ends with -process-<i>.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from train import together
from train.batches import batch_number, skipped_ranges
from train.checkpoint_files import find_complete
from train.failure import NON_FINITE, OUT_OF_MEMORY, STALL, Kind
from train.failure_page import failure_page
from train.history import read_history
from train.metrics import Meter, NonFiniteLossError
from train.rundir import RunDir, as_dict, say_here, write_atomically
from train.stall import beat
from train.summary import collect

JSON_FILE, PAGE_FILE, STACKS_FILE = "failure.json", "failure.html", "stacks.txt"
ROWS = 20

VERDICTS = {
    "loading": "data-bound: the loop waits for the next batch",
    "stepping": "device-bound: the loop waits to dispatch a step",
    "waiting": "device-bound: the loop waits for steps that it dispatched",
    "hooks": "host-bound: the loop evaluates, saves or logs",
}


class Loop(NamedTuple):
    """What the loop has built by its first step. loss: (params, batch) -> (loss, parts), that of the training step."""

    meter: Meter
    loader: Any
    train_step: Any
    loss: Callable[[Any, Any], tuple[Any, Any]]
    tokenizer_dir: Path


@dataclass
class Evidence:
    """What is known of a run, for the bundle about its failure. The loop sets `loop`, once, and `state`, every step.

    init: makes the state that the run began with. wait_for_saves: returns when what is being saved is on disk.
    watched: the thread that trains.
    """

    run: RunDir
    config: Any
    init: Callable[[], Any]
    loop: Loop | None = None
    state: Any = None
    wait_for_saves: Callable[[], None] = lambda: None
    failed: Kind | None = None
    watched: int = field(default_factory=threading.get_ident)

    def progress(self) -> tuple[Any, ...]:
        """Changes as long as the run moves: as the loop goes round, steps complete, or a checkpoint grows."""
        return self.loop and self.loop.meter.progress(), _bytes_below(self.run.checkpoints)

    @property
    def verdict(self) -> str:
        """What a run that is stuck waits for."""
        return VERDICTS.get(self.doing, f"host-bound: the run is {self.doing}")

    @property
    def doing(self) -> str:
        """Where the loop is, or was when an error came out of it."""
        if self.loop is None:
            return "starting"
        meter = self.loop.meter
        is_over = meter.newest_step == self.config.trainer.steps and meter.doing == "stepping"
        return "ending" if is_over else meter.doing

    def suspects(self, error: BaseException | None) -> range:
        """The step that failed, and those dispatched after it. None before the first; no `error`: the run is stuck."""
        if self.loop is None:
            return range(0)
        if isinstance(error, NonFiniteLossError):
            return range(error.step, error.step + 1)
        meter = self.loop.meter
        good = meter.steps_in_flight().start - 1 if error is None else meter.newest_good_step()
        newest = meter.newest_step + (meter.doing in ("loading", "stepping"))  # the one that was about to be dispatched
        return range(min(good + 1, newest), newest + 1)

    def last_good(self, step: int | None) -> tuple[str | None, int]:
        """The newest complete checkpoint before `step`, and how many steps it holds; (None, 0) where there is none."""
        roots = [self.run.checkpoints, *filter(None, [self.config.trainer.load_checkpoint_path])]
        for path in find_complete(roots):
            holds = int(path.rpartition("-")[2])
            if step is None or holds < step:
                return path, holds
        return None, 0


def write_bundle(evidence: Evidence, kind: Kind, error: BaseException | None) -> Path | None:
    """The folder's page; None where it cannot be written, and why is said. Raises nothing: the failure matters more."""
    try:
        folder = _new_folder(evidence.run.failures, kind)
        if kind is not STALL:
            _settle(evidence, kind)
        facts = _cheap_facts(evidence, kind, error, folder)
        _write(folder, facts)
        if kind is not STALL and evidence.loop is not None:  # a run that is stuck must not be asked for more
            for name, more in _dear_facts(evidence, kind, facts, folder):
                facts[name] = more
                beat()
            _write(folder, facts)
        if first := (facts.get("norms") or {}).get("first_not_finite"):
            say_here(f"first array that is not finite: {first['array']} ({first['meaning']})")
        return folder / PAGE_FILE
    except Exception as problem:
        say_here(f"the bundle about this failure could not be written: {_words(problem)}")
        return None


def take_part(evidence: Evidence, error: BaseException | None) -> None:
    """What the others do while process 0 writes of a loss that is not finite: the norms are of everybody's shards."""
    from train.failure_replay import state_around

    try:
        _settle(evidence, NON_FINITE)
        if evidence.loop is not None:
            state_around(evidence, evidence.suspects(error).start, None, 0, 0.0)
    except Exception as problem:
        say_here(f"the norms for the bundle could not be taken: {_words(problem)}")


def _settle(evidence: Evidence, kind: Kind) -> None:
    """A checkpoint that is being written in the background may be the last good one. All processes wait together, or
    none: of several, they are known to be here only where each of them sees the same loss."""
    if kind is NON_FINITE or together.processes() == 1:
        try:
            evidence.wait_for_saves()
        except Exception as problem:
            say_here(f"the save that was going on has failed too: {_words(problem)}")


def _cheap_facts(evidence: Evidence, kind: Kind, error: BaseException | None, folder: Path) -> dict[str, Any]:
    """What takes neither a device nor data."""
    from train import failure_facts as machine

    run, suspects = evidence.run, evidence.suspects(error)
    step = suspects.start if suspects else None
    history = read_history(run.path)
    checkpoint, holds = evidence.last_good(step)
    facts = {
        "kind": kind.name,
        "title": kind.title,
        "exit_code": kind.exit_code,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "run": {"run_id": run.run_id, "path": str(run.path), "variant": run.variant, "config_hash": run.config_hash},
        "step": step,
        "last_suspect": suspects[-1] if suspects else None,
        "total_steps": evidence.config.trainer.steps,
        "while": evidence.doing,
        "message": _words(error) if error else "",
        "traceback": "".join(traceback.format_exception(error)) if error else "",
        "checkpoint": checkpoint,
        "checkpoint_step": holds,
        "commands": {
            "resume": run.resume_command,
            "reproduce": machine.reproduce_command(run, folder / "again", checkpoint),
        },
        "kernels": collect(history)["kernels"],
        "compiled": {
            name: value for name, value in history.summary.items() if name.startswith(("compile/", "memory/"))
        },
        "rows": [{"step": step} | history.rows[step] for step in sorted(history.rows)[-ROWS:]],
        "config": as_dict(evidence.config),
    }
    for name, find in (("versions", machine.versions), ("devices", machine.devices), ("memory", machine.memory)):
        with _noted(facts, name):
            facts[name] = find()
    if kind is STALL:
        facts["stall"] = _stall(evidence, folder)
        facts["message"] = facts["stall"]["verdict"]
    if kind is OUT_OF_MEMORY:
        with _noted(facts, "held"):
            facts["held"] = _held(evidence, history.summary)
            facts["change_first"] = machine.change_first(evidence.config, facts["held"]["bytes"])
        facts["commands"]["plan"] = machine.plan_command(run)
    return facts


def _held(evidence: Evidence, summary: dict[str, Any]) -> dict[str, Any]:
    from train import failure_facts as machine
    from train.offload import shapes_of

    state = shapes_of(evidence.init) if evidence.state is None else evidence.state
    is_running = evidence.loop is not None
    return {
        "when": "while training" if is_running else "before the first step: refused by the compiler, or its inputs are",
        "bytes": machine.held(state, summary),
        "arrays": machine.largest_arrays(),
    }


def _dear_facts(evidence: Evidence, kind: Kind, facts: dict[str, Any], folder: Path) -> Iterator[tuple[str, Any]]:
    """What takes the loader, or the devices: the batch, and the norms."""
    import numpy as np

    from train import failure_batch
    from train.failure_norms import norms_by_layer
    from train.failure_replay import state_around

    run, loop, config, step = evidence.run, evidence.loop, evidence.config, facts["step"]
    assert loop is not None
    with _noted(facts, "batch"):
        arrays = failure_batch.batch_of(loop.loader, step)
        np.savez(folder / failure_batch.BATCH_FILE, allow_pickle=False, **arrays)
        number = batch_number(step, skipped_ranges(config.data.skip_batches))
        sizes = config.trainer.batch_size, config.model.vocab_size
        yield "batch", failure_batch.described(arrays, number, *sizes, loop.tokenizer_dir)
        skip = f"{run.resume_command} --data.skip-batches {' '.join([*config.data.skip_batches, str(number)])}"
        yield "commands", facts["commands"] | {"skip": skip}
    with _noted(facts, "norms"):
        if kind is NON_FINITE:
            checkpoint, holds = facts["checkpoint"], facts["checkpoint_step"]
            seconds = _seconds_to_replay(facts, step - holds)
            yield "norms", state_around(evidence, step, checkpoint, holds, seconds)
        elif together.processes() > 1:
            raise RuntimeError("they are of all processes' shards, and this one alone failed")
        elif evidence.state is not None:
            of_state = {name: norms_by_layer(getattr(evidence.state, name)) for name in ("params", "opt_state")}
            yield "norms", {"of": f"the state after step {loop.meter.newest_step}", "after": of_state}


def _seconds_to_replay(facts: dict[str, Any], steps: int) -> float:
    """Compiling the gradients takes about as long as the step did."""
    durations = [row["throughput/duration"] for row in facts["rows"] if "throughput/duration" in row]
    return facts["compiled"].get("compile/seconds", 0.0) + steps * (durations[-1] if durations else 0.0)


def _stall(evidence: Evidence, folder: Path) -> dict[str, Any]:
    """Where every thread is, in stacks.txt, and what the loop waits for."""
    import faulthandler

    with open(folder / STACKS_FILE, "w") as file:
        faulthandler.dump_traceback(file, all_threads=True)
    frame = sys._current_frames().get(evidence.watched)
    in_flight = evidence.loop.meter.steps_in_flight() if evidence.loop else range(0)
    steps = f"steps {in_flight.start} to {in_flight[-1]} are dispatched and not complete" if in_flight else ""
    return {
        "minutes": evidence.config.trainer.stall_minutes,
        "verdict": evidence.verdict,
        "in_flight": steps or "every dispatched step is complete: the devices have nothing to do",
        "main_thread": traceback.format_stack(frame) if frame else [],
    }


@contextmanager
def _noted(facts: dict[str, Any], name: str) -> Iterator[None]:
    """What cannot be found is named in the bundle, with the reason, and the rest goes on."""
    try:
        yield
    except Exception as problem:
        facts[name] = None
        facts.setdefault("not_known", {})[name] = _words(problem)


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _new_folder(failures: Path, kind: Kind) -> Path:
    name = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{kind.name}"
    name += "" if together.is_first() else f"-process-{together.process()}"
    number = 1
    while (folder := failures / (f"{name}.{number}" if number > 1 else name)).exists():
        number += 1
    folder.mkdir(parents=True)
    return folder


def _write(folder: Path, facts: dict[str, Any]) -> None:
    write_atomically(folder / JSON_FILE, json.dumps(facts, indent=1, default=str))
    write_atomically(folder / PAGE_FILE, failure_page(facts, read_history(Path(facts["run"]["path"]))))


def _bytes_below(folder: Path) -> int:
    """What is there of checkpoints; files come and go while it looks."""
    sizes = 0
    for directory, _, files in os.walk(folder):
        for name in files:
            try:
                sizes += os.stat(os.path.join(directory, name)).st_size
            except OSError:
                continue
    return sizes
