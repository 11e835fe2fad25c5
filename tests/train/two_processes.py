# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.train.two_processes FOLDER`: checkpoints of two processes with two devices each, for real.

The processes are forked from this one, which has imported everything and started no jax backend; they meet at a port of
this machine, each holds its own shards only, and they go through some stages together. Prints one JSON object: {stage:
[an answer from each process]}; an answer is what the stage returned, or the error that it ended with.
Its environment is that of `test_two_processes.py`, which runs it.
"""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.train.checkpointed import describe
from tests.train.tiny import spoil
from train import checkpoint_files, lev
from train.checkpoint import CheckpointConfig, Checkpoints, restore_latest_or_initialize
from train.launch_local import free_port
from train.mesh import create_mesh
from train.prove_resume import forked, wait_for
from train.stopping import Stopped, catch_signals

SPECS = {"half": (("data", "model"),), "key": (), "step": (), "w": (None, "data", "model")}
STEP_SECONDS = 0.05
SIGNAL_AFTER = 4


def values(step: jax.Array) -> dict[str, jax.Array]:
    key = jax.random.fold_in(jax.random.key(7), step)
    half = jax.random.normal(key, (64, 16), jnp.bfloat16)
    return {"half": half, "key": key, "step": step, "w": jax.random.normal(key, (3, 64, 256))}


def shardings(mesh: Mesh) -> dict[str, NamedSharding]:
    return {name: NamedSharding(mesh, PartitionSpec(*spec)) for name, spec in SPECS.items()}


def make(step: int, mesh: Mesh) -> dict[str, jax.Array]:
    return jax.jit(values, out_shardings=shardings(mesh))(np.int32(step))


def save(root: Path, mesh: Mesh) -> str:
    """Where half a checkpoint is in the way, and process 0 is slow to remove it. And whether steps 9 and 10 would be
    saved, too, by the clock of process 0."""
    checkpoints = Checkpoints(root, CheckpointConfig(temporary_minutes=5), metadata=describe)
    (root / "step-3" / "d").mkdir(parents=True, exist_ok=True)
    make_room = checkpoint_files.make_room
    with mock.patch.object(checkpoint_files, "make_room", lambda path: (time.sleep(0.5), make_room(path))):
        checkpoints.save(make(3, mesh), 3)
    checkpoints.wait()
    checkpoints._last_save -= 0 if jax.process_index() else 3600
    return f"saved; due: {[checkpoints._temporary_is_due(step) for step in (9, 10)]}"


def restore(root: Path, mesh: Mesh) -> str:
    """Whether every shard that this process holds has the bits that were saved. Process 1 sees no checkpoint yet, as on
    a disk that is slow to show what others wrote."""
    seen = [] if jax.process_index() else checkpoint_files.find_complete([root])
    with mock.patch.object(checkpoint_files, "find_complete", return_value=seen):
        return read(root, mesh)


def restore_half(root: Path, mesh: Mesh) -> str:
    """Process 1 cannot read what the other can."""

    def read_metadata(path: str):
        if jax.process_index():
            raise OSError("stale file handle")
        return known(path)

    known = checkpoint_files.read_metadata
    with mock.patch.object(checkpoint_files, "read_metadata", read_metadata):
        return read(root, mesh)


def read(root: Path, mesh: Mesh) -> str:
    found = jax.eval_shape(values, np.int32(0))
    wanted = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings(mesh)[n]) for n, x in found.items()}
    state, metadata = restore_latest_or_initialize([root], wanted, mesh=mesh, init=dict)
    assert metadata is not None
    expected = jax.device_get({**jax.jit(values)(np.int32(metadata["step"])), "key": 0})
    assert state["w"].is_fully_addressable == (jax.process_count() == 1)
    for name, array in state.items():
        if name != "key":
            for shard in array.addressable_shards:
                assert np.asarray(shard.data).tobytes() == expected[name][shard.index].tobytes(), name
    return f"step {metadata['step']}, equal"


def train(root: Path, mesh: Mesh) -> str:
    """Steps, until a signal ends it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # where tests run in a shell's background it is ignored
    checkpoints = Checkpoints(root, CheckpointConfig(temporary_minutes=0), metadata=describe)
    with catch_signals():
        try:
            for step in range(1, 1000):
                # Not at the same pace: the one that is ahead and the one that is behind must save the same step.
                time.sleep(STEP_SECONDS * (1 + jax.process_index()))
                (root / f"process-{jax.process_index()}").write_text(str(step))
                checkpoints.on_step(make(step, mesh), step)
        except Stopped as stop:
            return f"{stop}; exit code {stop.exit_code}"
    return "never stopped"


Stage = Callable[[Path, Mesh], str]
Stages = dict[str, tuple[Stage, Path]]


def answer(stages: Stages, file: Path, processes: int, number: int, port: int) -> None:
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, number)
    mesh, said = create_mesh(8, model=2), {}
    with jax.set_mesh(mesh):
        for name, (stage, root) in stages.items():
            try:
                said[name] = stage(root, mesh)
            except Exception as error:
                said[name] = f"{type(error).__name__}: {error}"
    file.write_text(json.dumps(said))
    if processes > 1:
        jax.distributed.shutdown()


def run(folder: Path, processes: int, stages: Stages, signals: tuple[int, int] | None = None) -> dict[str, list[str]]:
    """The answers of the processes. signals: (signal, number of the process that gets it), once both are training."""
    port = free_port()
    files = [folder / f"answer-{number}" for number in range(processes)]
    children = [
        forked(partial(answer, stages, file, processes, number, port), folder / f"log-{number}")
        for number, file in enumerate(files)
    ]

    def training() -> bool:
        [(_, root)] = stages.values()
        steps = [root / f"process-{number}" for number in range(processes)]
        return all(file.exists() and int(file.read_text() or 0) >= SIGNAL_AFTER for file in steps)

    if signals:
        assert wait_for(children[0], training) is None, (folder / "log-0").read_text()
        os.kill(children[signals[1]], signals[0])
    codes = [wait_for(child) for child in children]
    for number in range(processes):
        print((folder / f"log-{number}").read_text(), file=sys.stderr)
    assert codes == [0] * processes, codes
    said = [json.loads(file.read_text()) for file in files]
    return {name: [one[name] for one in said] for name in stages}


def main(folder: Path) -> None:
    for name in ("save_checkpoint", "load_checkpoint", "url_to_fs"):
        getattr(lev, name)
    by_two, by_one, flipped, halved = (folder / name for name in ("by-two", "by-one", "flipped", "halved"))
    found = run(folder, 1, {"one saves": (save, by_one)})
    reading: Stages = {"two read theirs": (restore, by_two), "two read its": (restore, by_one)}
    found |= run(folder, 2, {"two save": (save, by_two), **reading, "one cannot read": (restore_half, by_two)})
    for copy, how in ((flipped, "flipped"), (halved, "truncated")):
        shutil.copytree(by_two, copy)
        spoil(copy / "step-3", how)
    found |= run(folder, 2, {"two read a flipped bit": (restore, flipped), "two read half a file": (restore, halved)})
    for name, number in (("SIGTERM", 1), ("SIGINT", 0)):
        (folder / name).mkdir()
        found |= run(folder, 2, {name: (train, folder / name)}, (signal.Signals[name], number))
    reading = {"one reads theirs": (restore, by_two), "one reads a flipped bit": (restore, flipped)}
    found |= run(folder, 1, reading | {"after SIGTERM": (restore, folder / "SIGTERM")})
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
