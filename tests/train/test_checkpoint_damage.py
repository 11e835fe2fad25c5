# SPDX-License-Identifier: Apache-2.0
"""Damaged checkpoints are refused with a reason; a save can fail. Kills are in bench/faults and test_resume.py."""

import json
import os
import resource
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.train.checkpointed import (
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
