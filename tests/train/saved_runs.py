# SPDX-License-Identifier: Apache-2.0
"""A run's folder with one checkpoint in it, as training leaves it, without the training."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax

from tests.train import tiny
from train.checkpoint import Checkpoints, restore_latest_or_initialize
from train.data import prepare
from train.offload import shapes_of
from train.run import Choose, choose, parse
from train.rundir import open_run

STEP = 3


def launch_config(variant: str, run_id: str, *more: str) -> Any:
    """The tiny run's configuration, with an average of the weights."""
    argv = ["--variant", variant, *tiny.flags({"--trainer.ema-beta": 0.9})[1:], "--run-id", run_id, *more]
    chosen, start = choose(argv, Choose())
    return parse(argv, chosen, start, prog="test", description="test")[1]


def init_of(variant: str, config: Any) -> Callable[[], Any]:
    """Makes a state whose average differs from its weights."""
    code = importlib.import_module(f"grug_model.{variant}.train")
    optimizer = config.optimizer.build(config.trainer.steps, matrix_axes=code.matrix_axes)

    @jax.jit
    def init():
        state = code.init_train_state(config.model, optimizer, config.trainer, key=jax.random.key(5))
        if config.trainer.ema_beta is None:
            return state
        return eqx.tree_at(lambda state: state.ema_params, state, jax.tree.map(lambda x: 0.5 * x, state.params))

    return init


def write_run(variant: str, run_id: str, mesh: Any, *more: str) -> Path:
    """The folder of a run that has saved step `STEP`, and nothing else."""
    config = launch_config(variant, run_id, *more)
    run = open_run(variant, config)
    run.write_config(config)
    metadata = run.describe(config, prepare(config.data, lambda _: None))
    with jax.set_mesh(mesh):
        checkpoints = Checkpoints(run.checkpoints, config.checkpoint, metadata=metadata)
        checkpoints.save(init_of(variant, config)(), STEP)
        checkpoints.wait()
    return run.path


def restored(path: Path, variant: str, config: Any, mesh: Any) -> Any:
    """The whole training state of a run, as resuming restores it."""
    with jax.set_mesh(mesh):
        shape = shapes_of(init_of(variant, config))
    return restore_latest_or_initialize([path / "checkpoints"], shape, mesh=mesh, init=lambda: None, require=True)[0]
