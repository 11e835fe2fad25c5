# SPDX-License-Identifier: Apache-2.0
"""Checkpoints come back bit for bit on any mesh, or are refused with a reason; a save can be killed at any moment."""

import dataclasses
import json
import logging
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

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from train.checkpoint import (
    CheckpointConfig,
    Checkpoints,
    CheckpointWriteError,
    NoUsableCheckpointError,
    TensorStoreIO,
    restore_latest_or_initialize,
    save_step_checkpoint,
)
from train.checkpoint_arrays import CheckpointMismatchError, checksums
from train.mesh import AXES

ALWAYS = 1e-9  # temporary_minutes: a temporary checkpoint at every step
LIVES = 4


class Params(eqx.Module):
    w: jax.Array
    half: jax.Array
    norm: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    step: jax.Array
    params: Params
    opt_state: optax.OptState
    ema_params: Params | None
    training_key: jax.Array


def mesh_of(data: int, model: int) -> Mesh:
    devices = np.array(jax.devices()[: data * model]).reshape(1, data, 1, 1, model)
    return Mesh(devices, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


ONE, EIGHT = partial(mesh_of, 1, 1), partial(mesh_of, 4, 2)


def make_state(mesh: Mesh, step: int, *, width: int = 64, optimizer=optax.adamw, ema: bool = True) -> State:
    """Random arrays that depend on `step` alone, sharded as a model's are."""
    rng = np.random.default_rng(step)

    def place(shape, dtype, *spec):
        array = jnp.asarray(rng.standard_normal(shape), dtype)
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))

    params = Params(
        w=place((4, 64, width), jnp.float32, None, "data", "model"),
        half=place((width, 16), jnp.bfloat16, ("data", "model")),
        norm=place((width,), jnp.float32),
    )
    with jax.set_mesh(mesh):
        opt_state = jax.tree.map(lambda x: x + step, optimizer(1e-3).init(params))
        key = jax.random.fold_in(jax.random.key(7), step)
    whole = NamedSharding(mesh, PartitionSpec())
    count = jax.device_put(jnp.asarray(step, jnp.int32), whole)
    return State(count, params, opt_state, jax.tree.map(lambda x: 2 * x, params) if ema else None, key)


def shape_of(mesh: Mesh, **options) -> State:
    with jax.set_mesh(mesh):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make_state(mesh, 0, **options)
        )


def as_numpy(state: State) -> list[np.ndarray]:
    words = jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, state)
    return [np.array(leaf) for leaf in jax.tree.leaves(words)]


def assert_bitwise_equal(found: State, expected: State):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(as_numpy(found), as_numpy(expected), strict=True):
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()


def describe(step: int) -> dict:
    return {"run_id": "test", "config_hash": "abc123", "data_offset": 8 * step}


def write(root: Path, *steps: int, mesh: Mesh | None = None, **options) -> None:
    checkpoints = Checkpoints(root, CheckpointConfig(temporary_minutes=0), metadata=describe)
    for step in steps:
        checkpoints.save(make_state(mesh or ONE(), step, **options), step)
    checkpoints.wait()


def restore(root: Path, mesh: Mesh | None = None, **options):
    mesh = mesh or ONE()
    return restore_latest_or_initialize([root], shape_of(mesh), mesh=mesh, init=lambda: "new", **options)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def largest_file(checkpoint: Path) -> Path:
    return max((checkpoint / "d").rglob("*"), key=lambda path: path.stat().st_size)


# --- there and back


@pytest.mark.parametrize(("writer", "reader"), [(ONE, ONE), (EIGHT, EIGHT), (ONE, EIGHT), (EIGHT, ONE)])
def test_state_comes_back_bit_for_bit_on_another_mesh(tmp_path, writer, reader, caplog):
    caplog.set_level(logging.INFO, "train")
    state = make_state(writer(), 3)
    write(tmp_path, 3, mesh=writer())
    mesh = reader()
    found, metadata = restore(tmp_path, mesh)
    assert_bitwise_equal(found, state)
    wanted = shape_of(mesh)
    shardings = jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim), found, wanted)
    assert all(jax.tree.leaves(shardings))
    assert found.params.w.sharding == NamedSharding(mesh, PartitionSpec(None, "data", "model"))
    assert f"resuming from step 3: {tmp_path}/step-3 (saved at {metadata['timestamp']})" in caplog.text
    with jax.set_mesh(mesh):  # a key that merely looks like one would fail here
        jax.random.split(found.training_key)


def test_key_of_another_implementation_comes_back(tmp_path):
    state = {"key": jax.random.key(1, impl="rbg")}
    io = TensorStoreIO()
    save_step_checkpoint(io, tmp_path, state, 1, metadata={})
    io.wait()
    with jax.set_mesh(ONE()):
        found = io.restore_latest(str(tmp_path), jax.eval_shape(lambda: state))
    assert jax.random.key_impl(found["key"]) == "rbg"
    assert jax.random.key_data(found["key"]).tolist() == jax.random.key_data(state["key"]).tolist()


def test_shape_from_eval_shape_is_enough(tmp_path):
    """The training loop has no arrays yet when it restores: its shapes name an abstract mesh, without devices."""
    mesh = EIGHT()
    write(tmp_path, 2, mesh=mesh)
    with jax.set_mesh(mesh):
        shape = jax.eval_shape(lambda state: state, make_state(mesh, 0))
        found, _ = restore_latest_or_initialize([tmp_path], shape, mesh=mesh, init=pytest.fail)
    assert_bitwise_equal(found, make_state(mesh, 2))


