# SPDX-License-Identifier: Apache-2.0
"""Small programs, written by hand in libtpu's notation, parsed and executed."""

import math

import numpy as np
import pytest

from bench.tpu import program, scalar
from bench.tpu.core import core_of
from bench.tpu.program import Register

CORE = core_of("v6e")
EMPTY = ("{}",) * CORE.branch_delay_slots


def listing(*bundles: str) -> str:
    """`bundles` with their addresses, each "{ … }" and perhaps a comment."""
    return "\n".join(f"{'0' if a == 0 else f'{a:#x}':>6}   :  {bundle}" for a, bundle in enumerate(bundles)) + "\n"


def prepare(*bundles: str) -> scalar.Executable:
    parsed = program.parse(listing(*bundles))
    blocks = program.basic_blocks(parsed, CORE.branch_delay_slots)
    return scalar.prepare(parsed, blocks, [{}] * len(blocks))


def final_state(*bundles: str, tables=None):
    """Scalar registers, predicate registers and machine after one straight block."""
    executable = prepare(*bundles)
    machine = scalar.Machine(CORE, tables or {}, executable.spaces)
    scalars, predicates = [0] * 64, [False] * 32
    executable.functions[0](scalars, predicates, machine)
    return scalars, predicates, machine


def test_an_instruction_is_read_with_its_guard_and_all_registers():
    (bundle,) = program.parse(
        "     0   : > > { %45 = sbr.rel (!%p192_p3) target = $region25  ;;"
        "  %s8_s5 = sld [smem:[#allocation10 + %s7_s2]] (%p9_p1) /* core id */ } /* Start region 7 */\n"
    ).bundles
    branch, load = bundle.instructions
    assert bundle.loop_depth == 2
    assert (branch.opcode, branch.target_region, branch.dest) == ("sbr.rel", 25, None)
    assert branch.guard == program.Guard(Register("p", 3), negated=True)
    assert (load.dest, load.guard) == (Register("s", 5), program.Guard(Register("p", 1), negated=False))
    assert load.operands == ((program.Allocation("allocation10"), Register("s", 2)),)
    assert set(load.reads) == {Register("s", 2), Register("p", 1)}


def test_a_phi_waits_for_nothing():
    (bundle,) = program.parse("     0   :  { %s1_s4 = sphi %s2_s4, %s3_s4 /* phi copy */ }\n").bundles
    assert bundle.instructions[0].reads == ()


def test_a_missing_bundle_is_an_error():
    with pytest.raises(ValueError, match=r"bundle 0x1 is missing: 0x2 is printed in its place"):
        program.parse("     0   :  {}\n   0x2   :  {}\n")
    with pytest.raises(ValueError, match="no bundle found"):
        program.parse("= control target key start\n")


def test_a_branch_to_nowhere_is_an_error():
    with pytest.raises(ValueError, match="branch at 0x0 goes to region 9, which the program lacks"):
        prepare("{ %1 = sbr.rel target = $region9 }", *EMPTY)


# How a scatter ends, as libtpu 0.0.48.1 makes it for v5p: it waits for its fourth DMA, if it started four.
LAST_WAIT = (
    "{ %p15411_p4 = scmp.le.s32.totalorder %s67_s3, 3 } /* Start/End empty region 31 :: Start region 32 ::"
    " End region 32 :: Start region 33 :: Start region 34 */",
    "{ %91 = sbr.rel (%p15411_p4) target = $region35 }",
    "{}",
    "{}",
    "{}",
    "{} /* End region 33 */",
    "{ %16030 = dma.done.wait [#allocation3 + $0x3], 16 /* local-dma-wait */ }",
    "{ %16031 = vsyncadd [#allocation3 + $0x3], 4294967280 }",
    "{ %94 = sfence } /* End region 0 :: End region 18 :: End region 34 */",
    "{} /* exit bundle: %scatter_fusion = fusion(%broadcast.256, %bitcast.797, %bitcast.115) */",
)
# A whole kernel for v5p, less its work: the second core of the chip leaves at once.
FIRST_CORE_ONLY = (
    "{ %s3_s6 = sld [smem:[#allocation0]] /* megacore core id :: core id */ }",
    "{ %p20_p0 = scmp.ne.s32.totalorder %s3_s6, 0 } /* End region 1 */",
    "{ %10 = sbr.rel (%p20_p0) target = $region4 }",
    "{}",
    "{}",
    "{}",
    "{} /* End region 2 */",
    "{ %11 = vsyncpa [#allocation2], 0 } /* Start region 5 */",
    "{ %19 = vsyncpa [#allocation2], 1 } /* End region 0 :: End region 3 :: End region 5 */",
    "{} /* exit bundle: %broadcast.519 = broadcast(%constant.1042) */",
)


