# SPDX-License-Identifier: Apache-2.0
"""What a run is going to take on a TPU that is not there: its training step, compiled, and whether it fits."""

import dataclasses
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.plan.advice import Advice, Situation, advice, reckoned_kept
from bench.plan.memory import Memory, memory, needed
from bench.tpu.record import Record
from bench.tpu.step import StepPrediction, predicted_step, replaced
from bench.tpu.topology import Topology
from grug_kernels.mfu import utilisation
from train.mesh import BATCH_AXES
from train.rundir import as_dict, check_fit


@dataclass(frozen=True)
class Plan:
    """limit_bytes: what a device may use: the budget, and never more than the compiler takes. prediction, memory: None
    where it was refused before it was known; prediction also where the schedule cannot be read."""

    variant: str
    config: Any
    topology: Topology
    record: Record
    prediction: StepPrediction | None
    memory: Memory | None
    limit_bytes: int

    @property
    def fits(self) -> bool:
        compiled = self.record.refusal is None
        return compiled and self.memory is not None and self.memory.total_bytes <= self.limit_bytes

    @property
    def over_bytes(self) -> int:
        """What is too much of it."""
        return max(0, self.memory.total_bytes - self.limit_bytes) if self.memory else 0

    @property
    def axes(self) -> dict[str, int]:
        return mesh_axes(self.config.trainer, self.topology)

    @property
    def rows(self) -> int:
        """Of the batch, on one device."""
        return self.config.trainer.batch_size // math.prod(self.axes[axis] for axis in BATCH_AXES)

    @property
    def milliseconds(self) -> dict[str, float]:
        """Where the predicted step goes: computing, waiting for HBM, waiting for the interconnect."""
        if self.prediction is None:
            return {}
        schedule = self.prediction.schedule
        waits = sum(
            k.predicted_ms * k.count.dma_wait_cycles / k.count.cycles for k in schedule.kernels if k.count.cycles
        )
        return {
            "compute": schedule.pallas_ms + schedule.xla_ms - waits,
            "waiting for HBM": waits + schedule.copy_wait_ms,
            "waiting for the interconnect": schedule.exposed_ms,
        }

    @property
    def mfu(self) -> dict[str, float]:
        """In percent, see `grug_kernels.mfu.utilisation`; empty without a prediction."""
        if self.prediction is None:
            return {}
        flops = self.config.model.flops_per_token(self.config.trainer.seq_len)
        peak = self.topology.chip.peak_bf16_flops * len(self.topology.devices)
        return utilisation(flops, self.prediction.tokens / self.prediction.seconds, peak)

    @property
    def advice(self) -> list[Advice]:
        """What to change first where memory is short; empty where it is not, or another thing was refused."""
        if self.memory is None or self.fits or (self.record.refusal and not needed(self.record.refusal)):
            return []
        trainer = self.config.trainer
        return advice(
            Situation(
                over_bytes=self.over_bytes,
                held=self.memory.arguments | self.memory.temporaries,
                remat=self.config.model.remat,
                policies=remat_policies(self.config.model),
                kept_bytes=reckoned_kept(self.config.model, self.rows, trainer.seq_len // trainer.context_axis),
                rows=self.rows,
                batch_size=trainer.batch_size,
                model_axis=trainer.model_axis,
                data_axis=self.axes["data"],
                replicas=trainer.replica_dcn,
                devices=len(self.topology.devices),
            )
        )

    def to_json(self) -> dict[str, Any]:
        facts = {
            "variant": self.variant,
            "config": as_dict(self.config),
            "fits": self.fits,
            "limit_bytes": self.limit_bytes,
            "memory": dataclasses.asdict(self.memory) if self.memory else None,
            "milliseconds": self.milliseconds,
            "mfu_percent": self.mfu,
            "advice": [str(one) for one in self.advice],
        }
        return self.record.row() | (self.prediction.to_json() if self.prediction else {}) | facts


def make_plan(
    variant: str,
    config: Any,
    topology: Topology,
    *,
    budget_bytes: float | None = None,
    levanter: bool = False,
    say: Callable[[str], None] = lambda stage: None,
) -> Plan:
    """Compiles the step. config: the variant's launch configuration. say: is told each stage as it begins.

    Raises:
      ValueError: the configuration does not fit itself or the topology; nothing has been compiled.
    """
    check_fit(config)
    record, prediction = predicted_step(variant, config, topology, levanter=levanter, say=say)
    axes = mesh_axes(config.trainer, topology)
    held = memory(record, (axes["data"] * axes["context"], axes["expert"], axes["model"]))
    figures = needed(record.refusal)  # the compiler's own limit, which a larger budget does not move
    limits = (topology.available_hbm_bytes if budget_bytes is None else budget_bytes, *(figures[1:] if figures else ()))
    return Plan(variant, config, topology, record, prediction, held, int(min(limits)))


def mesh_axes(trainer: Any, topology: Topology) -> dict[str, int]:
    """Devices along each axis of the mesh of a run with this `GrugTrainerConfig`."""
    shared = trainer.mesh_axes
    return {"data": len(topology.devices) // math.prod(shared.values())} | shared


def remat_policies(model: Any) -> tuple[str, ...]:
    """What the field `remat` of a model's configuration may be; () where it has none."""
    hint = typing.get_type_hints(type(model)).get("remat")
    return typing.get_args(hint)


def changed(config: Any, *, model: Mapping[str, Any] | None = None, trainer: Mapping[str, Any] | None = None) -> Any:
    """The launch configuration with these fields of its model and its trainer replaced.

    Raises:
      ValueError: `remat` is none of the variant's policies.
    """
    policies = remat_policies(config.model)
    if (remat := (model or {}).get("remat")) is not None and remat not in policies:
        raise ValueError(
            f"--remat {remat}: {type(config.model).__name__} has no such policy. It has: {', '.join(policies)}."
        )
    return replaced(config, model=model or {}, trainer=trainer or {})