def test_metadata_says_whose_checkpoint_it_is(tmp_path):
    write(tmp_path, 5)
    metadata = json.loads((tmp_path / "step-5" / "metadata.json").read_text())
    assert {k: metadata[k] for k in describe(5)} == describe(5)
    assert (metadata["step"], metadata["is_temporary"]) == (5, False)
    assert metadata["specs"]["params/half"] == [[64, 16], "bfloat16"]
    assert metadata["specs"]["training_key"] == [[], "key<fry>"]
    assert metadata["checksums"].keys() == metadata["specs"].keys()
    assert metadata["versions"]["jax"] == jax.__version__


def test_a_root_may_be_one_checkpoint_and_the_newest_of_all_roots_wins(tmp_path):
    write(tmp_path / "a", 2, 4)
    write(tmp_path / "b", 3)
    assert restore(tmp_path / "a" / "step-2")[1]["step"] == 2
    roots = [tmp_path / "b", tmp_path / "a", tmp_path / "absent"]
    _, metadata = restore_latest_or_initialize(roots, shape_of(ONE()), mesh=ONE(), init=pytest.fail)
    assert metadata["path"] == str(tmp_path / "a" / "step-4")


def test_none_found(tmp_path, caplog):
    caplog.set_level(logging.INFO, "train")
    assert restore(tmp_path) == ("new", None)
    assert f"no checkpoint under {tmp_path}: training starts from scratch" in caplog.text
    with pytest.raises(FileNotFoundError, match=f"load_checkpoint is set, .* under {tmp_path}: no directory step-<n>"):
        restore(tmp_path, require=True)


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


# --- another model


def test_another_model_is_an_error_that_names_the_arrays(tmp_path):
    write(tmp_path, 2, width=32)
    write(tmp_path, 4)
    write(tmp_path, 6, width=32)
    with pytest.raises(CheckpointMismatchError) as raised:
        restore(tmp_path)
    message = str(raised.value)
    assert "step-6 is of another model or optimizer: 12 of 15 arrays differ" in message
    assert "ema_params/half: bfloat16[32, 16] there, bfloat16[64, 16] here" in message
    assert message.count("there,") == 5


def test_another_optimizer_is_an_error(tmp_path):
    write(tmp_path, 2, optimizer=partial(optax.sgd, momentum=0.9))
    with pytest.raises(ValueError, match=r"opt_state/0/count: nothing there, int32\[\] here"):
        restore(tmp_path)


def test_ema_that_was_not_saved_is_an_error(tmp_path):
    write(tmp_path, 2, ema=False)
    with pytest.raises(ValueError, match=r"3 of 15 arrays differ\n  ema_params/half: nothing there"):
        restore(tmp_path)


def test_a_leaf_that_would_not_be_saved_is_an_error(tmp_path):
    with pytest.raises(TypeError, match=r"lr is of type float\. Only arrays are saved"):
        save_step_checkpoint(TensorStoreIO(), tmp_path, {"lr": 0.1}, 1, metadata={})
    state = {"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}
    with pytest.raises(ValueError, match="2 arrays have only 1 names"):
        save_step_checkpoint(TensorStoreIO(), tmp_path, state, 1, metadata={})


# --- when to save, and what stays


def test_permanent_ones_stay_and_the_newest_temporary_ones(tmp_path):
    cfg = CheckpointConfig(every=4, temporary_minutes=ALWAYS, keep_temporary=2)
    checkpoints = Checkpoints(tmp_path, cfg, metadata=describe)
    for step in range(1, 8):
        checkpoints.on_step(make_state(ONE(), step), step)
    checkpoints.wait()
    assert names(tmp_path) == ["step-4", "step-6", "step-7"]
    checkpoints.save(make_state(ONE(), 7), 7)  # the end of the run: what is there stays, without a second write
    checkpoints.wait()
    assert json.loads((tmp_path / "step-7" / "metadata.json").read_text())["is_temporary"] is False
    # The next run takes over the temporary ones that it finds.
    state, resumed = restore(tmp_path)
    assert_bitwise_equal(state, make_state(ONE(), 7))
    checkpoints = Checkpoints(tmp_path, cfg, metadata=describe, resumed=resumed)
    checkpoints.save(state, 7)
    for step in (9, 10):
        checkpoints.on_step(make_state(ONE(), step), step)
    checkpoints.wait()
    assert names(tmp_path) == ["step-10", "step-4", "step-7", "step-9"]


def test_nothing_is_saved_before_its_time(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every=100, temporary_minutes=60), metadata=describe)
    checkpoints.on_step(make_state(ONE(), 1), 1)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every=100, temporary_minutes=0), metadata=describe)
    checkpoints.on_step(make_state(ONE(), 2), 2)
    checkpoints.wait()
    assert names(tmp_path) == []


def test_unfinished_saves_are_removed_and_nothing_else(tmp_path, caplog):
    write(tmp_path, 2)
    for name in ("step-3/d", "step-x", "step-4-old", "notes"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "step-5").write_text("a file")
    assert restore(tmp_path)[1]["step"] == 2
    assert f"ignoring {tmp_path}/step-3: it has no metadata.json" in caplog.text
    Checkpoints(tmp_path, CheckpointConfig(), metadata=describe)
    assert f"removing {tmp_path}/step-3: it has no metadata.json, so its save never finished" in caplog.text
    assert names(tmp_path) == ["notes", "step-2", "step-4-old", "step-5", "step-x"]


@pytest.mark.parametrize("knobs", [{"every": 0}, {"temporary_minutes": -1}, {"keep_temporary": 0}])
def test_config_says_what_it_wants(knobs):
    name, value = next(iter(knobs.items()))
    with pytest.raises(ValueError, match=rf"CheckpointConfig: .*{name}={value}.* at least"):
        CheckpointConfig(**knobs)


def test_config_needs_neither_jax_nor_levanter():
    code = "import sys, train.checkpoint; assert not {'jax', 'levanter', 'fsspec'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


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
        time.sleep(0.5)
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