@pytest.mark.parametrize(("dmas", "bundles"), [(3, 1 + 6 + 1), (4, 1 + 6 + 3 + 1)])
def test_a_region_without_a_marker_may_be_the_end_of_the_program(dmas, bundles):
    """The preset 70b got no prediction: "the branch at 0x102f goes to region 35, which the program lacks"."""
    assert prepare(f"{{ %s1_s3 = smov {dmas} }}", *LAST_WAIT).run(CORE).bundles == bundles


def test_a_region_without_a_marker_is_behind_the_one_before_it():
    """And not where the next one by number begins: region 5 is in region 3, which the branch skips."""
    blocks = prepare(*FIRST_CORE_ONLY).blocks
    (leaving,) = (block for block in blocks if block.branch is not None)
    assert leaving.target is not None
    assert blocks[leaving.target].start == len(FIRST_CORE_ONLY) - 1


INT32 = [0, 1, -1, 5, 2**31 - 1, -(2**31), 123456789, -987654321]


@pytest.mark.parametrize("left", INT32)
@pytest.mark.parametrize("right", INT32)
def test_scalar_arithmetic_agrees_with_numpy(left, right):
    """Printed operands are unsigned; products, shifts and unsigned comparisons must be those of 32 bits."""
    x, y = np.int32(left), np.int32(right)
    shift = right & 31
    with np.errstate(over="ignore"):
        expected = {
            "smul.u32": x * y,
            "sand.u32": x & y,
            "sor.u32": x | y,
            "sxor.u32": x ^ y,
            "smax.s32": max(x, y),
            "smin.u32": min(np.uint32(x), np.uint32(y)).astype(np.int32),
        }
        shifted = {"sshll.u32": x << shift, "sshra.s32": x >> shift, "sshrl.u32": x.astype(np.uint32) >> shift}
    for opcode, answer in expected.items():
        scalars, *_ = final_state(f"{{ %s1_s1 = {opcode} {left & 0xFFFFFFFF}, {right & 0xFFFFFFFF} }}")
        assert scalars[1] == answer, opcode
    for opcode, answer in shifted.items():
        scalars, *_ = final_state(f"{{ %s1_s1 = {opcode} {left & 0xFFFFFFFF}, {shift} }}")
        assert scalars[1] == answer, opcode
    for kind, a, b in (("s32", x, y), ("u32", np.uint32(x), np.uint32(y))):
        arguments = f"{left & 0xFFFFFFFF}, {right & 0xFFFFFFFF}"
        _, predicates, _ = final_state(f"{{ %p1_p1 = scmp.lt.{kind}.totalorder {arguments} }}")
        assert predicates[1] == (a < b)


def test_a_bundle_reads_before_it_writes():
    scalars, *_ = final_state(
        "{ %s1_s1 = smov 11  ;;  %s2_s2 = smov 22 }",
        "{ %s3_s1 = smov %s2_s2  ;;  %s4_s2 = smov %s1_s1 }",
    )
    assert scalars[1:3] == [22, 11]


def test_a_change_of_type_in_the_bundle_of_its_operand_changes_nothing():
    """int_to_ptr names the register that its own bundle computes; read before write would restore the old value."""
    scalars, *_ = final_state("{ %s1_s1 = smov 7  ;;  %s2_s1 = int_to_ptr.vmem [resolvable:$true] %s1_s1 }")
    assert scalars[1] == 7


