# SPDX-License-Identifier: Apache-2.0
"""Short runs of a variant, one a seed. Each has a folder named after all that its result depends on: one that is
finished is read, one that was stopped goes on, and one whose sources have changed since is another run."""

import dataclasses
import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.failure import KERNEL_ERROR, NON_FINITE, OUT_OF_MEMORY
from train.history import read_history
from train.mesh import quiet_libtpu
from train.rundir import as_dict
from train.stopping import catch_signals
from train.summary import SUMMARY_FILE, read_run

ROOT = Path(__file__).parents[2]
RUNS = Path("runs")
# What a loss may depend on beside the variant's own folder.
SHARED = ("grug_kernels", "train")
PACKAGES = ("jax", "jaxlib", "optax", "equinox", "marin-levanter")
# A variant that fails so has lost; anything else that ends a run is no result.
FAILURES = {kind.exit_code: kind.title for kind in (NON_FINITE, OUT_OF_MEMORY, KERNEL_ERROR)}


@dataclass(frozen=True)
class SeedRun:
    """A finished run, or one that failed.

    loss: on held-out text after the last step, nats per token. tokens_per_second: median, where there was a window that
    does not warm up. device: how many of which kind. failure: then there is no loss.
    """

    seed: int
    path: str
    device: str = ""
    loss: float | None = None
    bits_per_byte: float | None = None
    tokens_per_second: float | None = None
    flops_per_token: float | None = None
    failure: str | None = None


def in_turn(variants: Sequence[str], seeds: Sequence[int]) -> Iterator[tuple[str, int]]:
    """Every variant with every seed, to and fro, so that a slow quarter of an hour slows none alone."""
    for i, seed in enumerate(seeds):
        yield from ((variant, seed) for variant in (variants if i % 2 == 0 else reversed(variants)))


def named(variant: str, config: Any, seed: int, prefix: str = "score") -> Any:
    """The launch configuration with this seed, and with a name and a folder of its own."""
    run_id = f"{prefix}-{variant}-{digest(variant, config)}-seed{seed}"
    trainer = dataclasses.replace(config.trainer, seed=seed)
    return dataclasses.replace(config, trainer=trainer, run_id=run_id, output_path=str(RUNS / run_id))


def digest(variant: str, config: Any) -> str:
    """Eight hexadecimal digits of configuration, sources, versions and device.

    Not of the texts: of those that were edited in their place the older runs are to be deleted.
    """
    import jax

    quiet_libtpu()
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    versions = {name: importlib.metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()}
    sources = sources_digest((f"grug_model/{variant}", *SHARED))
    what = [variant, as_dict(config), sources, versions, device, os.environ.get("XLA_FLAGS", "")]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]


def sources_digest(folders: Sequence[str]) -> str:
    found = hashlib.sha256()
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*.py")):
            found.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return found.hexdigest()


def is_finished(config: Any) -> bool:
    """Of a named configuration: its run has taken all its steps, and has been summarised."""
    file = Path(config.output_path) / SUMMARY_FILE
    return file.is_file() and json.loads(file.read_text())["steps"] == config.trainer.steps


def train(variant: str, config: Any) -> SeedRun:
    """Trains `config`, made by `named`, to its end unless that was done, and reads what came of it.

    Raises:
      SystemExit: it had to end for a reason that is not the variant's, such as a full disk.
      KeyboardInterrupt: it was stopped; its step is saved.
    """
    path, seed = Path(config.output_path), config.trainer.seed
    if not is_finished(config):
        try:
            with catch_signals():
                importlib.import_module(f"grug_model.{variant}.launch").run(config)
        except SystemExit as end:
            if not isinstance(end.code, int) or end.code not in FAILURES:
                raise
            why = read_history(path).summary.get("run/failure") if (path / "metrics.jsonl").is_file() else None
            return SeedRun(seed, str(path), failure=why or FAILURES[end.code])
    return read(seed, path)


def read(seed: int, path: Path) -> SeedRun:
    facts = read_run(path).facts
    throughput = facts["throughput"] or {}
    return SeedRun(
        seed,
        str(path),
        device=f"{facts['device_count']} × {facts['device_kind']}",
        loss=facts["loss"]["eval"]["last"]["value"],
        bits_per_byte=facts["bits_per_byte"]["last"]["value"],
        tokens_per_second=throughput.get("tokens_per_second"),
        flops_per_token=float(read_history(path).summary["throughput/flops_per_token_analytic"]),
    )
