# SPDX-License-Identifier: Apache-2.0
"""A small state whose bits are known for every step, saved and restored as a run does it."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.checkpoint import CheckpointConfig, Checkpoints, restore_latest_or_initialize
from train.mesh import create_mesh

NAMES = ("averages", "halves", "random_key", "steps_done", "weights")


def values(step: int) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    key = jax.random.fold_in(jax.random.key(7), step)
    weights = jax.random.normal(key, (4, 32, 64))
    half = jax.random.normal(key, (64, 16), jnp.bfloat16)
    return dict(zip(NAMES, (weights / 2, half, key, jnp.int32(step), weights), strict=True))


def as_bytes(state: dict[str, Any]) -> dict[str, bytes]:
    import jax
    import numpy as np

    words = {**state, "random_key": jax.random.key_data(state["random_key"])}
    return {name: np.asarray(array).tobytes() for name, array in words.items()}


def checkpoints(root: Path) -> Checkpoints:
    import jax

    del jax  # its import has set what the first look for devices reads
    return Checkpoints(root, CheckpointConfig(temporary_minutes=0), metadata=lambda step: {"data_offset": 8 * step})


def save(root: Path, *steps: int, before: dict[int, Callable[[], None]] | None = None) -> dict[str, Any]:
    """Saves `steps`, each after what is to be done `before` it. An error is an answer: its type and text."""
    logging.basicConfig(stream=sys.stderr)
    try:
        writes = checkpoints(root)
        for step in steps:
            if before and step in before:
                before[step]()
            writes.save(values(step), step)
            writes.wait()
    except OSError as error:
        return {"error": type(error).__name__, "text": str(error)}
    return {"saved": list(steps)}


def restore(root: Path) -> dict[str, Any]:
    """The step that is restored, and whether every bit of it is right; an error is an answer too."""
    import jax

    logging.basicConfig(stream=sys.stderr)
    mesh = create_mesh(8)
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: values(0))
    try:
        state, metadata = restore_latest_or_initialize([root], shapes, mesh=mesh, init=dict)
    except (OSError, ValueError, RuntimeError) as error:
        return {"error": type(error).__name__, "text": str(error)}
    if metadata is None:
        return {"step": None}
    expected = as_bytes(values(metadata["step"]))
    found = as_bytes(state)
    return {"step": metadata["step"], "wrong": [name for name in NAMES if found[name] != expected[name]]}
