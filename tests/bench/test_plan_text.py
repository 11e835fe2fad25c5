# SPDX-License-Identifier: Apache-2.0
"""What is said of a plan, and of what is being done meanwhile."""

import dataclasses
import io
from time import sleep
from types import SimpleNamespace

import pytest

from bench.plan import clock
from bench.plan.holders import GRADIENTS, KEPT, Held
from bench.plan.memory import Memory
from bench.plan.plan import Plan
from bench.plan.text import text, verdict
from bench.tpu.collectives import Collectives, Kind
from bench.tpu.dump import Refusal
from bench.tpu.record import Record
from bench.tpu.schedule import Schedule
from bench.tpu.step import StepPrediction
from bench.tpu.timeline import Kernel, Transfer
from grug_kernels.dispatch import Choice
from tests.bench import tpu_cases
from tests.bench.plan_cases import GIB, tiny
from train import progress

FOUR_CHIPS = tpu_cases.topology("v5p", 2, 2, 1)


def kernel(ms: float, cycles: int, waits: int, is_pallas: bool) -> Kernel:
    count = SimpleNamespace(cycles=cycles, dma_wait_cycles=waits)
    return Kernel("k", "mlp", is_pallas, 1, ms, None, count)  # pyright: ignore[reportArgumentType]


SCHEDULE = Schedule(
    chip="v5p",
    clock_ghz=1.75,
    kernels=(kernel(8.0, 1000, 250, True), kernel(4.0, 100, 0, False)),
    transfers=(Transfer("all-gather.1", "all-gather", "mlp", 1, 100, ms=5.0, exposed_ms=3.0),),
    copied_bytes=0,
    copied_ms=0,
    copy_wait_ms=1.0,
    hbm=None,  # pyright: ignore[reportArgumentType]
    compile_seconds=1.0,
    notes=(
        "attention.13: operand 1 (%get-tuple-element.1.k) is read as scalars. Pass smem={('attention', 1): array}.",
        "attention.14: operand 1 (%copy-done.135) is read as scalars. Pass smem={('attention', 1): array}.",
        "loop while.3: number of trips unknown",
    ),
)
PREDICTION = StepPrediction(SCHEDULE, tokens=8 * 256, chips=4)
MEMORY = Memory(
    total_bytes=8 * GIB,
    arguments={"parameters": GIB, "optimizer": 2 * GIB},
    temporaries={GRADIENTS: GIB, KEPT: 3 * GIB},
    results_bytes=0,
    code_bytes=GIB // 2,
    in_use_bytes=7 * GIB,
    on_host={"ema": 3 * GIB},
    largest=[Held(3 * GIB, "bf16[2,8,256,128]", KEPT, "stacked_layers")],
)


def plan(limit_gib: float = 16, **more) -> Plan:
    choices = [Choice("attention", "tpu", None, "xla", (("pallas_tpu", "head_dim=3 is odd"),))] * 2
    collectives = Collectives({"all-gather": Kind(4, 2**20)})
    seconds = {"trace": 1.0, "lower": 0.5, "compile": 90.0}
    record = Record(FOUR_CHIPS, seconds, 60.0, choices, collectives=collectives)
    found = Plan("array_stacked", tiny(), FOUR_CHIPS, record, PREDICTION, MEMORY, int(limit_gib * GIB))
    return dataclasses.replace(found, **more)


def test_the_parts_of_the_step_are_apart_and_add_up():
    """Of 8 ms a quarter waits for HBM; a copy is waited for, and a collective of which 3 ms are exposed."""
    parts = plan().milliseconds
    assert parts == {"compute": 6 + 4, "waiting for HBM": 2 + 1, "waiting for the interconnect": 3}
    assert sum(parts.values()) == pytest.approx(SCHEDULE.predicted_ms)


