# SPDX-License-Identifier: Apache-2.0
"""Matrix-unit stalls, slot use and the optimised HLO, on texts written by hand."""

import dataclasses

import numpy as np
import pytest

from bench.tpu import arrays, hlo, kernel, program, units
from bench.tpu.core import core_of
from tests.bench.test_tpu_schedule_scalar import listing

V6E, V5P = core_of("v6e"), core_of("v5p")


def stalls(bundles: list[str], is_loop: bool = False, core=V6E) -> dict[int, int]:
    parsed = program.parse(listing(*bundles))
    return units.matrix_stalls(parsed, program.Block(0, len(bundles), None, None), is_loop, core)


@pytest.mark.parametrize(
    ("opcode", "core", "cycles"),
    [
        ("vmatmul.mubr.bf16.gmra.mrb[0].mxu0", V6E, 8),  # 16 rows, two a cycle
        ("vmatmul.mubr.f32.gmra.mrb[0].mxu0", V6E, 4),
        ("vmatmul.bf16.gmra.mxu0", V5P, 16),
        ("vmatmul.f32.gmra.mxu0", V5P, 8),
        ("vmatmul.lmr.bf16.gmra.16.mxu0", V5P, 8),  # half a register: one pop each, where a whole one has two
    ],
)
def test_a_matmul_takes_a_cycle_per_row(opcode, core, cycles):
    assert units.matrix_cycles(opcode, core) == cycles


MATMUL = "{ %1 = vmatmul.mubr.bf16.gmra.mrb[0].mxu0 %v1_v1 }"


def test_a_queue_with_room_does_not_stall():
    assert stalls([MATMUL] * units.MATRIX_QUEUE) == {}


def test_a_full_queue_lets_one_in_whenever_one_streams():
    """Number i waits until number i - 8 streams, at 8 (i - 8); until then one was issued per cycle."""
    waits = stalls([MATMUL] * 20)
    issued, expected = 0, {}
    for i in range(20):
        until = 8 * (i - 8)
        if until > issued:
            expected[i] = until - issued
        issued = max(issued, until) + 1
    assert waits == expected


def test_a_loop_runs_at_the_pace_of_its_matrix_unit():
    """In the steady state the queue is full from the start: 20 matmuls of 8 cycles take 160, not 89."""
    waits = stalls([MATMUL] * 20, is_loop=True)
    assert sum(waits.values()) + 20 == 160


def test_two_units_stream_side_by_side():
    both = MATMUL[:-2] + " ;; %2 = vmatmul.mubr.bf16.gmra.mrb[0].mxu1 %v2_v2 }"
    assert stalls([both] * 20) == stalls([MATMUL] * 20)


def test_a_pop_waits_for_its_result():
    """The shortest way from issue to pop, here 5 cycles, is the latency; the second result streams 8 cycles later."""
    pop = "{ %v3_v3 = vpop.f32.mrb[0].mxu0 }"
    assert stalls([MATMUL, MATMUL, "{}", "{}", "{}", pop, "{}", pop]) == {7: 8 + 5 - 7}


def test_matmuls_of_a_program_are_shared_by_its_units():
    assert units.matrix_busy_cycles(program.parse(listing(MATMUL, "{}")), V6E) == [4.0, 0.0]


UTILIZATION = """== CAPACTIY:
MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    2     2     4     2     1     3     3     2     2     2
== UTILIZATION:
1 0 4 0 0 0 0 0 0 0
0 0 0 0 1 2 1 2 2 1
"""


def test_slots_are_weighted_by_how_often_a_bundle_runs():
    use = units.parse_utilization(UTILIZATION)
    assert use.slots([10, 3]) == dict(zip(units.SLOTS, [10, 0, 40, 0, 3, 6, 3, 6, 6, 3], strict=True))
    assert use.shares([10, 3], cycles=20)["VALU"] == 40 / (20 * 4)


