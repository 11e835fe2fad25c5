# SPDX-License-Identifier: Apache-2.0
"""What overlaps with what, in programs written by hand around the checked-in kernel; no libtpu needed."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from bench.tpu import dump, hlo, picture, schedule
from bench.tpu.core import core_of
from bench.tpu.record import Program
from tests.bench import tpu_cases
from tests.bench.test_tpu_schedule import DATA

CYCLES = 4419  # of the kernel, see test_tpu_schedule
KERNEL_MS = CYCLES / core_of("v6e").clock_hz * 1e3
# 400 GB/s over four links, of which a square of four v6e uses two; each device sends 3/4.
GATHER_MS = 0.75 * 2**20 * 4 / 200e9 * 1e3

HEAD = """HloModule m, is_scheduled=true

%condition (c: (s32[], f32[8])) -> pred[] {
  %c = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  %limit = s32[] constant(3)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

"""
ON_SPARSE_CORE = """%sends (p: f32[262144]) -> f32[1048576] {{
  %p = f32[262144]{{0}} parameter(0)
  ROOT %sent = f32[1048576]{{0}} all-gather(%p), replica_groups=[1,4]<=[4]
}}, execution_thread="sparsecore"

%sorts (p: f32[262144]) -> f32[262144] {{
  %p = f32[262144]{{0}} parameter(0)
  ROOT %sorted = f32[262144]{{0}} sort(%p)
}}, execution_thread="sparsecore"

"""
PARAMETERS = """
  %x = f32[192,128]{1,0:T(8,128)} parameter(0)
  %table = s32[6]{0:T(128)} parameter(1)
  %part = f32[262144]{0:T(1024)} parameter(2)
"""
KERNEL = '  %gather.{0} = f32[192,128]{{1,0}} custom-call(%table, %x), custom_call_target="tpu_custom_call"\n'
START = """  %start.{0} = (f32[262144]{{0}}, f32[1048576]{{0}}) all-gather-start(%part), replica_groups=[1,4]<=[4]
"""
DONE = "  %done.{0} = f32[1048576]{{0}} all-gather-done(%start.{0})\n"
CALL = '  %call = ((), (), s32[]{{:S(2)}}) call-start(), async_execution_thread="sparsecore", to_apply=%sends\n'
UPDATE = "  %update = ((f32[262144]{{0}}), f32[1048576]{{0}}) call-update(%call, %part)\n"
CALL_DONE = "  %called = f32[1048576]{{0}} call-done(%update)\n"
NOW = "  %now = f32[1048576]{{0}} all-gather(%part), replica_groups=[1,4]<=[4]\n"


def body(*lines: str) -> str:
    return PARAMETERS + "".join(line.format(number) for number, line in lines_numbered(lines))


def lines_numbered(lines: tuple[str, ...]) -> list[tuple[int, str]]:
    """Kernels numbered one after the other; a start and the done after it share a number."""
    seen: dict[str, int] = {}
    numbered = []
    for line in lines:
        seen[line] = seen.get(line, 0) + 1
        numbered.append((seen[line], line))
    return numbered


@pytest.fixture
def read(tmp_path):
    for part, ours in {
        "00-pre-finalize-registers-and-allocations": "allocations",
        "01-final_hlo-static-per-bundle-utilization": "utilization",
        "03-final_bundles": "bundles",
    }.items():
        (tmp_path / f"1795-gather.1-{part}.txt").write_text((DATA / f"{ours}.txt").read_text())

    def read(text: str, trips: hlo.Trips | None = None) -> schedule.Schedule:
        aliases = {f"gather.{number}": "gather.1" for number in range(9)}
        compiled = dump.Compiled(HEAD + text, {}, 1.5, 1.5, tmp_path, aliases)
        program = Program(tpu_cases.LOWERED, compiled, hlo.parse(compiled.hlo, trips))
        return schedule.read(tpu_cases.record("v6e"), program, {("gather", 0): np.zeros(6, np.int32)})

    return read


def entry(*lines: str) -> str:
    return f"ENTRY %main (x: f32[8]) -> f32[8] {{{body(*lines)}}}\n"


def test_a_collective_that_waits_for_nothing_is_exposed(read):
    result = read(entry(KERNEL, NOW))
    assert result.collective_ms == result.exposed_ms == pytest.approx(GATHER_MS)
    assert result.predicted_ms == pytest.approx(KERNEL_MS + GATHER_MS)


def test_kernels_between_start_and_done_hide_a_collective(read):
    result = read(entry(START, KERNEL, KERNEL, DONE))
    assert result.collective_ms == pytest.approx(GATHER_MS)
    assert result.exposed_ms == pytest.approx(GATHER_MS - 2 * KERNEL_MS)
    assert result.predicted_ms == pytest.approx(GATHER_MS)  # the kernels fit inside
    assert result.nothing_overlaps_ms == pytest.approx(GATHER_MS + 2 * KERNEL_MS)


def test_what_is_hidden_altogether_costs_nothing(read):
    result = read(entry(START, *[KERNEL] * 8, DONE))
    assert 8 * KERNEL_MS > GATHER_MS
    assert result.exposed_ms == 0
    assert result.predicted_ms == pytest.approx(8 * KERNEL_MS)


def test_kernels_before_the_start_and_after_the_end_hide_nothing(read):
    assert read(entry(KERNEL, START, DONE, KERNEL)).exposed_ms == pytest.approx(GATHER_MS)


def test_two_at_once_share_the_links(read):
    assert read(entry(KERNEL, START, START, DONE, DONE)).exposed_ms == pytest.approx(2 * GATHER_MS)


def test_a_sparse_core_sends_from_where_it_is_given_what_to_send(read):
    result = read(ON_SPARSE_CORE.format() + entry(CALL, KERNEL, UPDATE, KERNEL, KERNEL, CALL_DONE, KERNEL))
    (transfer,) = result.transfers
    assert (transfer.kind, transfer.payload_bytes) == ("all-gather", 4 * 2**20)
    assert result.exposed_ms == pytest.approx(GATHER_MS - 2 * KERNEL_MS)
    assert result.copy_wait_ms == 0
    assert not result.doubts


def test_what_a_sparse_core_does_that_is_not_known_makes_the_time_doubtful(read):
    sorts = entry(CALL.replace("%sends", "%sorts"), UPDATE, KERNEL, CALL_DONE)
    result = read(ON_SPARSE_CORE.format() + sorts)
    assert result.predicted_ms == pytest.approx(KERNEL_MS)
    assert result.doubts == ["what SparseCores send or move is counted as nothing"]


def test_a_loop_repeats_what_is_exposed_in_one_round(read):
    loop = f"%round (p: f32[8]) -> f32[8] {{{body(START, KERNEL, DONE)}}}\n\nENTRY %main (x: f32[8]) -> f32[8] {{\n"
    loop += "  %loop = (s32[], f32[8]) while(%x), condition=%condition, body=%round\n}\n"
    result = read(loop)
    (transfer,) = result.transfers
    assert transfer.calls == result.kernels[0].calls == 3
    assert result.exposed_ms == pytest.approx(3 * (GATHER_MS - KERNEL_MS))


def test_an_average_of_trips_is_given(read):
    loop = f"%round (p: f32[8]) -> f32[8] {{{body(KERNEL)}}}\n\nENTRY %main (x: f32[8]) -> f32[8] {{\n"
    loop += "  %loop = (s32[], f32[8]) while(%x), condition=%other, body=%round\n}\n"
    loop = "%other (c: s32[]) -> pred[] {\n  ROOT %c = pred[] parameter(0)\n}\n\n" + loop
    assert read(loop, {"loop": 2.5}).predicted_ms == pytest.approx(2.5 * KERNEL_MS)
    once = read(loop)
    assert once.predicted_ms == pytest.approx(KERNEL_MS)
    assert "number of trips unknown, counted once" in once.notes[0]


def test_the_longest_branch_is_counted(read):
    text = f"%one (p: f32[8]) -> f32[8] {{{body(KERNEL, KERNEL)}}}\n\n"
    text += f"%two (p: f32[8]) -> f32[8] {{{body(KERNEL)}}}\n\nENTRY %main (x: f32[8]) -> f32[8] {{\n"
    text += "  %either = f32[8] conditional(%p, %x, %x), branch_computations={%one, %two}\n}\n"
    result = read(text)
    assert result.predicted_ms == pytest.approx(2 * KERNEL_MS)
    assert "either (other): counted as its longest branch" in result.notes[0]


def test_bounds_enclose_the_prediction(read):
    result = read(entry(START, KERNEL, DONE))
    assert result.no_latency_ms < result.predicted_ms < result.nothing_overlaps_ms


def test_the_table_and_the_json_tell_the_parts_apart(read):
    result = read(entry(KERNEL, NOW))
    assert f"exposed collectives {GATHER_MS:.4f} ms of {GATHER_MS:.4f}" in result.table()
    assert "all-gather, 4.19 MB" in result.table()
    json = result.to_json()
    assert json["parts"] == {
        "Pallas": pytest.approx(KERNEL_MS),
        "XLA": 0,
        "exposed collectives": pytest.approx(GATHER_MS),
        "waiting for copies": 0,
    }
    assert sum(json["scopes"].values()) == pytest.approx(json["predicted_ms"])


def test_a_bar_is_as_wide_as_its_part(read):
    root = ElementTree.fromstring(
        picture.bars_svg({"step": {"Pallas": 3.0, "XLA": 0.0, "rest": 1.0}, "half": {"a": 2}})
    )
    widths = [
        float(r.attrib["width"]) for r in root.iter("{http://www.w3.org/2000/svg}rect") if r.attrib["height"] == "22"
    ]
    assert widths == [picture.WIDTH * 3 / 4, picture.WIDTH / 4, picture.WIDTH / 2]
    assert "Pallas 3 ms" in " ".join(root.itertext())
    assert "<svg" in schedule.page({"step": read(entry(KERNEL, NOW))})


def test_bars_of_nothing_are_an_error():
    with pytest.raises(ValueError, match="no bar to draw"):
        picture.bars_svg({"step": {"XLA": 0.0}})