def test_it_says_where_memory_and_time_go():
    said = text(plan())
    for line in (
        "array_stacked on v5p: 4 chips, 4 devices, data 4 × model 1",
        "batch 8 × 256 tokens, rows on each device: 2; 2 layers, hidden_dim 128, remat full",
        "  parameters                               1,024.0",
        "  temporaries                              4,096.0",
        "    gradients                              1,024.0",
        "  small temporaries, not laid out            512.0",
        "  set aside: decides whether it fits       8,192.0  50.0 % of 16.00 GiB",
        "  bf16[2,8,256,128]                        3,072.0  kept for the backward pass: stacked_layers",
        "trace 1.0 s, lower 0.5 s, compile 1 min 30 s (1 min 00 s of CPU)",
        "predicted step 16.0 ms: compute 10.0 ms, waiting for HBM 3.0 ms, waiting for the interconnect 3.0 ms",
        "kernel attention: xla; pallas_tpu refused: head_dim=3 is odd",
        "all-gather: 4 times, 1.0 MiB",
        "note: attention: operand 1 is read as scalars. (2 times)",
        "note: loop while.3: number of trips unknown",
        "verdict: fits. 8.00 GiB of 16.00 GiB on each device, 8.00 GiB left",
    ):
        assert line in said.splitlines(), f"{line!r} is not in\n{said}"


def test_mfu_is_against_the_chips_peak():
    found = plan()
    flops = found.config.model.flops_per_token(256).training * 8 * 256
    assert found.mfu["mfu"] == pytest.approx(100 * flops / 16e-3 / (4 * 459e12))


def test_over_the_budget_it_does_not_fit_though_it_compiled():
    over = plan(limit_gib=6)
    assert not over.fits
    first, *others = verdict(over)
    assert first == "verdict: does not fit. 8.00 GiB needed, 6.00 GiB there on each device, 2.00 GiB too much"
    assert others[0] == "first: --remat nested in place of full: saves about 3.00 GiB (reckoned)"
    assert others[1] == "or:    --remat offload in place of full: saves about 3.00 GiB"


def test_where_nothing_alone_is_enough_it_says_so():
    assert "nothing alone is enough" in verdict(plan(limit_gib=0.5))[1]


def test_a_refusal_for_another_reason_is_no_question_of_memory():
    record = Record(FOUR_CHIPS, refusal=Refusal("lower", "ValueError", "no such primitive"))
    refused = plan(record=record, prediction=None, memory=None)
    assert not refused.fits
    assert refused.advice == []
    assert verdict(refused) == ["verdict: refused. lower raised ValueError: no such primitive"]
    assert text(refused).endswith("verdict: refused. lower raised ValueError: no such primitive")


def test_away_from_a_terminal_each_stage_is_a_line():
    said = io.StringIO()
    with clock.stages(said) as begins:
        begins("trace")
        begins("compile")
    assert [line.partition(":")[0] for line in said.getvalue().splitlines()] == ["trace", "compile"]


def test_on_a_terminal_the_clock_runs(monkeypatch):
    """A compile of minutes says that it is going on: drawn anew while nothing else happens."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    said = Terminal()
    monkeypatch.setattr(clock, "REDRAW_SECONDS", 0.01)
    monkeypatch.setattr(progress, "REDRAW_SECONDS", 0.0)
    with clock.stages(said) as begins:
        begins("compile")
        for _ in range(1000):
            if said.getvalue().count("compile ... ") > 2:
                break
            sleep(0.01)
    assert said.getvalue().count("\rcompile ... ") > 2
    assert said.getvalue().endswith("\x1b[K\n")


def test_what_lives_in_the_host_is_told_apart():
    lines = text(plan()).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("in the host's memory"))
    assert lines[start + 1].split() == ["ema", "3,072.0"]


def test_a_prediction_that_is_not_to_be_used_says_so():
    """As of a fusion for TPU7x: 6760 ms, of which XLA's cost model makes 12."""
    good, long = SCHEDULE.kernels
    assert SCHEDULE.doubts == []
    doubtful = dataclasses.replace(
        SCHEDULE,
        kernels=(
            dataclasses.replace(good, estimated_ms=1.0),
            dataclasses.replace(long, name="fusion.432", predicted_ms=6760.0, estimated_ms=12.0),
        ),
        notes=("without a schedule, counted as nothing: 147 call to a SparseCore, 2 sqrt",),
    )
    assert doubtful.doubts == [
        "fusion.432 is misread: 6,760 ms predicted, 12.00 by XLA's cost model",
        "what SparseCores send or move is counted as nothing",
    ]
    said = text(plan(prediction=StepPrediction(doubtful, tokens=8 * 256, chips=4)))
    assert "doubtful: fusion.432 is misread" in said
