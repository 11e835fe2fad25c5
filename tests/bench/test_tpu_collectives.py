# SPDX-License-Identifier: Apache-2.0
"""Collectives counted in hand-written programs, in the forms that XLA:TPU writes. No libtpu needed."""

import pytest

from bench.tpu import collectives, hlo
from tests.bench.tpu_cases import topology

# A scan of 6 layers that gathers a weight; a reduce-scatter as XLA:TPU writes it; an asynchronous permute; a gradient.
PROGRAM = """\
HloModule jit_train_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%layer (carry: (s32[], bf16[128,64])) -> (s32[], bf16[128,64]) {
  %carry = (s32[]{:T(128)}, bf16[128,64]{1,0:T(8,128)(2,1)}) parameter(0)
  %shard = bf16[32,64]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%carry), index=1
  %all-gather.1 = bf16[128,64]{1,0:T(8,128)(2,1)} all-gather(%shard), channel_id=2, dimensions={0}, metadata={op_name="f(x)"}
  ROOT %next = (s32[]{:T(128)}, bf16[128,64]{1,0:T(8,128)(2,1)}) tuple(%counter, %all-gather.1)
}

%is_not_done (carry: (s32[], bf16[128,64])) -> pred[] {
  %carry.1 = (s32[]{:T(128)}, bf16[128,64]{1,0:T(8,128)(2,1)}) parameter(0)
  %six = s32[]{:T(128)} constant(6), metadata={op_name="jit(train_step)/while/cond/lt"}
  %counter.1 = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%counter.1, %six), direction=LT
}

%all-reduce-scatter.1 (gradient: f32[512,64]) -> f32[128,64] {
  %gradient = f32[512,64]{1,0:T(8,128)} parameter(0)
  %all-reduce.2 = f32[512,64]{1,0:T(8,128)} all-reduce(%gradient), channel_id=3, to_apply=%add
  ROOT %part = f32[128,64]{1,0:T(8,128)} dynamic-slice(%all-reduce.2, %zero), dynamic_slice_sizes={128,64}
}

ENTRY %main (weight: bf16[128,64]) -> f32[] {
  %weight = bf16[128,64]{1,0:T(8,128)(2,1)} parameter(0)
  %a = f32[]{:T(128)} constant(0)
  %b = pred[7]{0:T(128)} parameter(1)
  %c = f8e4m3fn[8]{0:T(128)} parameter(2)
  %start = (s32[]{:T(128)}, bf16[128,64]{1,0:T(8,128)(2,1)}) tuple(%zero.1, %weight)
  %while.1 = (s32[]{:T(128)}, bf16[128,64]{1,0:T(8,128)(2,1)}) while(%start), condition=%is_not_done, body=%layer
  %big = f32[512,64]{1,0:T(8,128)} custom-call(%while.1), custom_call_target="kernel"
  %fusion.1 = f32[128,64]{1,0:T(8,128)} fusion(%big), kind=kCustom, calls=%all-reduce-scatter.1
  %permute-start = (f32[128,64]{1,0:T(8,128)}, f32[128,64]{1,0:T(8,128)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%fusion.1), channel_id=4
  %permute-done = f32[128,64]{1,0:T(8,128)} collective-permute-done(%permute-start)
  %norms = (f32[]{:T(128)}, pred[7]{0:T(128)}, /*index=2*/f8e4m3fn[8]{0:T(128)}) all-reduce(%a, %b, /*index=2*/%c), to_apply=%add
  ROOT %out = f32[]{:T(128)} get-tuple-element(%norms), index=0
}
"""  # noqa: E501


def count(program: str) -> collectives.Collectives:
    return collectives.collectives(hlo.parse(program))


def test_each_kind_is_counted_with_its_bytes():
    found = count(PROGRAM)
    counted = {name: (kind.count, kind.payload_bytes) for name, kind in found.kinds.items()}
    assert counted == {
        "all-gather": (6, 6 * 128 * 64 * 2),  # six layers, the whole weight in bf16 each time
        "reduce-scatter": (1, 512 * 64 * 4),  # what goes in: the unreduced gradient
        "collective-permute": (1, 128 * 64 * 4),  # not twice for start and done, and without its semaphores
        "all-reduce": (1, 4 + 7 + 8),
    }
    assert found.loops_of_unknown_length == 0


