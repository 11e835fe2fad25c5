# SPDX-License-Identifier: Apache-2.0
"""A variant's training step, compiled for a TPU topology from shapes alone.

`python -m bench.tpu.step array_stacked v5p:2x2x1 --batch-size 32` does it with the 130M template.
"""

import argparse
import dataclasses
import importlib
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bench.laptop import Example, Mask
from bench.tpu.record import Record, compile_record
from bench.tpu.topology import Topology, tpu_topology

VARIANTS = Path(__file__).parent.parent.parent / "grug_model"


def template(variant: str, *, model: dict[str, Any] | None = None, trainer: dict[str, Any] | None = None) -> Any:
    """The variant's 130M preset, with these fields of its model and its trainer replaced."""
    config = importlib.import_module(f"grug_model.{variant}.launch").PRESETS["130m"]
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **(model or {})),
        trainer=dataclasses.replace(config.trainer, **(trainer or {})),
    )


def step_record(variant: str, config: Any, topology: Topology) -> Record:
    """config: the variant's launch configuration; of it, model, optimizer and trainer are read.

    Raises:
      ValueError: the batch does not divide over the topology's devices.
    """
    train = importlib.import_module(f"grug_model.{variant}.train")
    trainer = config.trainer
    mesh = topology.mesh(model=trainer.model_axis)
    if trainer.batch_size % mesh.shape["data"]:
        raise ValueError(
            f"step_record: batch_size={trainer.batch_size} is not a multiple of the {mesh.shape['data']} devices of"
            f" {topology.name} that share the batch. Choose a multiple of {mesh.shape['data']}."
        )
    optimizer = config.optimizer.build(trainer.steps, matrix_axes=train.matrix_axes)
    with topology.targeted(mesh):
        state = jax.eval_shape(
            lambda: train.init_train_state(config.model, optimizer, trainer, key=jax.random.key(trainer.seed))
        )
        batch = abstract_batch(mesh, trainer.batch_size, trainer.seq_len)
        return compile_record(train.make_train_step(optimizer, trainer), state, batch, topology=topology)


def abstract_batch(mesh: Mesh, batch_size: int, seq_len: int) -> Example:
    """The shapes of a batch, split over `mesh`."""
    sharding = NamedSharding(mesh, P(("replica_dcn", "data"), None))

    def struct(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((batch_size, seq_len), dtype, sharding=sharding)

    return Example(struct(jnp.int32), struct(jnp.float32), Mask((struct(jnp.int32), struct(jnp.int32))))


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the 130M template's training step for a TPU topology.")
    parser.add_argument("variant", choices=sorted(file.parent.name for file in VARIANTS.glob("*/launch.py")))
    parser.add_argument("topology", help="such as v6e or v5p:4x4x4")
    parser.add_argument("--num-layers", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=4096)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    config = template(
        options.variant,
        model={"num_layers": options.num_layers},
        trainer={"batch_size": options.batch_size, "seq_len": options.seq_len},
    )
    try:
        print(step_record(options.variant, config, tpu_topology(options.topology)))
    except (ValueError, ModuleNotFoundError) as error:
        parser.error(str(error))  # its message says what to do; a traceback would hide it


if __name__ == "__main__":
    main()
