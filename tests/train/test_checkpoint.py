# SPDX-License-Identifier: Apache-2.0
"""Checkpoints come back bit for bit on any mesh, are saved when they should be, and are refused by another model."""

import json
import logging
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import optax
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
from tests.train.tiny import spoil
from train.checkpoint import (
    CheckpointConfig,
    Checkpoints,
    TensorStoreIO,
    restore_latest_or_initialize,
    save_step_checkpoint,
)
from train.checkpoint_arrays import CheckpointMismatchError

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


def test_of_the_permanent_ones_as_many_stay_as_were_asked_for(tmp_path):
    cfg = CheckpointConfig(every=2, temporary_minutes=ALWAYS, keep_temporary=1, keep_last=2)
    checkpoints = Checkpoints(tmp_path, cfg, metadata=describe)
    for step in range(1, 8):
        checkpoints.on_step(make_state(ONE(), step), step)
    checkpoints.save(make_state(ONE(), 7), 7)  # temporary until now
    checkpoints.wait()
    assert names(tmp_path) == ["step-6", "step-7"]
    # The next run counts what it finds.
    checkpoints = Checkpoints(tmp_path, cfg, metadata=describe, resumed=restore(tmp_path)[1])
    checkpoints.save(make_state(ONE(), 8), 8)
    checkpoints.wait()
    assert names(tmp_path) == ["step-7", "step-8"]


@pytest.mark.parametrize("knobs", [{"keep_temporary": 1}, {"keep_last": 1}])
def test_a_checkpoint_that_is_known_to_be_good_makes_no_room_for_a_newer_one_that_is_not(tmp_path, knobs):
    """Counted among those that stay, the damaged step 6 cost the run its only good checkpoint, the one just saved."""
    temporary = "keep_temporary" in knobs
    cfg = CheckpointConfig(every=100 if temporary else 1, temporary_minutes=ALWAYS, **knobs)
    for step in (3, 6):
        checkpoints = Checkpoints(tmp_path / str(step), cfg, metadata=describe)
        checkpoints.on_step(make_state(ONE(), step), step)
        checkpoints.wait()
        (tmp_path / str(step) / f"step-{step}").rename(tmp_path / f"step-{step}")
    spoil(tmp_path / "step-6", "flipped")
    resumed = restore(tmp_path)[1]
    assert resumed["step"] == 3
    checkpoints = Checkpoints(tmp_path, cfg, metadata=describe, resumed=resumed)
    for step in (4, 5):
        checkpoints.on_step(make_state(ONE(), step), step)
    checkpoints.wait()
    assert [name for name in names(tmp_path) if name.startswith("step")] == ["step-5", "step-6"]
    assert restore(tmp_path)[1]["step"] == 5


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


@pytest.mark.parametrize("knobs", [{"every": 0}, {"temporary_minutes": -1}, {"keep_temporary": 0}, {"keep_last": -1}])
def test_config_says_what_it_wants(knobs):
    name, value = next(iter(knobs.items()))
    with pytest.raises(ValueError, match=rf"CheckpointConfig: .*{name}={value}.* at least"):
        CheckpointConfig(**knobs)


def test_config_needs_neither_jax_nor_levanter():
    code = "import sys, train.checkpoint; assert not {'jax', 'levanter', 'fsspec'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