def test_a_column_too_many_is_an_error():
    with pytest.raises(ValueError, match=r"3 lines of \[11\] numbers. Expected .* 10 numbers each: MXU, XLU"):
        units.parse_utilization("\n".join(["1 " * 11] * 3))


def test_vmem_is_summed_over_allocations():
    text = (
        "#allocation2 [shape = 'u32[144,128]', space=vmem, size = 0x12000, scoped]\n"
        "#allocation3 [shape = 's32[1]', space=sflag, size = 0x4, scoped]\n"
        "#allocation4_spill [shape = 'u8[4096]', space=vmem, size = 0x1000, scoped]\n"
    )
    assert units.vmem_bytes(text) == 0x13000


HLO = """HloModule jit_step, is_scheduled=true

%body.1 (p.1: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p.1 = (s32[], f32[8]{0}) parameter(0)
  ROOT %fusion.2 = (s32[], f32[8]{0}) fusion(%p.1), kind=kLoop, calls=%inner
}

%cond.1 (p.2: (s32[], f32[8])) -> pred[] {
  %p.2 = (s32[], f32[8]{0}) parameter(0)
  %constant.9 = s32[] constant(12)
  %i.1 = s32[] get-tuple-element(%p.2), index=0
  ROOT %lt.1 = pred[] compare(%i.1, %constant.9), direction=LT
}

ENTRY %main.1 (x.1: f32[8]) -> f32[8] {
  %x.1 = f32[8]{0:T(256)} parameter(0), metadata={op_name="a
b"}
  %constant.1 = s8[2,3]{1,0:T(4,128)(4,1)} constant({ { 1, -2, 3 }, { 4, 5, 6 } })
  %copy-start.1 = (s8[2,3]{1,0:T(4,128)(4,1)S(1)}, s8[2,3]{1,0}, u32[]{:S(2)}) copy-start(%constant.1)
  %copy-done.1 = s8[2,3]{1,0:T(4,128)(4,1)S(1)} copy-done(%copy-start.1)
  %while.1 = (s32[], f32[8]{0}) while(%x.1), condition=%cond.1, body=%body.1
  %while.2 = (s32[], f32[8]{0}) while(%x.1), condition=%cond.1, body=%body.1, config={"known_trip_count":{"n":"5"}}
  ROOT %kernel.1 = f32[8]{0} custom-call(%copy-done.1, /*index=1*/%x.1), frontend_attributes={kernel_metadata={
"xprof_metadata":"1"
}}, custom_call_target="tpu_custom_call"
}
"""


def loops(module: hlo.Module) -> list[hlo.Instruction]:
    return [i for i in module.computations[module.entry] if i.opcode == "while"]


def test_trips_are_read_from_the_condition_or_xlas_own_count():
    module = hlo.parse(HLO)
    assert [module.trips_or_one(loop) for loop in loops(module)] == [12, 5]
    assert not module.notes


def test_a_loop_of_unknown_length_is_told():
    module = hlo.parse(HLO.replace("direction=LT", "direction=NE"))
    assert [module.trips_or_one(loop) for loop in loops(module)] == [1, 5]
    (note,) = module.notes
    assert note.startswith(
        "loop while.1 (other): number of trips unknown, counted once. Pass trips={'while.1': number}"
    )


FRAMES = """FileNames
1 "/here/grug_model/base/model.py"
2 "/here/grug_kernels/attention/xla.py"
3 "/here/bench/tpu/record.py"
4 "/lib/site-packages/optax/transforms/_clipping.py"
5 "/here/grug_kernels/dispatch.py"

FunctionNames
1 "MLP.__call__"
2 "attention"

FileLocations
1 {file_name_id=3 function_name_id=2 line=1}
2 {file_name_id=2 function_name_id=2 line=2}
3 {file_name_id=1 function_name_id=1 line=3}
4 {file_name_id=4 function_name_id=2 line=4}
5 {file_name_id=5 function_name_id=2 line=5}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=2}
4 {file_location_id=4 parent_frame_id=4}
5 {file_location_id=5 parent_frame_id=4}

"""


