# SPDX-License-Identifier: Apache-2.0
"""Damaged checkpoints are refused with a reason; a save can fail or be killed at any moment."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.train.checkpointed import (
    ALWAYS,
    EIGHT,
    ONE,
    assert_bitwise_equal,
    describe,
    make_state,
    names,
    restore,
    shape_of,
    write,
)
from train.checkpoint import (
    CheckpointConfig,
    Checkpoints,
    NoUsableCheckpointError,
    TensorStoreIO,
    restore_latest_or_initialize,
)
from train.checkpoint_arrays import checksums
from train.checkpoint_io import CheckpointWriteError

LIVES = 4


def largest_file(checkpoint: Path) -> Path:
    return max((checkpoint / "d").rglob("*"), key=lambda path: path.stat().st_size)


# --- corruption


def truncate(checkpoint: Path):
    os.truncate(largest_file(checkpoint), largest_file(checkpoint).stat().st_size // 2)


def delete(checkpoint: Path):
    largest_file(checkpoint).unlink()


def flip_one_bit(checkpoint: Path):
    file = largest_file(checkpoint)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def metadata_is(text: str, checkpoint: Path):
    (checkpoint / "metadata.json").write_text(text)


def other_dtype(checkpoint: Path):
    """A directory whose metadata.json is of another checkpoint: TensorStore would load it without a word."""
    file = checkpoint / "metadata.json"
    true = json.loads(file.read_text())
    write(checkpoint / "other", 9, width=32)
    (checkpoint / "other" / "step-9" / "metadata.json").unlink()
    for path in (checkpoint / "d").iterdir():
        path.unlink()
    for path in (checkpoint / "other" / "step-9").iterdir():
        path.rename(checkpoint / path.name) if path.is_file() else None
    for path in (checkpoint / "other" / "step-9" / "d").iterdir():
        path.rename(checkpoint / "d" / path.name)
    file.write_text(json.dumps(true))


CORRUPTIONS = {
    "truncated": (truncate, "Error: "),
    "deleted": (delete, "Error: "),
    "bit flip": (flip_one_bit, r"1 of \d+ arrays are not what was saved \(checksum\): "),
    "other arrays": (
        other_dtype,
        r"params/w is \[\[4, 64, 32\], 'float32'\] on disk, and metadata.json says \[\[4, 64, 64\]",
    ),
    "metadata empty": (partial(metadata_is, ""), "metadata.json is not JSON"),
    "metadata cut": (partial(metadata_is, '{"step": 4, "spe'), "metadata.json is not JSON"),
    "metadata garbage": (partial(metadata_is, "\0\xff"), "metadata.json is not JSON"),
    "metadata foreign": (
        partial(metadata_is, '{"step": 4, "timestamp": "x"}'),
        "metadata.json has no is_temporary, specs",
    ),
    "metadata a list": (partial(metadata_is, "[4]"), "metadata.json has no step, timestamp, is_temporary, specs"),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_corrupt_checkpoint_is_refused_with_the_reason_and_an_older_one_used(tmp_path, caplog, corruption):
    corrupt, reason = CORRUPTIONS[corruption]
    write(tmp_path, 2, 4)
    corrupt(tmp_path / "step-4")
    found, metadata = restore(tmp_path)
    assert metadata["step"] == 2
    assert_bitwise_equal(found, make_state(ONE(), 2))
    assert caplog.text.count("refusing checkpoint") == 1
    (tmp_path / "step-2").rename(tmp_path / "hidden")
    with pytest.raises(NoUsableCheckpointError, match=f"(?s)none can be used:\n  {tmp_path}/step-4: .*{reason}"):
        restore(tmp_path)
    # A run that trains over it again moves the refused checkpoint away and writes its own.
    write(tmp_path, 4)
    assert_bitwise_equal(restore(tmp_path)[0], make_state(ONE(), 4))
    assert len([name for name in names(tmp_path) if name.startswith("replaced-step-4-")]) == 1


def test_checksums_are_the_same_for_every_sharding_and_see_every_change():
    array = np.random.default_rng(0).standard_normal((8, 16, 4)).astype(np.float32)
    shardings = [NamedSharding(EIGHT(), PartitionSpec(*spec)) for spec in [(), ("data",), (("data", "model"),)]]
    assert len({checksums({"x": jax.device_put(array, s)})["x"] for s in shardings}) == 1

    def changed(edit) -> int:
        copy = array.copy().view(np.uint32)
        edit(copy)
        return checksums({"x": jnp.asarray(copy.view(np.float32))})["x"]

    def flip_two_signs(bits):  # a weighted sum of the bits would not see it
        bits[0, 0, 0] ^= 1 << 31
        bits[5, 3, 1] ^= 1 << 31

    def swap(bits):
        bits[0, 0, 0], bits[0, 0, 1] = bits[0, 0, 1].copy(), bits[0, 0, 0].copy()

    def zero_a_page(bits):
        bits.reshape(-1)[128:256] = 0

    sums = [changed(edit) for edit in (lambda bits: None, flip_two_signs, swap, zero_a_page)]
    assert len(set(sums)) == 4
    for dtype in (jnp.bool_, jnp.int8, jnp.bfloat16, jnp.int32):
        assert checksums({"x": jnp.ones(3, dtype)}) != checksums({"x": jnp.zeros(3, dtype)})


# --- donation, disks, kills


@pytest.mark.parametrize("mesh", [ONE, EIGHT])
def test_buffers_may_be_donated_as_soon_as_on_step_returns(tmp_path, mesh):
    """The next step writes its result over the old state while that is still on its way to the disk."""
    state, expected = (make_state(mesh(), 1, width=8192) for _ in range(2))  # 8 MB of w
    flip = jax.jit(lambda x: jax.tree.map(lambda leaf: -leaf, x), donate_argnums=0)
    jax.block_until_ready(flip(make_state(mesh(), 1, width=8192).params))  # compiled before it is a race
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every=1), metadata=describe)
    checkpoints.on_step(state, 1)
    jax.block_until_ready(flip(state.params))
    checkpoints.wait()
    shape = shape_of(mesh(), width=8192)
    found, _ = restore_latest_or_initialize([tmp_path], shape, mesh=mesh(), init=pytest.fail)
    assert_bitwise_equal(found, expected)


@pytest.mark.parametrize("notice", ["on_step", "wait", "save"])
def test_disk_errors_in_the_background_are_raised_once(tmp_path, notice):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every=2, temporary_minutes=0), metadata=describe)
    checkpoints.save(make_state(ONE(), 2), 2)
    checkpoints.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # a disk that is full
    try:
        checkpoints.save(make_state(ONE(), 4), 4)
        checkpoints._io._manager._thread.join()  # until it has met the limit
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    state = make_state(ONE(), 5)
    call = {
        "on_step": lambda: checkpoints.on_step(state, 5),
        "save": lambda: checkpoints.save(state, 5),
        "wait": checkpoints.wait,
    }[notice]
    with pytest.raises(
        CheckpointWriteError, match=f"checkpoint {tmp_path}/step-4 could not be written: .*File too large"
    ):
        call()
    checkpoints.wait()
    assert restore(tmp_path)[1]["step"] == 2
    checkpoints.save(make_state(ONE(), 4), 4)  # whoever goes on may save the step again
    checkpoints.wait()
    assert_bitwise_equal(restore(tmp_path)[0], make_state(ONE(), 4))


def test_a_disk_slower_than_the_saves_is_waited_for_aloud_and_nothing_is_skipped(tmp_path, caplog, monkeypatch):
    """The write of step 1 does not end before step 2 has said that it waits."""

    def commit(self):
        while "step 2 is to be saved" not in caplog.text:
            time.sleep(0.001)
        self._committed = True

    monkeypatch.setattr(TensorStoreIO, "_on_commit", commit)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every=1), metadata=describe)
    for step in (1, 2):
        checkpoints.on_step(make_state(ONE(), step), step)
    checkpoints.save(make_state(ONE(), 2), 2)  # of the same step: no other to wait for
    checkpoints.wait()
    assert f"step 2 is to be saved, and checkpoint {tmp_path}/step-1 is still being written: waiting." in caplog.text
    assert caplog.text.count("is to be saved") == 1
    assert names(tmp_path) == ["step-1", "step-2"]


def test_unwritable_root_is_an_error_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    root = tmp_path / "file" / "checkpoints"
    assert restore(root) == ("new", None)
    with pytest.raises(
        NotADirectoryError, match=f"checkpoints cannot be written to {root}: .*Choose another output path"
    ):
        Checkpoints(root, CheckpointConfig(), metadata=describe)


def test_killed_at_any_moment_the_next_run_goes_on(tmp_path):
    """kill -9 while a checkpoint is being written, again and again: what is restored is always whole."""
    command = [sys.executable, "-W", "ignore", "-m", __name__, str(tmp_path)]
    root = Path(__file__).parents[2]
    output = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert output.returncode == 0, output.stdout + output.stderr
    lives = [tuple(map(int, line.split())) for line in output.stdout.splitlines()]
    assert len(lives) == LIVES
    for (_, last), (resumed, _) in pairwise(lives):
        # on_step(last) had returned, so the checkpoint before it was complete, and may never be lost.
        assert resumed >= last - 1, lives
    assert lives[-1][1] >= LIVES


def train_until_killed(root: Path, progress: int) -> None:
    """One life of a run: restores, checks what it restored, and saves at every step; never returns."""
    mesh = ONE()
    state, resumed = restore_latest_or_initialize(
        [root], shape_of(mesh, width=1024), mesh=mesh, init=lambda: make_state(mesh, 0, width=1024)
    )
    step = int(state.step)
    assert_bitwise_equal(state, make_state(mesh, step, width=1024))
    cfg = CheckpointConfig(every=5, temporary_minutes=ALWAYS, keep_temporary=1)
    checkpoints = Checkpoints(root, cfg, metadata=describe, resumed=resumed)
    while True:
        os.write(progress, f"{step}\n".encode())
        step += 1
        checkpoints.on_step(make_state(mesh, step, width=1024), step)


def kill_again_and_again(root: Path) -> None:
    """Prints from where to where each life came. Forking is safe: jax has not computed yet."""
    from train import lev

    _ = lev.save_checkpoint
    rng = random.Random(0)
    for _ in range(LIVES):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                train_until_killed(root, writer)
            finally:
                os._exit(1)
        os.close(writer)
        with os.fdopen(reader) as steps:
            resumed, first = steps.readline(), steps.readline()  # now its first save is under way
            time.sleep(rng.uniform(0.0, 0.5))
            os.kill(child, signal.SIGKILL)
            last = [first, *steps][-1]
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            sys.exit("a life ended before it was killed: see its message above")
        print(resumed.strip(), last.strip())


if __name__ == "__main__":
    kill_again_and_again(Path(sys.argv[1]))
