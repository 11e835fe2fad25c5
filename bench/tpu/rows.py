# SPDX-License-Identifier: Apache-2.0
"""A function's predicted time on one device of a chip, as a row of a benchmark."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.timing import commit
from bench.tpu import dump
from bench.tpu.core import core_of
from bench.tpu.hlo import Trips
from bench.tpu.schedule import Schedule, analyze
from bench.tpu.timeline import ScalarOperands
from grug_kernels import chips


def predicted_row(
    function: Callable[..., Any],
    args: Sequence[Any],
    chip: str,
    facts: Mapping[str, Any],
    *,
    flops: float,
    smem: ScalarOperands | None = None,
    trips: Trips | None = None,
) -> dict[str, Any]:
    """For `bench.ahead.tell`. facts: more of the row. flops: what has to be computed, for the share of the roofline.

    Where the compiler refuses, the row has its sentence as "unsupported", and no seconds.
    """
    row = {"basis": "predicted", "chip": chip, "dtype": "bfloat16", "commit": commit(), **facts}
    try:
        schedule = analyze(function, args, chip, smem=smem, trips=trips)
    except dump.Refused as refusal:
        return row | {"unsupported": refusal.refusal.sentence}
    seconds = schedule.predicted_ms / 1e3
    return (
        row
        | _facts(schedule)
        | {"seconds": seconds, "roofline_percent": 100 * roofline(chip, flops, schedule) / seconds}
    )


def roofline(chip: str, flops: float, schedule: Schedule) -> float:
    """Seconds that the device needs at the least: for `flops`, or to read its arguments and write its results once."""
    device = core_of(chip).chip
    moved = schedule.hbm.arguments_bytes + schedule.hbm.outputs_bytes
    return max(flops / device.peak_bf16_flops, moved / device.hbm_bytes_per_second)


def _facts(schedule: Schedule) -> dict[str, Any]:
    """Of the whole function, and of the kernel that takes the longest."""
    longest = max(schedule.kernels, key=lambda kernel: kernel.predicted_ms)
    count = longest.count
    return {
        "compile_seconds": schedule.compile_seconds,
        "temporary_mib": schedule.hbm.temporaries_bytes / chips.MIB,
        "kernel": longest.name,
        "kernel_share": longest.predicted_ms / schedule.predicted_ms,
        "cycles": count.cycles,
        "matrix_busy": count.matrix_busy,
        "dma_wait_share": count.dma_wait_cycles / count.cycles,
        "spills": count.spills,
        "vmem_mib": count.vmem_bytes / chips.MIB,
        "hbm_mb": count.hbm_bytes / 1e6,
        "notes": list(schedule.notes),
        **{f"slots/{unit}": share for unit, share in count.slots.items()},
        **{f"strip/{unit}": strip for unit, strip in count.strip().items()},
    }
