# SPDX-License-Identifier: Apache-2.0
"""States for the tests of checkpoints: made of numbers that tell one array from another, saved, read and compared."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from train.checkpoint import TensorStoreIO, restore_latest_or_initialize, save_step_checkpoint


def write(root: Path, state) -> dict:
    """Saves `state` as step 1 of `root`; its metadata."""
    io = TensorStoreIO()
    save_step_checkpoint(io, root, state, 1, metadata={})
    io.wait()
    return json.loads((root / "step-1/metadata.json").read_text())


def read(root: Path, shape, mesh):
    return restore_latest_or_initialize([root], shape, mesh=mesh, init=lambda: pytest.fail("not restored"))[0]


def random_like(shape, mesh):
    """Arrays of the shapes and PartitionSpecs of `shape`, each with numbers of its own; keys are keys."""
    rng = np.random.default_rng(0)

    def fill(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            array = jax.random.split(jax.random.key(rng.integers(99)), leaf.shape)
        else:
            array = jnp.asarray(rng.integers(-(10**6), 10**6, leaf.shape), leaf.dtype)
        return jax.device_put(array, NamedSharding(mesh, spec_of(leaf)))

    return jax.tree.map(fill, shape)


def leaves_of(state) -> dict[str, np.ndarray]:
    """Every leaf under its own place in the tree, keys as their words."""
    words = jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, state)
    found = jax.tree_util.tree_leaves_with_path(words)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.array(leaf) for path, leaf in found}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]):
    assert found.keys() == expected.keys()
    for name, leaf in found.items():
        assert (leaf.shape, leaf.dtype) == (expected[name].shape, expected[name].dtype), name
        assert leaf.tobytes() == expected[name].tobytes(), name


def assert_placed(found, wanted, mesh):
    """Every leaf has the PartitionSpec that it would be born with, on `mesh`, in the devices' own memory."""
    for leaf, shape in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec_of(shape)), leaf.ndim)
        assert leaf.sharding.memory_kind == jax.devices()[0].default_memory().kind


def spec_of(leaf) -> PartitionSpec:
    return leaf.sharding.spec if isinstance(leaf.sharding, NamedSharding) else PartitionSpec()