@pytest.mark.parametrize(("guard", "answer"), [("%p1_p1", 5), ("!%p1_p1", 0)])
def test_a_guard_decides_whether_a_register_or_memory_changes(guard, answer):
    scalars, _, machine = final_state(
        "{ %p1_p1 = scmp.eq.s32.totalorder 3, 3 }",
        f"{{ %s1_s1 = smov ({guard}), 5  ;;  %9 = sst [smem:[#allocation1]] ({guard}), 5 }}",
        f"{{ %9 = sst [smem:[#allocation1 + $0x2]] ({guard}), 8 }}",
        "{ %s2_s2 = sld [smem:[#allocation1]] }",
    )
    assert scalars[1] == scalars[2] == answer
    assert len(machine.memory) == (2 if answer else 0)


def test_a_remainder_arrives_where_it_is_popped():
    """Two divisions under way, one of which is not done: each remainder is its own division's."""
    scalars, *_ = final_state(
        "{ %p1_p1 = scmp.eq.s32.totalorder 3, 4 }",
        "{ %7 = sdivrem.u32 (%p1_p1), 14, 5 /* kRem */ }",
        "{ %8 = sdivrem.u32 14, 3 /* kRem */ }",
        "{ %s1_s4 = spop.drf %7 }",
        "{ %s2_s5 = spop.drf %8 }",
    )
    assert scalars[4:6] == [0, 2]


def test_a_division_that_is_not_asked_for_its_remainder_is_told_of():
    trace = prepare("{ %7 = sdivrem.u32 14, 3 }", "{ %s1_s4 = spop.drf %7 }").run(CORE)
    assert trace.warnings == ("1 sdivrem.u32 not understood, taken as 0",)


def test_the_upper_half_of_a_product():
    scalars, *_ = final_state("{ %s1_s1 = smov 4294967295 }", "{ %s2_s2 = smulhi.u32 %s1_s1, 6 }")
    assert scalars[2] == 5


@pytest.mark.parametrize(("number", "answer"), [(0, 0b111), (2, 0b10111), (-1, -1)])
def test_a_shift_that_brings_in_ones(number, answer):
    scalars, *_ = final_state(f"{{ %s1_s1 = smov {number} }}", "{ %s2_s2 = sshllo.u32 %s1_s1, 3 }")
    assert scalars[2] == answer


COUNT_TO_FIVE = (
    "{ %s1_s0 = smov 0 }",
    "{ %s2_s0 = sadd.s32 1, %s2_s0 } /* Start region 1 */",
    "{ %p1_p0 = scmp.lt.s32.totalorder %s2_s0, 5 }",
    "{ %9 = sbr.rel (%p1_p0) target = $region1 }",
    *EMPTY,
    "{}",
)


def test_a_loop_is_followed_and_its_waits_counted():
    """Seven bundles five times, delay slots included; the branch waits one cycle for its predicate each time."""
    trace = prepare(*COUNT_TO_FIVE).run(CORE)
    assert list(trace.runs) == [1, 5, 1]
    assert (trace.bundles, trace.interlock_cycles) == (1 + 5 * 7 + 1, 5)
    assert trace.total_cycles == 42
    assert not trace.warnings


def test_a_branch_in_the_delay_slots_of_a_taken_branch_does_nothing():
    """As TPU7x programs have them: the second belongs to the path that the first one left."""
    bundles = [
        "{ %1 = sbr.rel (%p1_p0) target = $region1 }",
        "{ %2 = sbr.rel target = $region2 }",
        *EMPTY,
        "{ %s1_s1 = smov 1 } /* Start region 1 */",
        "{}",
        "{ %s2_s2 = smov 1 } /* Start region 2 */",
    ]
    not_taken = prepare("{ %p1_p0 = scmp.eq.s32.totalorder 0, 1 }", "{}", *bundles).run(CORE)
    taken = prepare("{ %p1_p0 = scmp.eq.s32.totalorder 0, 0 }", "{}", *bundles).run(CORE)
    assert taken.bundles - not_taken.bundles == 1  # enters region 1 (two bundles), leaves one slot sooner


