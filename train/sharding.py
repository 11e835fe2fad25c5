# SPDX-License-Identifier: Apache-2.0
"""`<run>/sharding.json`: of every array of the training state its shape, dtype, PartitionSpec and bytes on a device."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from train import together
from train.rundir import write_atomically

if TYPE_CHECKING:
    from jax.sharding import Mesh

SHARDING_FILE = "sharding.json"


def write_sharding(folder: Path, state: Any, mesh: "Mesh") -> None:
    """Writes the file, from process 0. state: a pytree of arrays; it is read by nobody, its shardings are."""
    if together.is_first():
        write_atomically(folder / SHARDING_FILE, json.dumps(described(state, mesh), indent=1) + "\n")


def described(state: Any, mesh: "Mesh") -> dict[str, Any]:
    """What the file holds. mesh: the extent of each axis; arrays: path -> facts, what takes most of a device first."""
    arrays = {
        jax.tree_util.keystr(path, simple=True, separator="/"): _facts(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    largest_first = sorted(arrays.items(), key=lambda entry: -entry[1]["bytes_per_device"])
    return {
        "processes": together.processes(),
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "bytes_per_device": sum(facts["bytes_per_device"] for _, facts in largest_first),
        "arrays": dict(largest_first),
    }


def _facts(leaf: jax.Array) -> dict[str, Any]:
    return {
        "shape": list(leaf.shape),
        "dtype": str(leaf.dtype),
        "spec": _spec(leaf),
        "memory": leaf.sharding.memory_kind,
        "bytes_per_device": math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
    }


def _spec(leaf: jax.Array) -> list[Any]:
    """An entry for each axis of the array: null where it is whole, else the mesh's axes that it is split over."""
    spec = getattr(leaf.sharding, "spec", ())
    entries = [list(entry) if isinstance(entry, tuple) else entry for entry in spec]
    return entries + [None] * (len(leaf.shape) - len(entries))