def test_trips_are_given_by_part_of_a_name_a_path_or_a_scope():
    unknown = HLO.replace("direction=LT", "direction=NE").replace(
        "body=%body.1\n", 'body=%body.1, metadata={op_name="jit(f)/while/inner/while" stack_frame_id=2}\n'
    )
    for key in ("while.1", "inner/while", "attention"):
        module = hlo.parse(FRAMES + unknown, {key: 2.5, "nothing": 3})
        assert module.trips_or_one(loops(module)[0]) == 2.5
        assert module.used_trips == {key}


@pytest.mark.parametrize(
    ("frame", "scope"),
    [
        (1, "other"),  # nothing but what compiles
        (2, "attention"),
        (3, "model.MLP"),
        (4, "optimizer"),
        (5, "model.MLP"),  # what passes a call on is not what it is for
        (9, "other"),
    ],
)
def test_a_scope_is_where_in_the_source_an_operation_comes_from(frame, scope):
    module = hlo.parse(FRAMES + HLO)
    assert module.scope(hlo.Instruction("x", "add", "f32[]", (), f"%a), metadata={{stack_frame_id={frame}}}")) == scope


def test_constants_are_followed_into_loops_that_hand_them_on():
    """Splash attention's plan of blocks, read in a scan over layers. What the body changes is not known."""
    program = """HloModule m, is_scheduled=true

%body (p: (s32[2], s32[2])) -> (s32[2], s32[2]) {
  %p = (s32[2]{0}, s32[2]{0}) parameter(0)
  %kept = s32[2]{0} get-tuple-element(%p), index=0
  %changed = s32[2]{0} get-tuple-element(%p), index=1
  %left = s32[2]{0} get-tuple-element(%p), index=2
  %right = s32[2]{0} get-tuple-element(%p), index=3
  %copy = s32[2]{0} copy(%kept)
  %sum = s32[2]{0} add(%kept, %changed)
  ROOT %next = (s32[2]{0}, s32[2]{0}) tuple(%kept, %sum, %right, %left)
}

ENTRY %main () -> s32[2] {
  %plan = s32[2]{0} constant({7, 8})
  %other = s32[2]{0} constant({1, 2})
  %start = (s32[2]{0}, s32[2]{0}) tuple(%plan, %plan, %plan, %other)
  %loop = (s32[2]{0}, s32[2]{0}) while(%start), condition=%condition, body=%body
  %after = s32[2]{0} get-tuple-element(%loop), index=0
  ROOT %sum_after = s32[2]{0} get-tuple-element(%loop), index=1
}
"""
    known = hlo.parse(program).constants()
    assert known["copy"][0].tolist() == known["after"][0].tolist() == [7, 8]
    assert not {"changed", "sum_after", "left", "right"} & set(known)


def test_constants_are_followed_through_copies():
    values, layout = hlo.parse(HLO).constants()["copy-done.1"]
    assert values.tolist() == [[1, -2, 3], [4, 5, 6]]
    assert layout == "{1,0:T(4,128)(4,1)S(1)}"


def test_operands_and_kind_of_a_kernel_are_read():
    kernel = hlo.parse(HLO).computations["main.1"][-1]
    assert kernel.operands == ("copy-done.1", "x.1")
    assert kernel.is_pallas


def test_text_that_is_no_module_is_an_error():
    with pytest.raises(ValueError, match="no ENTRY computation in 5 characters"):
        hlo.parse("hello")