def blocks_of_a_tpu7x(*bundles: str) -> list[program.Block]:
    """Of a branch, which has six slots, and `bundles` behind it."""
    branch = "{ %1 = sbr.rel (%p1_p0) target = $region9 } /* Start region 1 */"
    whole = program.parse(listing(branch, *bundles, *["{ %s9_s9 = smov 9 }"] * 9, "{} /* Start region 9 */"))
    return program.basic_blocks(whole, branch_delay_slots=6, filled=True)


SLOT = "{ %s1_s1 = smov 1 }"


@pytest.mark.parametrize(
    ("bundles", "last", "fill"),
    [
        (["{}", SLOT], 1, 5),  # one for all six
        ([SLOT, SLOT, "{}", SLOT], 3, 3),
        ([SLOT] * 6, 6, 0),
        (["{}"] * 6, 6, 0),  # in programs of collectives every bundle is written
        ([SLOT, "{}", "{}", SLOT, SLOT, SLOT], 6, 0),
        (["{}", SLOT, "{}", SLOT + " /* End region 1 */", "{}", SLOT], 5, 1),  # the first two wait for registers
        (["{}", SLOT, SLOT + " /* Start region 2 */", SLOT, SLOT + " /* End region 2 */", SLOT], 1, 5),
    ],
)
def test_an_empty_bundle_of_a_tpu7x_stands_for_the_slots_that_are_left(bundles, last, fill):
    first, second, *_ = blocks_of_a_tpu7x(*bundles)
    assert (first.stop, first.fill, first.branch) == (last + 1, fill, 0)
    assert (second.start, second.branch) == (last + 1, None)


def test_of_two_branches_that_share_their_slots_the_first_leaves_before_what_fills_them():
    first, second, *_ = blocks_of_a_tpu7x("{ %2 = sbr.rel (%p1_p1) target = $region9 }", SLOT, "{}", SLOT)
    assert (first.stop, first.branch, first.fill) == (3, 0, 0)
    assert (second.stop, second.branch, second.fill) == (4, 1, 4)


def test_the_slots_that_are_left_take_their_cycles():
    core = core_of("tpu7x")
    loop = ["{ %s1_s0 = sadd.s32 1, %s1_s0 } /* Start region 1 */", "{ %p1_p0 = scmp.lt.s32.totalorder %s1_s0, 3 }"]
    branch = [
        "{ %9 = sbr.rel (%p1_p0) target = $region1 }",
        "{}",
        "{ %s2_s0 = sadd.s32 7, %s1_s0 } /* Start region 2 */",
    ]
    parsed = program.parse(listing("{ %s1_s0 = smov 0 }", *loop, *branch, "{}"))
    blocks = program.basic_blocks(parsed, core.branch_delay_slots, core.fills_slots)
    trace = scalar.prepare(parsed, blocks, [{}] * len(blocks)).run(core)
    assert list(trace.runs) == [1, 3, 1]  # with six slots the next region would add to the counter
    assert trace.interlock_cycles == 3 * (1 + 5)  # for the predicate, and five slots more
    assert trace.total_cycles == trace.bundles + trace.interlock_cycles


def test_a_wait_lasts_until_the_transfer_has_arrived():
    granules = 10_000
    trace = prepare(
        "{ %s1_s1 = inlined_call_operand.hbm [shape: f32[2048,512], index: 1, kind: input, shape index: {}] }",
        f"{{ %2 = dma.hbm_to_vmem [thread:$0] %s1_s1, {granules}, [#allocation2], [#allocation3] }}",
        f"{{ %3 = dma.done.wait [#allocation3], {granules} }}",
    ).run(CORE)
    seconds = granules * 32 / (1638e9 * scalar.HBM_EFFICIENCY) + scalar.HBM_LATENCY_SECONDS
    assert trace.total_cycles == math.ceil(1 + seconds * CORE.clock_hz) + 1
    assert (trace.dmas, trace.hbm_bytes) == (1, granules * 32)
    assert trace.dma_wait_cycles == trace.total_cycles - 3


