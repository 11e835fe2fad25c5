# SPDX-License-Identifier: Apache-2.0
"""A variant's training step, compiled for a TPU topology from shapes alone, and how long it is predicted to take.

    python -m bench.tpu.step array_stacked v5p:2x2x1 --batch-size 32 --predict --picture step.html

does it with the 130M template; `--levanter` with Levanter's attention, loss and stack in the same model.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bench import levanter_grug
from bench.laptop import Example, Mask
from bench.tpu import schedule
from bench.tpu.record import Program, Record, compiling
from bench.tpu.schedule import Schedule
from bench.tpu.timeline import ScalarOperands
from bench.tpu.topology import Topology, tpu_topology
from grug_kernels.attention import AttentionMask
from train.config import Offload
from train.offload import shapes_of

VARIANTS = Path(__file__).parent.parent.parent / "grug_model"


@dataclass(frozen=True)
class StepPrediction:
    """tokens: of all devices in one step. chips: of the topology, which on TPU7x have two devices each."""

    schedule: Schedule
    tokens: int
    chips: int

    @property
    def seconds(self) -> float:
        return self.schedule.predicted_ms / 1e3

    @property
    def tokens_per_second_per_chip(self) -> float:
        return self.tokens / self.seconds / self.chips

    def to_json(self) -> dict[str, Any]:
        rate = {"seconds": self.seconds, "tokens_per_second_per_chip": self.tokens_per_second_per_chip}
        return rate | self.schedule.to_json()

    def __str__(self) -> str:
        rate = f"predicted step {self.seconds * 1e3:.1f} ms, {self.tokens_per_second_per_chip:,.0f} tokens/s per chip"
        return f"{rate}\n{self.schedule.table()}"


def template(variant: str, *, model: dict[str, Any] | None = None, trainer: dict[str, Any] | None = None) -> Any:
    """The variant's 130M preset, with these fields of its model and its trainer replaced."""
    config = importlib.import_module(f"grug_model.{variant}.launch").PRESETS["130m"]
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **(model or {})),
        trainer=dataclasses.replace(config.trainer, **(trainer or {})),
    )


def step_record(variant: str, config: Any, topology: Topology, *, levanter: bool = False) -> Record:
    """config: the variant's launch configuration; of it, model, optimizer and trainer are read.

    levanter: with Levanter's attention, loss and stack in place of ours.

    Raises:
      ValueError: the batch does not divide over the topology's devices.
    """
    with _compiling_step(variant, config, topology, levanter, schedules=False) as (record, _):
        return record


def predicted_step(
    variant: str, config: Any, topology: Topology, *, levanter: bool = False
) -> tuple[Record, StepPrediction | None]:
    """As `step_record`, and what the step is predicted to take; None where it was refused. Compiles once."""
    trainer = config.trainer
    rows = trainer.batch_size // topology.mesh(model=trainer.model_axis).shape["data"]
    tables = {} if levanter else attention_tables(rows, trainer.seq_len)
    with _compiling_step(variant, config, topology, levanter, schedules=True) as (record, program):
        if program is None:
            return record, None
        prediction = schedule.read(record, program, tables)
        return record, StepPrediction(prediction, trainer.batch_size * trainer.seq_len, topology.num_chips)


@contextlib.contextmanager
def _compiling_step(
    variant: str, config: Any, topology: Topology, levanter: bool, schedules: bool
) -> Iterator[tuple[Record, Program | None]]:
    train = importlib.import_module(f"grug_model.{variant}.train")
    trainer = config.trainer
    mesh = topology.mesh(model=trainer.model_axis)
    if trainer.batch_size % mesh.shape["data"]:
        raise ValueError(
            f"step_record: batch_size={trainer.batch_size} is not a multiple of the {mesh.shape['data']} devices of"
            f" {topology.name} that share the batch. Choose a multiple of {mesh.shape['data']}."
        )
    optimizer = config.optimizer.build(trainer.steps, matrix_axes=train.matrix_axes)
    pieces = levanter_grug.in_place_of_ours(variant, tpu=topology.devices) if levanter else contextlib.nullcontext()
    with topology.targeted(mesh), pieces:
        state = shapes_of(
            lambda: train.init_train_state(config.model, optimizer, trainer, key=jax.random.key(trainer.seed))
        )
        batch = abstract_batch(mesh, trainer.batch_size, trainer.seq_len)
        train_step = train.make_train_step(optimizer, trainer)
        with compiling(train_step, state, batch, topology=topology, schedules=schedules) as compiled:
            yield compiled


def attention_tables(rows: int, seq_len: int) -> ScalarOperands:
    """What steers our attention kernels, which is data: of `rows` rows on one device, causal and one document each,
    which is the most work that a packed batch can be. Empty for lengths that are padded; the table then says so."""
    stripes = AttentionMask(causal=True).intervals(rows, seq_len, seq_len).stripes
    if stripes is None or seq_len % 512:
        return {}
    return {(f"attention_{passes}", 0): np.asarray(stripes).reshape(-1) for passes in ("forward", "backward")}


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
    parser.add_argument("--ema-beta", type=float, help="keep an average of the weights")
    parser.add_argument("--offload", choices=get_args(Offload), default="none", help="what lives in the host's memory")
    parser.add_argument("--levanter", action="store_true", help="with Levanter's attention, loss and stack")
    parser.add_argument("--predict", action="store_true", help="also read the schedule: how long a step takes")
    parser.add_argument("--json", type=Path, help="write everything there; implies --predict")
    parser.add_argument("--picture", type=Path, help="write an HTML page of where the time goes; implies --predict")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger(schedule.__name__).setLevel(logging.ERROR)  # the table has the notes
    config = template(
        options.variant,
        model={"num_layers": options.num_layers},
        trainer={
            "batch_size": options.batch_size,
            "seq_len": options.seq_len,
            "ema_beta": options.ema_beta,
            "offload": options.offload,
        },
    )
    prediction = None
    try:
        topology = tpu_topology(options.topology)
        if options.predict or options.json or options.picture:
            record, prediction = predicted_step(options.variant, config, topology, levanter=options.levanter)
        else:
            record = step_record(options.variant, config, topology, levanter=options.levanter)
    except (ValueError, ModuleNotFoundError) as error:
        parser.error(str(error))  # its message says what to do; a traceback would hide it
    print(record)
    if prediction:
        print(prediction)
    if options.json:
        options.json.write_text(json.dumps(record.row() | (prediction.to_json() if prediction else {}), indent=1))
    if options.picture and prediction:
        title = f"{'levanter ' if options.levanter else ''}{options.variant}"
        options.picture.write_text(schedule.page({title: prediction.schedule}, shown=5))


if __name__ == "__main__":
    main()
