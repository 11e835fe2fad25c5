# SPDX-License-Identifier: Apache-2.0
"""The laptop preset's training step on random tokens: what the loop runs, without the loop."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from bench.timing import Compiled
from train.mesh import BATCH_AXES, create_mesh
from train.shapes import Example, Mask


@contextmanager
def laptop_step(variant: str, *, model: Callable[[Any], Any] = lambda cfg: cfg) -> Iterator[tuple[Any, Any, Example]]:
    """(jitted train step, state, batch) of the variant's laptop preset, on its mesh; `model` changes the sizes."""
    launch = importlib.import_module(f"grug_model.{variant}.launch")
    train = importlib.import_module(f"grug_model.{variant}.train")
    config = launch.PRESETS["laptop"]
    cfg, trainer = model(config.model), config.trainer
    optimizer = config.optimizer.build(trainer.steps, matrix_axes=train.matrix_axes)
    with jax.set_mesh(create_mesh(trainer.batch_size)):
        state = jax.jit(lambda key: train.init_train_state(cfg, optimizer, trainer, key=key))(jax.random.key(0))
        yield (
            train.make_train_step(optimizer, trainer),
            state,
            random_batch(trainer.batch_size, trainer.seq_len, cfg.vocab_size),
        )


def random_batch(batch_size: int, seq_len: int, vocab_size: int) -> Example:
    """One document a row."""
    tokens = jax.random.randint(jax.random.key(1), (batch_size, seq_len), 0, vocab_size, jnp.int32)
    tokens = jax.device_put(tokens, P(BATCH_AXES, None))
    segments = jnp.zeros_like(tokens)
    return Example(tokens, jnp.ones_like(tokens, jnp.float32), Mask((segments, segments)))


def repeated(compiled: Compiled, state, batch):
    """A call that takes one step further each time it is made."""

    def step():
        nonlocal state
        state, metrics = compiled.call(state, batch)
        return metrics

    return step
