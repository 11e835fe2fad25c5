# SPDX-License-Identifier: Apache-2.0
"""A variant's training step, compiled for a TPU topology from shapes alone, and how long it is predicted to take."""

import contextlib
import dataclasses
import importlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

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
from bench.tpu.topology import Topology
from grug_kernels.attention import AttentionMask, pallas_tpu
from grug_kernels.attention.tpu_backward_blocks import BackwardBlocks
from grug_kernels.attention.tpu_plan import backward_plan
from grug_kernels.dispatch import UnsupportedError
from train.mesh import BATCH_AXES, batch_shards
from train.offload import shapes_of

log = logging.getLogger(__name__)


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
    preset = importlib.import_module(f"grug_model.{variant}.launch").PRESETS["130m"]
    return replaced(preset, model=model or {}, trainer=trainer or {})


def replaced(config: Any, *, model: Mapping[str, Any], trainer: Mapping[str, Any]) -> Any:
    """The launch configuration with these fields of its model and its trainer replaced."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **model),
        trainer=dataclasses.replace(config.trainer, **trainer),
    )


def mesh_of(trainer: Any, topology: Topology) -> Mesh:
    """That of a run with this `GrugTrainerConfig`."""
    return topology.mesh(expert=trainer.expert_axis, model=trainer.model_axis)


def step_record(variant: str, config: Any, topology: Topology, *, levanter: bool = False) -> Record:
    """config: the variant's launch configuration; of it, model, optimizer and trainer are read.

    levanter: with Levanter's attention, loss and stack in place of ours.

    Raises:
      ValueError: the batch does not divide over the topology's devices.
    """
    with compiling_step(variant, config, topology, levanter, schedules=False) as (record, _):
        return record


def predicted_step(
    variant: str,
    config: Any,
    topology: Topology,
    *,
    levanter: bool = False,
    say: Callable[[str], None] = lambda stage: None,
) -> tuple[Record, StepPrediction | None]:
    """As `step_record`, and what the step is predicted to take; None where it was refused, or where its schedule cannot
    be read, which is warned of. Compiles once.

    say: is told each stage as it begins.
    """
    trainer = config.trainer
    rows = trainer.batch_size // batch_shards(mesh_of(trainer, topology))
    tables = {} if levanter else attention_tables(rows, trainer.seq_len, _backward_blocks(config, topology))
    with compiling_step(variant, config, topology, levanter, schedules=True, say=say) as (record, program):
        if program is None:
            return record, None
        say("read the schedule")
        try:
            prediction = schedule.read(record, program, tables)
        except ValueError as error:  # libtpu has kernels of its own that the reader does not know: ragged_dot's
            log.warning("no time is predicted for %s: %s", variant, error)
            return record, None
        return record, StepPrediction(prediction, trainer.batch_size * trainer.seq_len, topology.num_chips)


@contextlib.contextmanager
def compiling_step(
    variant: str,
    config: Any,
    topology: Topology,
    levanter: bool,
    schedules: bool,
    say: Callable[[str], None] = lambda stage: None,
) -> Iterator[tuple[Record, Program | None]]:
    """As `step_record`, with the program; see `record.compiling`."""
    train = importlib.import_module(f"grug_model.{variant}.train")
    trainer = config.trainer
    mesh = mesh_of(trainer, topology)
    if trainer.batch_size % (shards := batch_shards(mesh)):
        raise ValueError(
            f"step_record: batch_size={trainer.batch_size} is not a multiple of the {shards} devices of"
            f" {topology.name} that share the batch. Choose a multiple of {shards}."
        )
    optimizer = config.optimizer.build(trainer.steps, matrix_axes=train.matrix_axes)
    pieces = levanter_grug.in_place_of_ours(variant, tpu=topology.devices) if levanter else contextlib.nullcontext()
    with topology.targeted(mesh), pieces:
        state = abstract_state(variant, config, topology)
        batch = abstract_batch(mesh, trainer.batch_size, trainer.seq_len)
        train_step = train.make_train_step(optimizer, trainer)
        with compiling(train_step, state, batch, topology=topology, schedules=schedules, say=say) as compiled:
            yield compiled


def abstract_state(variant: str, config: Any, topology: Topology) -> Any:
    """The shapes and shardings of the variant's state, on the mesh that is set.

    Raises ValueError where an axis of the mesh does not divide an extent, with its name.
    """
    train = importlib.import_module(f"grug_model.{variant}.train")
    optimizer = config.optimizer.build(config.trainer.steps, matrix_axes=train.matrix_axes)
    init = partial(train.init_train_state, config.model, optimizer, config.trainer)
    try:
        return shapes_of(lambda: init(key=jax.random.key(config.trainer.seed)))
    except ValueError as error:
        found = re.search(r"partitioned (\d+) times, but does not evenly divide the dimension size (\d+)", str(error))
        if found is None:
            raise
        parts, size = map(int, found.groups())
        names = [f"{name}={size}" for name, value in vars(config.model).items() if value == size]
        raise ValueError(
            f"step: {', '.join(names) or f'an axis of {size}'} does not divide over {parts} devices of"
            f" {topology.name} (model_axis={config.trainer.model_axis}). Choose a multiple of {parts}, or another"
            " model_axis."
        ) from error


def attention_tables(rows: int, seq_len: int, backward: BackwardBlocks | None = None) -> ScalarOperands:
    """What steers our attention kernels, which is data: of `rows` rows on one device, causal and one document each,
    which is the most work that a packed batch can be. Empty for lengths that are padded; the table then says so.

    backward: its blocks; None: all keys of a row at once. In several chunks its grid is data too, and comes first."""
    intervals = AttentionMask(causal=True).intervals(rows, seq_len, seq_len)
    if intervals.stripes is None or seq_len % 512:
        return {}
    stripes = np.asarray(intervals.stripes).reshape(-1)
    tables = {("attention_forward", 0): stripes, ("attention_backward", 0): stripes}
    if backward is not None and backward.chunks(seq_len) > 1:
        plan = backward_plan(intervals, seq_len, backward)
        of_chunks = (plan.steps, plan.stripes, plan.begins)
        tables |= {("attention_backward", i): np.asarray(table) for i, table in enumerate(of_chunks)}
    return tables


def _backward_blocks(config: Any, topology: Topology) -> BackwardBlocks | None:
    """Of the attention kernel that a device runs; None where it would refuse."""
    model, axis = config.model, config.trainer.model_axis
    q, k = (
        jax.ShapeDtypeStruct((1, config.trainer.seq_len, heads // axis, model.head_dim), model.compute_dtype)
        for heads in (model.num_heads, model.num_kv_heads)
    )
    try:
        return pallas_tpu.blocks_for(q, k, k, topology.chip.name, None)[1]
    except (UnsupportedError, ZeroDivisionError):  # no whole head for a device: refused where it is traced
        return None


def abstract_batch(mesh: Mesh, batch_size: int, seq_len: int) -> Example:
    """The shapes of a batch, split over `mesh`."""
    sharding = NamedSharding(mesh, P(BATCH_AXES, None))

    def struct(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((batch_size, seq_len), dtype, sharding=sharding)

    return Example(struct(jnp.int32), struct(jnp.float32), Mask((struct(jnp.int32), struct(jnp.int32))))
