# SPDX-License-Identifier: Apache-2.0
"""What a failure's bundle says of the machine: its memory, what holds it, what to change first, and the commands."""

import math
import os
import platform
import resource
import sys
from collections import Counter
from pathlib import Path
from shlex import quote
from typing import Any, get_args

import jax

from grug_kernels import chips
from grug_kernels.stacked import Remat
from train.checkpoint_files import package_versions
from train.rundir import RunDir

GIB = chips.GIB
# A state's fields, as train.plan names them.
FIELDS = {"params": "parameters", "opt_state": "optimizer", "ema_params": "average of the weights"}


def versions() -> dict[str, str]:
    return package_versions() | {"python": platform.python_version(), "system": platform.platform()}


def devices() -> dict[str, Any]:
    first = jax.devices()[0]
    return {
        "kind": first.device_kind,
        "count": jax.device_count(),
        "process": jax.process_index(),
        "processes": jax.process_count(),
    }


def memory() -> dict[str, Any]:
    """Bytes, of the host and of each device of this process, now."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    host = {"this process at most": peak}
    for file, names in (("/proc/self/status", {"VmRSS": "this process"}), ("/proc/meminfo", _OF_HOST)):
        if Path(file).exists():  # not on every system
            lines = dict(line.split(":", 1) for line in Path(file).read_text().splitlines() if ":" in line)
            host |= {text: 1024 * int(lines[name].split()[0]) for name, text in names.items() if name in lines}
    stats = {str(device): device.memory_stats() for device in jax.local_devices()}
    return {"host": host, "devices": {name: stat for name, stat in stats.items() if stat}}


_OF_HOST = {"MemAvailable": "available", "MemTotal": "in all"}


def held(state: Any, summary: dict[str, Any]) -> dict[str, int]:
    """Bytes of one device by what holds them. state: of arrays or their shapes. summary: of the metrics."""
    found = {text: sum(map(_bytes_of_device, jax.tree.leaves(getattr(state, name)))) for name, text in FIELDS.items()}
    temporaries = summary.get("memory/temporaries_bytes")
    return {name: size for name, size in found.items() if size} | (
        {} if temporaries is None else {"temporaries of the training step": temporaries}
    )


def _bytes_of_device(leaf: Any) -> int:
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def largest_arrays(shown: int = 8) -> list[dict[str, Any]]:
    """Of those that are alive in this process, by shape: the most bytes first, over its devices."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for array in jax.live_arrays():
        name = f"{array.dtype}{list(array.shape)}"
        counts[name] += 1
        sizes[name] += sum(shard.data.nbytes for shard in array.addressable_shards)
    return [{"array": name, "how_many": counts[name], "bytes": size} for name, size in sizes.most_common(shown)]


def change_first(config: Any, bytes_held: dict[str, int]) -> list[str]:
    """What makes a step smaller, what costs least first. `train.plan` says what each of them saves."""
    trainer, ways = config.trainer, []
    remat = getattr(config.model, "remat", None)
    if remat in (policies := get_args(Remat)) and remat != policies[-1]:
        ways.append(
            f"--model.remat {policies[policies.index(remat) + 1]}: keep less for the backward pass than {remat}"
        )
    if average := bytes_held.get("average of the weights"):
        ways.append(f"--trainer.ema-beta None: no average of the weights, {average / GIB:.2f} GiB")
    if (optimizer := bytes_held.get("optimizer")) and trainer.offload == "none":
        ways.append(f"--trainer.offload optimizer: its {optimizer / GIB:.2f} GiB live in the host's memory")
    if trainer.batch_size % 2 == 0:
        ways.append(f"--trainer.batch-size {trainer.batch_size // 2}: half of the activations; another result")
    if jax.device_count() % (2 * math.prod(trainer.mesh_axes.values())) == 0:
        ways.append(f"--trainer.model-axis {2 * trainer.model_axis}: twice as many devices for a layer")
    if trainer.replica_dcn > 1:
        ways.append(f"--trainer.replica-dcn 1: one copy of parameters and optimizer, not {trainer.replica_dcn}")
    return [*ways, "more devices: parameters and optimizer are split over all of them"]


def reproduce_command(run: RunDir, again: Path, checkpoint: str | None) -> str:
    """Goes on from `checkpoint` in a folder of its own, so that `run` stays as it is, and looks at every step."""
    start = f"--trainer.load-checkpoint-path {quote(checkpoint)}" if checkpoint else "--trainer.no-load-checkpoint"
    folder = quote(os.path.relpath(again))
    return f"{run.resume_command} --output-path {folder} {start} --trainer.log-every 1 --tracker.wandb off"


def plan_command(run: RunDir) -> str:
    """With the configuration of this very run, for the devices it runs on, where they are TPUs."""
    resume = f"uv run python -m train.plan --resume {quote(os.path.relpath(run.path))}"
    first, *_ = found = jax.devices()
    known = chips.chip(first.device_kind)
    if known is None or first.platform != "tpu":
        return f"{resume} --tpu v5p:2x2x1"
    extents = [max(sizes) + 1 for sizes in zip(*(device.coords for device in found), strict=True)]
    shape = extents[: 2 if known.name in ("v5e", "v6e") else 3]
    return f"{resume} --tpu {known.name}:{'x'.join(map(str, shape))}"
