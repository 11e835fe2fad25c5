# SPDX-License-Identifier: Apache-2.0
"""What a variant's training step takes on a TPU that is not there, by `python -m train.plan` in a process of its own:
it compiles for TPUs, and this process trains on what there is."""

import dataclasses
import hashlib
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.mesh import AXES
from train.rundir import as_dict, write_atomically

from .runs import ROOT, SHARED, sources_digest

COMPILED = Path("runs") / "scores" / "compiled"
NOT_COMPILED = "libtpu, the compiler of every TPU, is not installed: uv sync --extra tpu"


@dataclass(frozen=True)
class Cost:
    """Of a preset on a topology. HBM is of one device, as the compiler sets it aside. The step is predicted from the
    compiler's schedule, not measured. refused: why it does not compile. not_measured: why nothing was tried."""

    tpu: str
    preset: str
    parameters: int
    hbm_bytes: int | None = None
    temporaries_bytes: int | None = None
    step_seconds: float | None = None
    compile_seconds: float | None = None
    compile_cpu_seconds: float | None = None
    refused: str | None = None
    not_measured: str | None = None


def measure(variant: str, preset: str, config: Any, tpu: str, flags: Sequence[str] = ()) -> Cost:
    """Compiles `config` for `tpu`, or reads what that gave when nothing it depends on was different.

    config: the launch configuration that `preset` and `flags` make, which is what train.plan is told.

    Raises:
      ValueError: it was not understood, as a batch that the devices do not divide; what is wrong has been printed.
    """
    file = COMPILED / f"{variant}-{_digest(variant, config, tpu)}.json"
    if file.is_file():
        return Cost(**json.loads(file.read_text()))
    found = Cost(tpu, preset, count_parameters(variant, config), **_planned(variant, preset, tpu, flags))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(dataclasses.asdict(found), indent=1))
    return found


def _planned(variant: str, preset: str, tpu: str, flags: Sequence[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        command = [sys.executable, "-m", "train.plan", "--variant", variant, "--preset", preset, "--tpu", tpu, *flags]
        ended = subprocess.run([*command, "--json", str(file)], cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
        if not file.is_file():
            raise ValueError(
                f"{' '.join(['python', *command[1:]])} ended with exit code {ended.returncode}; what it said stands"
                " above. Mend that, or leave the TPU out with --tpu none."
            )
        plan = json.loads(file.read_text())
    if "unsupported" in plan:
        return {"refused": f"{plan['refused_at']} raised {plan['error']}: {plan['unsupported']}"}
    return {
        "hbm_bytes": plan["hbm/reserved_bytes"],
        "temporaries_bytes": plan["hbm/temporaries_bytes"],
        "step_seconds": plan["seconds"],
        "compile_seconds": plan["compile_seconds"],
        "compile_cpu_seconds": plan["compile_cpu_seconds"],
    }


def _digest(variant: str, config: Any, tpu: str) -> str:
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu", "optax", "equinox")}
    sources = sources_digest((f"grug_model/{variant}", *SHARED, "bench/tpu", "bench/plan"))
    what = [variant, as_dict(config), tpu, sources, versions, os.environ.get("LIBTPU_INIT_ARGS", "")]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def count_parameters(variant: str, config: Any) -> int:
    """Of the model of a launch configuration, from shapes alone."""
    import jax
    from jax.sharding import AbstractMesh, AxisType

    from train.shapes import abstract_parameters

    model = importlib.import_module(f"grug_model.{variant}.model")
    one_device = AbstractMesh((1,) * len(AXES), AXES, axis_types=(AxisType.Explicit,) * len(AXES))
    params = abstract_parameters(model.Transformer, config.model, one_device)
    return sum(leaf.size for leaf in jax.tree.leaves(params))
