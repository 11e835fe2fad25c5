# SPDX-License-Identifier: Apache-2.0
"""A variant's training step, compiled for a TPU topology from shapes alone, and how long it is predicted to take."""

import contextlib
import dataclasses
import importlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from bench import levanter_grug
from bench.tpu import schedule
from bench.tpu.record import Program, Record, compiling
from bench.tpu.schedule import Schedule
from bench.tpu.timeline import ScalarOperands
from bench.tpu.topology import Topology
from grug_kernels.attention import AttentionMask, context, pallas_tpu
from grug_kernels.attention.tpu_backward_blocks import BackwardBlocks
from grug_kernels.attention.tpu_plan import backward_plan
from grug_kernels.dispatch import UnsupportedError
from train.mesh import batch_shards
from train.offload import shapes_of
from train.shapes import abstract_batch, splits_explained

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
    return topology.mesh(**trainer.mesh_axes)


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
    queries, keys = attended(config, rows)
    backward = _backward_blocks(config, queries, keys, topology)
    part = {"queries": queries, "causal": keys == trainer.seq_len}
    tables = {} if levanter else attention_tables(rows, keys, backward, **part)
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
    if levanter and trainer.context_axis > 1:
        raise ValueError(
            f"step: Levanter's attention is put in for whole rows, and context_axis={trainer.context_axis} splits them."
            " Leave out --levanter, or --trainer.context-axis."
        )
    optimizer = config.optimizer.build(trainer.steps, matrix_axes=train.matrix_axes)
    pieces = levanter_grug.in_place_of_ours(variant, tpu=topology.devices) if levanter else contextlib.nullcontext()
    with topology.targeted(mesh), pieces:
        state = abstract_state(variant, config, mesh)
        batch = abstract_batch(mesh, trainer.batch_size, trainer.seq_len)
        train_step = train.make_train_step(optimizer, trainer)
        with compiling(train_step, state, batch, topology=topology, schedules=schedules, say=say) as compiled:
            yield compiled


def abstract_state(variant: str, config: Any, mesh: Mesh) -> Any:
    """The shapes and shardings of the variant's state, on `mesh`, which is set.

    Raises ValueError as `splits_explained`.
    """
    train = importlib.import_module(f"grug_model.{variant}.train")
    optimizer = config.optimizer.build(config.trainer.steps, matrix_axes=train.matrix_axes)
    init = partial(train.init_train_state, config.model, optimizer, config.trainer)
    with splits_explained(config.model, mesh):
        return shapes_of(lambda: init(key=jax.random.key(config.trainer.seed)))


def attended(config: Any, rows: int) -> tuple[int, int]:
    """Positions of queries and of keys that attention takes at once on a device of `rows` rows; in a ring one block."""
    model, trainer = config.model, config.trainer
    queries, heads = trainer.seq_len // trainer.context_axis, model.num_kv_heads // trainer.model_axis
    k = jax.ShapeDtypeStruct((rows, queries, heads, model.head_dim), model.compute_dtype)
    in_ring = trainer.context_axis > 1 and not context.gathers(k, k, trainer.context_axis)
    return queries, queries if in_ring else trainer.seq_len


def attention_tables(
    rows: int,
    seq_len: int,
    backward: BackwardBlocks | None = None,
    *,
    queries: int | None = None,
    causal: bool = True,
) -> ScalarOperands:
    """What steers our attention kernels, which is data: of `rows` rows on one device, causal and one document each,
    which is the most work that a packed batch can be. Empty for lengths that are padded; the table then says so.

    queries: how many of the last positions the device has; None: all.
    causal: False for a block of a ring, most of which are seen whole by whoever sees them.
    backward: its blocks; None: all keys of a row at once. In several chunks its grid is data too, and comes first."""
    queries = queries or seq_len
    intervals = AttentionMask(causal=causal).intervals(rows, queries, seq_len)
    if intervals.stripes is None or queries % 512 or seq_len % 512:
        return {}
    stripes = np.asarray(intervals.stripes).reshape(-1)
    tables = {("attention_forward", 0): stripes, ("attention_backward", 0): stripes}
    if backward is not None and backward.chunks(seq_len) > 1:
        plan = backward_plan(intervals, seq_len, backward)
        of_chunks = (plan.steps, plan.stripes, plan.begins)
        tables |= {("attention_backward", i): np.asarray(table) for i, table in enumerate(of_chunks)}
    return tables


def _backward_blocks(config: Any, queries: int, keys: int, topology: Topology) -> BackwardBlocks | None:
    """Of the attention kernel that a device runs; None where it would refuse."""
    model, axis = config.model, config.trainer.model_axis
    q, k = (
        jax.ShapeDtypeStruct((1, length, heads // axis, model.head_dim), model.compute_dtype)
        for length, heads in ((queries, model.num_heads), (keys, model.num_kv_heads))
    )
    try:
        in_parts = keys < config.trainer.seq_len
        return pallas_tpu.blocks_for(q, k, k, topology.chip.name, None, in_parts=in_parts)[1]
    except (UnsupportedError, ZeroDivisionError):  # no whole head for a device: refused where it is traced
        return None
