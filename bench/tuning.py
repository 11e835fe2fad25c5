# SPDX-License-Identifier: Apache-2.0
"""One kernel compiled with several block sizes, and the times predicted: `tune_attention`, `tune_cross_entropy`.

Nothing is measured: times are predicted from schedules (docs/explanations/tpu_schedule.md), and differences below some
percent mean nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from bench.tpu import dump
from bench.tpu.schedule import analyze
from bench.tpu.timeline import ScalarOperands
from grug_kernels import chips
from grug_kernels.dispatch import UnsupportedError

Change = Mapping[str, Any]


class Case(NamedTuple):
    """A kernel alone, in its own layout. smem: its scalar tables, as numbers. calls: of it in the whole function."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    smem: ScalarOperands
    calls: int = 1


@dataclass(frozen=True)
class Result:
    """ms, mcycles: of the kernel alone, all its calls; where it was refused, refusal is the sentence and the numbers
    are None."""

    change: Change
    ms: float | None = None
    mcycles: float | None = None
    matrix_busy: float | None = None
    vector_busy: float | None = None
    spills: int | None = None
    vmem_mib: float | None = None
    compile_seconds: float | None = None
    refusal: str | None = None

    def __str__(self) -> str:
        what = ", ".join(f"{name}={value}" for name, value in self.change.items()) or "own choice"
        if self.refusal is not None:
            return f"refused  {what}: {self.refusal}"
        return (
            f"{self.ms:8.3f} {self.mcycles:9.3f} {self.matrix_busy:6.0%} {self.vector_busy:6.0%} {self.spills:9}"
            f" {self.vmem_mib:9.1f} {self.compile_seconds:8.1f}  {what}"
        )


HEADING = "      ms   Mcycles    MXU   VALU    spills  VMEM MiB  compile  blocks"


def counted(change: Change, case_of: Callable[[Change], Case], chip: str) -> Result:
    """Compiles one candidate, in a process of its own, and counts the kernel. case_of: refuses as the compiler does."""
    try:
        case = case_of(change)
        schedule = analyze(case.function, case.args, chip, smem=case.smem)
    except (UnsupportedError, dump.Refused) as refusal:
        return Result(change, refusal=str(refusal).splitlines()[0])
    kernel = next(kernel for kernel in schedule.kernels if kernel.is_pallas)
    count = kernel.count
    return Result(
        change,
        ms=case.calls * kernel.predicted_ms,
        mcycles=case.calls * count.cycles / 1e6,
        matrix_busy=count.matrix_busy,
        vector_busy=count.slots["VALU"],
        spills=count.spills,
        vmem_mib=count.vmem_bytes / chips.MIB,
        compile_seconds=schedule.compile_seconds,
    )


def sweep(measure: Callable[[Change], Result], changes: Sequence[Change], title: str) -> None:
    """Prints as it goes, and then under `title`, the fastest first, what was refused last."""
    print(HEADING, flush=True)
    results = []
    for change in changes:
        results.append(measure(change))
        print(results[-1], flush=True)
    print(f"\n{title}: predicted, best first\n{HEADING}")
    for result in sorted(results, key=lambda result: float("inf") if result.ms is None else result.ms):
        print(result)
