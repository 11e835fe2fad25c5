# SPDX-License-Identifier: Apache-2.0
"""What a sweep tries, what came of it, and the file in which that is kept, so that a stopped sweep goes on."""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bench.plan.plan import changed, make_plan, remat_policies
from bench.tpu.topology import Topology, tpu_topology
from train.rundir import as_dict, write_atomically

_ROOT = Path(__file__).parents[2]
# What a compiled step depends on, of this project.
_SOURCES = ("grug_kernels", "grug_model", "bench/tpu", "bench/plan", "train")
_BATCHES, _MODELS = (1, 2, 4), (1, 2, 4)


class Candidate(NamedTuple):
    remat: str
    model: int
    batch: int

    def of(self, config: Any) -> Any:
        """The launch configuration with this candidate in it."""
        trainer = {"batch_size": self.batch, "model_axis": self.model}
        return changed(config, model={"remat": self.remat}, trainer=trainer)


@dataclass(frozen=True)
class Outcome:
    """total_bytes: set aside on one device, of a refused step where it is known. The predictions are None where it was
    refused; why says why, or why it was not compiled at all. seconds: what compiling it took, tracing and all."""

    candidate: Candidate
    total_bytes: int | None = None
    step_seconds: float | None = None
    tokens_per_second_per_chip: float | None = None
    mfu: float | None = None
    seconds: float = 0.0
    why: str | None = None
    skipped: bool = False

    def fits(self, limit_bytes: float) -> bool:
        return self.step_seconds is not None and self.total_bytes is not None and self.total_bytes <= limit_bytes


def groups(
    config: Any, topology: Topology, remats: Sequence[str], batches: Sequence[int], models: Sequence[int]
) -> list[list[Candidate]]:
    """Candidates of one policy and mesh together, the smallest batch first. Empty lists stand for what is usual: every
    policy, 1, 2 and 4 times the batch, and of the model axes 1, 2 and 4 those that divide devices and heads.

    Raises ValueError for a policy that the variant does not have.
    """
    remats = remats or remat_policies(config.model)
    batches = batches or [times * config.trainer.batch_size for times in _BATCHES]
    others = math.prod(size for axis, size in config.trainer.mesh_axes.items() if axis != "model")
    devices = len(topology.devices) // others
    models = models or [axis for axis in _MODELS if _divides(axis, config.model, devices)]
    for remat in remats:
        changed(config, model={"remat": remat})
    return [
        [Candidate(remat, model, batch) for batch in sorted(set(batches))]
        for model in sorted(set(models))
        for remat in dict.fromkeys(remats)
    ]


def _divides(axis: int, model: Any, devices: int) -> bool:
    return not any(size % axis for size in (devices, model.num_heads, model.num_kv_heads))


def tried(variant: str, config: Any, topology: str, candidate: Candidate) -> Outcome:
    """Compiles the candidate, or says why that cannot be done."""
    try:
        plan = make_plan(variant, candidate.of(config), tpu_topology(topology))
    except ValueError as error:
        return Outcome(candidate, why=str(error))
    return Outcome(
        candidate,
        total_bytes=plan.memory.total_bytes if plan.memory else None,
        step_seconds=plan.prediction.seconds if plan.prediction else None,
        tokens_per_second_per_chip=plan.prediction.tokens_per_second_per_chip if plan.prediction else None,
        mfu=plan.mfu.get("mfu"),
        seconds=sum(plan.record.seconds.values()),
        why=plan.record.refusal.sentence if plan.record.refusal else None,
    )


class Kept:
    """Outcomes on disk, each under the hash of all that it depends on: configuration, chip, sources, versions."""

    def __init__(self, folder: Path, variant: str, config: Any, topology: Topology):
        self._folder, self._config = folder, config
        self._common = [variant, topology.name, _versions(), sources_digest(), os.environ.get("LIBTPU_INIT_ARGS", "")]

    def get(self, candidate: Candidate) -> Outcome | None:
        file = self._file(candidate)
        if not file.is_file():
            return None
        saved = json.loads(file.read_text())
        return Outcome(**saved | {"candidate": Candidate(*saved["candidate"])})

    def put(self, outcome: Outcome) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._file(outcome.candidate), json.dumps(dataclasses.asdict(outcome)))

    def _file(self, candidate: Candidate) -> Path:
        config = as_dict(candidate.of(self._config))
        what = [*self._common, *(config[part] for part in ("model", "optimizer", "trainer"))]
        return self._folder / f"{hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]}.json"


def sources_digest() -> str:
    digest = hashlib.sha256()
    for folder in _SOURCES:
        for file in sorted((_ROOT / folder).rglob("*.py")):
            digest.update(f"{file.relative_to(_ROOT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu", "optax", "equinox")}
