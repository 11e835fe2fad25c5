# SPDX-License-Identifier: Apache-2.0
"""A whole kernel: a checked-in schedule of a small one, and, where libtpu is installed, the compiler itself.

`data/gather_v6e` is what libtpu 0.0.48.1 dumps of `tpu_cases.gather` for v6e, less comments that are not read.
"""

import importlib.util
import itertools
import json
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from bench.tpu import arrays, dump, hlo, kernel, picture, scalar, schedule, units
from bench.tpu.core import CORES, core_of
from bench.tpu.record import Program
from grug_kernels import dispatch
from tests.bench import tpu_cases
from tests.bench.test_tpu_schedule_scalar import listing

DATA = Path(__file__).parent / "data" / "gather_v6e"
CORE = core_of("v6e")
BLOCK_BYTES = 4 * int(np.prod(tpu_cases.GATHER_BLOCK))
TABLE_BYTES = 512  # six words, but a DMA brings a tile

HLO = """HloModule jit_gather, is_scheduled=true

ENTRY %main.1 (table.1: s32[6], x.1: f32[192,128]) -> f32[192,128] {
  %x.1 = f32[192,128]{1,0:T(8,128)} parameter(1)
  %table.1 = s32[6]{0:T(128)} parameter(0)
  %copy-start.1 = (f32[64]{0}, f32[64]{0:S(1)}, u32[]{:S(2)}) copy-start(%x.1)
  ROOT %gather.1 = f32[192,128]{1,0:T(8,128)} custom-call(%table.1, %x.1), custom_call_target="tpu_custom_call"
}
"""

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed (uv sync --extra tpu): nothing here can compile for a TPU",
)


def program(text: str, directory: Path, aliases: dict[str, str] | None = None) -> Program:
    compiled = dump.Compiled(text, {}, 1.5, 1.5, directory, aliases or {})
    return Program(tpu_cases.LOWERED, compiled, hlo.parse(text))


@pytest.fixture
def gather_files():
    return dump.KernelFiles(*((DATA / f"{n}.txt").read_text() for n in ("bundles", "utilization", "allocations")))


@pytest.fixture
def dumped(tmp_path):
    """As libtpu leaves it."""
    parts = {
        "00-pre-finalize-registers-and-allocations": "allocations",
        "01-final_hlo-static-per-bundle-utilization": "utilization",
        "03-final_bundles": "bundles",
    }
    for part, ours in parts.items():
        (tmp_path / f"1795-gather.1-{part}.txt").write_text((DATA / f"{ours}.txt").read_text())
    return program(HLO, tmp_path)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [0, 0, 1, 1, 2, 2], [5, 5, 5, 5, 5, 5], [3, 0, 0, 3, 0, 0]])
def test_blocks_are_fetched_as_often_as_the_table_changes(gather_files, order):
    """The pipeline skips a block that it has: bytes follow the table's values, which only execution knows."""
    count = kernel.count(gather_files, CORE, {0: np.pad(np.array(order, np.int32), (0, 122))})
    fetches = 1 + sum(a != b for a, b in itertools.pairwise(order))
    assert count.dmas == 1 + fetches + len(order)
    assert count.hbm_bytes == TABLE_BYTES + (fetches + len(order)) * BLOCK_BYTES
    assert not count.warnings
    assert not count.missing_operands


def test_cycles_add_up(gather_files):
    """4419: the prototype of this reader counted 4415 on the same dump, with 90 % of the HBM bandwidth and not 87."""
    count = kernel.count(gather_files, CORE)
    waits = count.interlock_cycles + count.matrix_stall_cycles + count.dma_wait_cycles
    assert count.cycles == count.bundles + waits == 4419
    assert sum(region.cycles for region in count.regions) == count.cycles
    assert sum(region.wait_cycles for region in count.regions) == waits
    assert count.missing_operands == (0,)
    assert count.vmem_bytes == 0x12000 + 2 * 2 * BLOCK_BYTES  # scratch, two windows of two buffers
    body = max(count.regions, key=lambda region: region.slots["VSTORE"])
    assert body.runs == 6
    assert body.slots["VSTORE"] == pytest.approx(6 * 4 / 2 / body.cycles)  # 4 registers a block, 2 slots a bundle