@pytest.mark.parametrize(
    "condition",
    [
        "ROOT %lt = pred[] compare(%counter.1, %bound), direction=LT",
        "ROOT %lt = pred[] fusion(%six), kind=kLoop",
        "ROOT %ne = pred[] compare(%counter.1, %six), direction=NE",
    ],
    ids=["bound_known_at_run_time", "not_a_comparison", "another_comparison"],
)
def test_a_loop_of_unknown_length_counts_once_and_is_told_of(condition):
    old = "ROOT %lt = pred[]{:T(512)} compare(%counter.1, %six), direction=LT"
    bound = "  %bound = s32[] get-tuple-element(%carry.1), index=0\n  "
    found = count(PROGRAM.replace("  " + old, bound + condition))
    assert found.kinds["all-gather"].count == 1
    assert found.loops_of_unknown_length == 1


def test_a_loop_of_unknown_length_without_collectives_matters_to_nobody():
    """The blockwise attention's loops are such."""
    gather = next(line for line in PROGRAM.splitlines() if "all-gather(" in line)
    found = count(PROGRAM.replace("direction=LT", "direction=NE").replace(gather, ""))
    assert found.loops_of_unknown_length == 0
    assert "all-gather" not in found.kinds


def test_every_branch_is_counted():
    """An upper bound: which one runs is not known."""
    call = "%fusion.1 = f32[128,64]{1,0:T(8,128)} fusion(%big), kind=kCustom, calls=%all-reduce-scatter.1"
    branches = call.replace("fusion(%big), kind=kCustom, calls=%all-reduce-scatter.1", "conditional(%a, %big, %big), ")
    branches += "branch_computations={%all-reduce-scatter.1, %all-reduce-scatter.1}"
    assert count(PROGRAM.replace(call, branches)).kinds["reduce-scatter"].count == 2


def test_a_loop_of_a_length_that_is_given_counts_so():
    program = PROGRAM.replace("direction=LT", "direction=NE")
    found = collectives.collectives(hlo.parse(program, {"while.1": 2.5}))
    assert found.kinds["all-gather"].count == 2.5
    assert found.loops_of_unknown_length == 0


@pytest.mark.parametrize(
    ("groups", "members"),
    [
        ("{{0,2},{1,3}}", (0, 2)),
        ("[2,4]<=[8]", (0, 1, 2, 3)),
        ("[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
        ("mesh['axis_0'=4] {'axis_0'}", (0, 1, 2, 3)),
        ("mesh['data'=2,'model'=4] {'model'}", (0, 1, 2, 3)),
        ("mesh['data'=2,'model'=4] {'data'}", (0, 4)),
        ("{}", ()),
    ],
)
def test_the_first_group_is_read_in_every_notation(groups, members):
    line = PROGRAM.replace("channel_id=2,", f"channel_id=2, replica_groups={groups},")
    module = hlo.parse(line)
    gather = next(i for i in module.computations["layer"] if i.opcode == "all-gather")
    assert collectives.collective_of(module, "layer", gather).members == members


@pytest.mark.parametrize(
    ("name", "extents", "members", "links"),
    [
        ("v5p", (2, 2, 1), (0, 1, 2, 3), 2),  # one link along each of two axes
        ("v5p", (2, 2, 1), (0, 1), 1),
        ("v5p", (4, 4, 4), range(64), 6),  # three rings
        ("v5p", (4, 4, 4), range(4), 2),  # one ring
        ("v5p", (4, 4, 4), (0, 1), 1),  # half of a ring is a line
        ("v6e", (4, 4, 1), range(16), 2),  # v6e closes at 16 chips
        ("v6e", (16, 16, 1), range(256), 4),
    ],
)
def test_links_are_those_of_the_axes_that_a_group_spans(name, extents, members, links):
    assert collectives.links(members, topology(name, *extents), range(256)) == links


@pytest.mark.parametrize(
    ("kind", "share"),
    [("all-gather", 3 / 4), ("reduce-scatter", 3 / 4), ("all-reduce", 2 * 3 / 4), ("collective-permute", 2)],
)
def test_seconds_are_bytes_over_the_links(kind, share):
    """v5p: 600 GB/s over six links, of which four chips in a square use two, and a permutation one."""
    sent = collectives.Collective(kind, 10**9, () if kind == "collective-permute" else (0, 1, 2, 3))
    assert collectives.seconds(sent, topology("v5p", 2, 2, 1), range(4)) == pytest.approx(share * 1e9 / 200e9)


def test_one_device_sends_nothing():
    sent = collectives.Collective("all-reduce", 10**9, (0,))
    assert collectives.seconds(sent, topology("v5p", 2, 2, 1), range(4)) == 0


def test_other_text_is_refused():
    with pytest.raises(ValueError, match=r"no ENTRY computation in 9 characters.*compiled.as_text\(\)"):
        count("module {}")
