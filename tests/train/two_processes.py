# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.train.two_processes FOLDER`: checkpoints of two processes with two devices each, for real.

The processes of each stage are forked from this one, which has imported everything and started no jax backend; they
meet at a port of this machine, and each holds its own shards only. Prints one JSON object: {stage: [an answer from
each process]}; an answer is what the stage returned, or the error that it ended with.
Its environment is that of `test_two_processes.py`, which runs it.
"""

import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.train.checkpointed import describe
from tests.train.tiny import spoil
from train import lev
from train.checkpoint import CheckpointConfig, Checkpoints, restore_latest_or_initialize
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
    checkpoints = Checkpoints(root, CheckpointConfig(temporary_minutes=0), metadata=describe)
    checkpoints.save(make(3, mesh), 3)
    checkpoints.wait()
    return "saved"


def restore(root: Path, mesh: Mesh) -> str:
    """Whether every shard that this process holds has the bits that were saved."""
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


def answer(stage: Callable[[Path, Mesh], str], root: Path, file: Path, processes: int, number: int, port: int) -> None:
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, number)
    mesh = create_mesh(8, model=2)
    with jax.set_mesh(mesh):
        try:
            said = stage(root, mesh)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
    file.write_text(said)
    if processes > 1:
        jax.distributed.shutdown()


def run(folder: Path, stage: Callable, root: Path, processes: int, signals: tuple[int, int] | None = None) -> list[str]:
    """The answers of the processes. signals: (signal, number of the process that gets it), once both are training."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    files = [folder / f"answer-{number}" for number in range(processes)]
    children = [
        forked(partial(answer, stage, root, file, processes, number, port), folder / f"log-{number}")
        for number, file in enumerate(files)
    ]

    def training() -> bool:
        steps = [root / f"process-{number}" for number in range(processes)]
        return all(file.exists() and int(file.read_text() or 0) >= SIGNAL_AFTER for file in steps)

    if signals:
        assert wait_for(children[0], training) is None, (folder / "log-0").read_text()
        os.kill(children[signals[1]], signals[0])
    codes = [wait_for(child) for child in children]
    logs = [(folder / f"log-{number}").read_text() for number in range(processes)]
    said = [file.read_text() if code == 0 else f"exit code {code}" for file, code in zip(files, codes, strict=True)]
    for text, log in zip(said, logs, strict=True):
        print(text, log, sep="\n", file=sys.stderr)
    return said


def main(folder: Path) -> None:
    for name in ("save_checkpoint", "load_checkpoint", "url_to_fs"):
        getattr(lev, name)
    by_two, by_one, spoiled = (folder / name for name in ("by-two", "by-one", "spoiled"))
    found = {
        "two save": run(folder, save, by_two, 2),
        "one reads theirs": run(folder, restore, by_two, 1),
        "two read theirs": run(folder, restore, by_two, 2),
        "one saves": run(folder, save, by_one, 1),
        "two read its": run(folder, restore, by_one, 2),
    }
    shutil.copytree(by_two, spoiled)
    spoil(spoiled / "step-3", "flipped")
    found["one reads a flipped bit"] = run(folder, restore, spoiled, 1)
    found["two read a flipped bit"] = run(folder, restore, spoiled, 2)
    for name, number in (("SIGTERM", 1), ("SIGINT", 0)):
        root = folder / name
        root.mkdir()
        found[name] = run(folder, train, root, 2, (signal.Signals[name], number))
    found["after SIGTERM"] = run(folder, restore, folder / "SIGTERM", 1)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