def test_files_of_two_programs_are_refused(gather_files):
    other = dump.KernelFiles(listing("{}"), gather_files.utilization, gather_files.allocations)
    with pytest.raises(ValueError, match="1 bundles, but utilization of 103"):
        kernel.count(other, CORE)


def test_a_schedule_names_what_it_does_not_know(dumped, caplog):
    result = schedule.read(tpu_cases.record("v6e"), dumped)
    (gather,) = result.kernels
    assert gather.is_pallas
    assert (gather.calls, gather.count.cycles, result.copied_bytes) == (1, 4419, 64 * 4)
    assert result.predicted_ms == pytest.approx(4419 / CORE.clock_hz * 1e3)
    assert "gather.1: operand 0 (%table.1) is read as scalars and known at run time only" in caplog.text
    assert "Pass smem={('gather', 0): array}" in result.table()
    assert json.loads(json.dumps(result.to_json()))["kernels"][0]["count"]["dmas"] == 8


def with_copy(words: int, done_first: bool) -> str:
    """The module with a copy from HBM to HBM that starts before the kernel, and is waited for before it or after."""
    start, root = (next(line for line in HLO.splitlines() if name in line) for name in ("copy-start.1", "ROOT"))
    copy = f"(f32[{words}]{{0}}, f32[{words}]{{0}}, u32[]{{:S(2)}}) copy-start(%x.1)"
    done = f"  %copy-done.1 = f32[{words}]{{0}} copy-done(%copy-start.1)"
    body = [f"  %copy-start.1 = {copy}", done, root] if done_first else [f"  %copy-start.1 = {copy}", root, done]
    return HLO.replace(f"{start}\n{root}", "\n".join(body))


@pytest.mark.parametrize(
    ("words", "done_first", "share"),
    [
        (64, False, 0.0),  # a small one moves while the kernel waits for its semaphores
        (64, True, 1.0),
        (10**6, True, 1.0),
        (10**6, False, None),  # what the kernel leaves of its time is taken off
    ],
)
def test_a_copy_is_waited_for_where_kernels_leave_it_no_time(dumped, words, done_first, share):
    with_it = program(with_copy(words, done_first), dumped.compiled.directory)
    result = schedule.read(tpu_cases.record("v6e"), with_it)
    seconds = 2 * 4 * words / (CORE.hbm_bytes_per_second * scalar.HBM_EFFICIENCY)
    (gather,) = result.kernels
    if share is None:
        bandwidth = CORE.hbm_bytes_per_second * scalar.HBM_EFFICIENCY
        share = 1 - (gather.predicted_ms / 1e3 - gather.count.hbm_bytes / bandwidth) / seconds
        assert 0.1 < share < 0.9
    assert result.copy_wait_ms == pytest.approx(1e3 * seconds * share)
    assert result.predicted_ms == pytest.approx(gather.predicted_ms + result.copy_wait_ms)
    assert f"waiting for copies {result.copy_wait_ms:.4f} ms of {result.copied_ms:.4f}" in result.table()


def test_a_conversion_on_a_sparse_core_is_waited_for(dumped):
    """XLA gives changes of layout to SparseCores; nothing runs beside this one."""
    call = """  %format.call-start = ((), (), s32[]{:S(2)}) call-start(), to_apply=%format
  %format.call-update = ((f32[1000]{0}), f32[1000]{0}) call-update(%format.call-start, %x.1)
  %format.call-done = f32[1000]{0} call-done(%format.call-update)
"""
    called = """%format (x: f32[1000]) -> f32[1000] {
  %x = f32[1000]{0} parameter(0)
  ROOT %copy = f32[1000]{0} copy(%x)
}, execution_thread="sparsecore"

"""
    module = HLO.replace("  ROOT", call + "  ROOT").replace("ENTRY", called + "ENTRY")
    result = schedule.read(tpu_cases.record("v6e"), program(module, dumped.compiled.directory))
    seconds = 2 * 4000 / (CORE.hbm_bytes_per_second * scalar.HBM_EFFICIENCY)
    assert result.copy_wait_ms == pytest.approx(1e3 * seconds)
    assert not any("SparseCore" in note for note in result.notes)
    module = module.replace("copy(%x)", "sort(%x)")
    result = schedule.read(tpu_cases.record("v6e"), program(module, dumped.compiled.directory))
    assert result.copy_wait_ms == 0
    assert "counted as nothing: 1 call to a SparseCore" in result.table()