@pytest.mark.parametrize(
    ("values", "layout", "words"),
    [
        (np.arange(3, dtype=np.int32), "{0:T(128)}", {0: 0, 1: 1, 2: 2, 127: 0}),
        (np.arange(6, dtype=np.int32).reshape(2, 3), "{1,0:T(2,128)}", {0: 0, 2: 2, 128: 3, 130: 5}),
        (np.arange(6, dtype=np.int32).reshape(2, 3), "{0,1:T(4,128)}", {0: 0, 1: 3, 128: 1, 257: 5}),
        (np.arange(12, dtype=np.int32).reshape(4, 3), "{1,0:T(2,128)}", {1: 1, 128: 3, 256: 6, 384: 9}),
        # Four rows of bytes share a word: byte r of word c is [r, c].
        (np.arange(8, dtype=np.int8).reshape(4, 2), "{1,0:T(4,128)(4,1)}", {0: 0x06040200, 1: 0x07050301}),
        # 512 bytes in a row are four rows of 128.
        ((np.arange(512) // 128).astype(np.int8), "{0:T(512)(128)(4,1)}", {0: 0x03020100, 127: 0x03020100}),
        (np.int32(7), "{:T(128)}", {0: 7}),
        (np.arange(4, dtype=np.int32), "{}", {0: 0, 3: 3}),
    ],
)  # fmt: skip
def test_an_array_lies_in_memory_as_its_layout_says(values, layout, words):
    packed = arrays.pack_words(values, layout)
    assert {index: int(packed[index]) for index in words} == words


def test_bytes_of_a_printed_tuple_leave_semaphores_out():
    assert arrays.all_bytes_of("(bf16[3]{0}, f32[]{:T(128)}, u32[]{:S(2)})") == 6 + 4


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[1000,300]{0,1:T(8,128)}", 304 * 1024 * 4),  # the rows lie along the lanes
        ("f32[]{:T(128)}", 128 * 4),
        ("bf16[3,5,130]{2,1,0:T(8,128)(2,1)}", 3 * 8 * 256 * 2),
        ("s32[7]{0}", 28),
    ],
)
def test_bytes_of_whole_tiles(shape, size):
    assert arrays.padded_bytes_of(shape) == size


def test_a_kernels_strip_is_its_regions_by_their_cycles():
    def region(cycles, wait_cycles, *shares):
        strip = dict.fromkeys(kernel.STRIP_UNITS, shares)
        return kernel.Region(0, len(shares), 1, 1, cycles, wait_cycles, 0.0, {}, 0, strip)

    regions = (region(300, 0, 1.0, 0.5, 0.0), region(100, 50, 1.0))
    numbers = dict.fromkeys((field.name for field in dataclasses.fields(kernel.Count)), 0)
    strip = kernel.Count(**(numbers | {"regions": regions})).strip()["MXU"]
    assert len(strip) == kernel.STRIP_BINS
    quarters = np.array(strip).reshape(4, -1)
    np.testing.assert_allclose(quarters, np.broadcast_to([[1.0], [0.5], [0.0], [0.5]], quarters.shape))


@pytest.mark.parametrize(
    ("opcode", "shape", "size"),
    [
        ("copy", "f32[8,4]{1,0}", 2 * 128),  # read and written
        ("copy", "pred[5]{0:S(1)}", 0),
        ("copy-start", "(f32[64]{0:S(1)}, f32[64]{0}, u32[]{:S(2)})", 256),  # to VMEM: only read
        ("copy-start", "(f32[64]{0}, f32[64]{0}, u32[]{:S(2)})", 512),
        ("slice-start", "((f32[1024]{0}), bf16[3]{0:S(1)}, u32[]{:S(2)})", 6),  # the slice, not what it is cut from
        ("call-update", "((bf16[16,8]{1,0:T(8,128)(2,1)}), bf16[16,8]{0,1:T(8,128)(2,1)})", 512),
        ("copy-start", "(f32[], f32[], u32[])", 0),
    ],
)
def test_what_a_copy_moves_in_hbm(opcode, shape, size):
    assert arrays.moved_bytes(opcode, shape) == size
