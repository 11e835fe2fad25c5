# SPDX-License-Identifier: Apache-2.0
"""A small state for the tests of `Checkpoints`, sharded as a model's, and what they do with it again and again."""

import dataclasses
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from train.checkpoint import (
    CheckpointConfig,
    Checkpoints,
    restore_latest_or_initialize,
)
from train.mesh import AXES

ALWAYS = 1e-9  # temporary_minutes: a temporary checkpoint at every step


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
    return sorted(path.name for path in root.iterdir() if path.name != ".writer")  # who writes there: no checkpoint