def test_scalars_given_by_the_caller_are_used(dumped):
    result = schedule.read(tpu_cases.record("v6e"), dumped, {("gather", 0): np.arange(6, dtype=np.int32)})
    assert result.kernels[0].count.dmas == 13
    assert not result.notes


def test_scalars_for_a_kernel_that_is_not_there_are_an_error(dumped):
    with pytest.raises(ValueError, match=r"no kernel has \[\('gahter', 0\)\]; Pallas kernels here: gather.1"):
        schedule.read(tpu_cases.record("v6e"), dumped, {("gahter", 0): np.arange(6)})


def test_an_equal_kernel_is_found_under_its_alias(dumped):
    root = next(line for line in HLO.splitlines() if "ROOT" in line)
    twice = HLO.replace(root, f"{root.replace('ROOT ', '')}\n{root.replace('gather.1', 'gather.7')}")
    again = program(twice, dumped.compiled.directory, {"gather.7": "gather.1"})
    result = schedule.read(tpu_cases.record("v6e"), again)
    assert [k.name for k in result.kernels] == ["gather.1", "gather.7"]


def test_the_map_of_equal_kernels_is_read(tmp_path):
    entry = "key:fusion.1\nordinal:0\nequivalent_hlos[size=2]:\n  fusion.1\n  fusion.9\nkey:b\nordinal:1\n"
    (tmp_path / "1-TLP-00-deduplication-map.txt").write_text(entry + "equivalent_hlos[size=1]:\n  b")
    assert dump.read_aliases(tmp_path) == {"fusion.1": "fusion.1", "fusion.9": "fusion.1", "b": "b"}


def test_a_picture_is_one_svg_on_one_scale(gather_files):
    slow = kernel.count(gather_files, CORE, {0: np.arange(128, dtype=np.int32)})
    fast = kernel.count(gather_files, CORE)
    root = ElementTree.fromstring(picture.svg({"slow <kernel>": slow, "fast": fast}))
    text = " ".join(root.itertext())
    assert "slow <kernel>" in text
    assert f"{fast.cycles:,} cycles" in text
    right = [
        max(_right_edges(picture.svg({"slow": slow, "other": count}), top)) for count, top in [(slow, 0), (fast, 1)]
    ]
    assert right[0] == pytest.approx(picture.LABEL + picture.WIDTH, abs=2)
    assert right[1] == pytest.approx(picture.LABEL + picture.WIDTH * fast.cycles / slow.cycles, abs=2)
    assert picture.page({"fast": fast}).count("<svg") == 1


def _right_edges(svg: str, kernel_number: int) -> list[float]:
    """Where the rectangles of one kernel end; kernels lie below one another."""
    root = ElementTree.fromstring(svg)
    rectangles = [r.attrib for r in root.iter("{http://www.w3.org/2000/svg}rect") if "x" in r.attrib]
    height = float(root.attrib["height"]) / 2
    return [float(r["x"]) + float(r["width"]) for r in rectangles if float(r["y"]) // height == kernel_number]


def test_fuller_is_darker(gather_files):
    """The gather leaves its matrix units empty and fills all store slots in some bundles."""
    root = ElementTree.fromstring(picture.svg({"gather": kernel.count(gather_files, CORE)}))
    fills = {element.attrib.get("fill") for element in root.iter()}
    assert {"#f1f5f9", "#1e40af"} <= fills


def test_a_picture_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no kernel to draw"):
        picture.svg({})


def test_an_unknown_chip_is_an_error():
    with pytest.raises(ValueError, match="no TPU is called 'v7x'; the schedule reader knows v4, v5e, v5p, v6e, tpu7x"):
        schedule.analyze(*tpu_cases.gather(), "v7x")


@pytest.mark.parametrize(("name", "gigahertz"), [("v5e", 1.5), ("v5p", 1.75)])
def test_the_clock_is_the_published_one(name, gigahertz):
    assert CORES[name].clock_hz / 1e9 == pytest.approx(gigahertz, rel=0.003)


def test_a_case_that_is_not_there_is_an_error(tmp_path):
    (tmp_path / "mine.py").write_text("def matmul(): ...\n")
    with pytest.raises(ValueError, match=r"has no case\(\); it has matmul"):
        schedule.load_case(f"{tmp_path}/mine.py:case")
    with pytest.raises(ValueError, match=r"expected FILE.py:name"):
        schedule.load_case("nowhere.py:case")


def test_without_libtpu_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="uv sync --extra tpu"):
        schedule.analyze(*tpu_cases.gather(), "v6e")