def test_transfers_share_the_bandwidth_and_semaphores_keep_them_apart():
    issue = "{{ %2 = dma.hbm_to_vmem 0, 10000, 0, [#allocation{}] }}"
    first = prepare(issue.format(1), issue.format(2), "{ %3 = dma.done.wait [#allocation1], 10000 }").run(CORE)
    second = prepare(issue.format(1), issue.format(2), "{ %3 = dma.done.wait [#allocation2], 10000 }").run(CORE)
    transfer = 320_000 / (1638e9 * scalar.HBM_EFFICIENCY) * CORE.clock_hz
    assert second.total_cycles - first.total_cycles == pytest.approx(transfer, abs=2)


def test_a_general_dma_is_told_by_its_pointers():
    _, _, machine = final_state(
        "{ %s1_s1 = inlined_call_operand.hbm [shape: f32[8], index: 0, kind: input, shape index: {}] }",
        "{ %2 = dma.general /*src=*/%s1_s1, /*size=*/64, /*dst=*/[#allocation2], [#allocation3], 0 }",
        "{ %3 = dma.general /*src=*/[#allocation4], /*size=*/64, /*dst=*/[#allocation2], [#allocation3], 0 }",
        tables={0: np.arange(8, dtype=np.int32)},
    )
    assert (machine.dmas, machine.hbm_bytes) == (2, 64 * 32)
    assert not machine.memory  # to VMEM, not to scalar memory


READ_TABLE = (
    "{ %s1_s1 = inlined_call_operand.hbm [shape: s32[8], index: 2, kind: input, shape index: {}] }",
    "{ %2 = dma.hbm_to_smem /*hbm=*/%s1_s1, /*size_in_granules=*/1, /*smem=*/[#allocation4], [#allocation3] }",
    "{ %3 = dma.done.wait [#allocation3], 1 }",
    "{ %s2_s2 = sld [smem:[#allocation4 + $0x3]] }",
)


def test_a_table_is_read_from_the_operand():
    scalars, _, machine = final_state(*READ_TABLE, tables={2: np.arange(100, 108, dtype=np.int32)})
    assert scalars[2] == 103
    assert not machine.missing


def test_a_pointer_counts_granules_shifted_or_not():
    """int_to_ptr takes an address shifted left by four; a transfer then names the same granule of the operand."""
    words = np.arange(100, 164, dtype=np.int32)
    pointer, copy, wait, load = READ_TABLE
    offset = "{ %s1_s1 = scalar_lea.hbm %s1_s1, 2 }"
    shift = "{ %s5_s1 = sshll.u32 %s1_s1, 4 ;; %s6_s1 = int_to_ptr.hbm [resolvable:$true] %s5_s1 }"
    for bundles in ([pointer, offset, copy, wait, load], [pointer, offset, shift, copy, wait, load]):
        scalars, *_ = final_state(*bundles, tables={2: words})
        assert scalars[2] == 100 + 2 * 8 + 3


def test_a_table_that_is_not_known_is_named():
    assert prepare(*READ_TABLE).run(CORE).missing_operands == {2}


def test_an_instruction_that_is_not_understood_is_told():
    trace = prepare("{ %s1_s1 = smagic.u32 3 }").run(CORE)
    assert trace.warnings == ("1 smagic.u32 not understood, taken as 0",)


def test_a_failed_bounds_check_is_told():
    trace = prepare("{ %1 = shalt.err (!%p1_p1) /* BoundsCheck 1 [deref of opnd#0] for %2=dma.hbm_to_vmem */ }").run(
        CORE
    )
    assert trace.warnings[0].startswith("the kernel's own bounds checks fail 1 times (1 at 0x0)")


def test_an_endless_loop_is_given_up(monkeypatch):
    monkeypatch.setattr(scalar, "BLOCK_LIMIT", 50)
    trace = prepare("{} /* Start region 1 */", "{ %1 = sbr.rel target = $region1 }", *EMPTY).run(CORE)
    assert trace.warnings == ("given up after 50 blocks: the count is a lower bound",)