@pytest.mark.parametrize(("status", "error"), [(-11, dump.Refused), (1, RuntimeError)], ids=["crash", "our_mistake"])
def test_a_compiler_that_dies_is_quoted(monkeypatch, status, error):
    """A crash of the compiler is its refusal; a worker that fails otherwise is our own mistake, and no row."""
    died = subprocess.CompletedProcess([], returncode=status, stdout="", stderr="Fatal: check failed\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: died)
    message = f"compiling for v6e:2x2 died with exit status {status}:\nFatal: check failed"
    with pytest.raises(RuntimeError, match=message) as raised, dump.compiled(tpu_cases.LOWERED, schedules=False):
        pass
    assert type(raised.value) is error


def test_lowering_needs_no_libtpu():
    topology = tpu_cases.topology("v6e", 2, 2, 1)
    with dump.targeting(topology):
        lowered = dump.lower(dump.trace(*tpu_cases.gather()), topology)
    assert b"tpu_custom_call" in lowered.module
    assert lowered.devices == (0,)


@pytest.mark.parametrize("chip", ["v5p", "v6e"])
def test_functions_are_traced_as_for_the_chip(chip):
    seen = []

    def function(x):
        seen.append((dispatch.platform(), str(pltpu.get_tpu_info().chip_version)))
        return x

    with dump.targeting(tpu_cases.topology(chip, 2, 2, 1)):
        dump.trace(function, (np.zeros(8, np.float32),))
    assert seen == [("tpu", chip)]


@needs_libtpu
def test_the_checked_in_schedule_is_what_libtpu_makes():
    result = schedule.analyze(*tpu_cases.gather(), "v6e", smem={("gather", 0): np.arange(6, dtype=np.int32)})
    files = dump.KernelFiles(*((DATA / f"{n}.txt").read_text() for n in ("bundles", "utilization", "allocations")))
    table = {0: arrays.pack_words(np.arange(6, dtype=np.int32), "{0:T(128)}")}
    assert result.kernels[0].count == kernel.count(files, CORE, table)


@needs_libtpu
def test_a_refusal_is_the_compilers_own_sentence():
    with pytest.raises(dump.Refused, match=r"v6e: compile raised JaxRuntimeError: .*vmem"):
        schedule.analyze(*tpu_cases.too_large(), "v6e")


@needs_libtpu
@pytest.mark.parametrize("chip", ["v5p", "tpu7x"])
def test_a_matmul_streams_what_its_arithmetic_asks_for(chip):
    """Matrix-unit cycles are FLOPs over FLOPs per cycle, whatever the schedule."""
    result = schedule.analyze(*tpu_cases.matmul(512, 256), chip)
    count, core = max(result.kernels, key=lambda k: k.predicted_ms).count, core_of(chip)
    assert count.matrix_busy * count.cycles == pytest.approx(2 * 512**3 / core.flops_per_cycle)
    assert not count.warnings
    assert units.SLOTS[0] in result.to_json()["kernels"][0]["count"]["slots"]


@needs_libtpu
@pytest.mark.parametrize("chip", ["v5e", "v5p"])
def test_a_transposed_matmul_streams_no_more_than_any_other(chip):
    """XLA's x.T @ y has the matrix units transpose x and streams half registers; each was counted as a whole one."""
    x = jax.ShapeDtypeStruct((512, 1024), jnp.bfloat16)
    result = schedule.analyze(lambda x, y: jnp.dot(x.T, y, preferred_element_type=jnp.float32), (x, x), chip)
    count, core = max(result.kernels, key=lambda k: k.predicted_ms).count, core_of(chip)
    flops = 2 * 512 * 1024**2 / core.cores_per_device
    assert count.matrix_busy * count.cycles == pytest.approx(flops / core.flops_per_cycle)
