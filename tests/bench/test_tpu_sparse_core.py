# SPDX-License-Identifier: Apache-2.0
"""What a SparseCore moves, in calls as XLA:TPU writes them for a TPU7x, shortened."""

import pytest

from bench.tpu import collectives, hlo, sparse_core

PROGRAM = """HloModule m, is_scheduled=true

%rows (table: bf16[1000,512], indices: s32[64]) -> bf16[64,512] {
  %table = bf16[1000,512]{1,0} parameter(0)
  %indices = s32[64]{0} parameter(1)
  %known = s32[64]{0} custom-call(%indices), custom_call_target="AssumeGatherIndicesInBound"
  %taken = bf16[64,512]{1,0} gather(%table, %known), slice_sizes={1,512}
  ROOT %reshaped = bf16[64,512]{1,0} reshape(%taken)
}, execution_thread="sparsecore"

%gathers (table: bf16[1000,512], indices: s32[64]) -> bf16[64,512] {
  %table = bf16[1000,512]{1,0} parameter(0)
  %indices = s32[64]{0} parameter(1)
  ROOT %gathered = bf16[64,512]{1,0} fusion(%table, %indices), kind=kCustom, calls=%rows
}, execution_thread="sparsecore"

%added (into: f32[1000,512], updates: f32[64,512], order: s32[64]) -> f32[1000,512] {
  %into = f32[1000,512]{1,0} parameter(0)
  %updates = f32[64,512]{1,0} parameter(1)
  %order = s32[64]{0} parameter(2)
  %sorted = f32[64,512]{1,0} gather(%updates, %order), slice_sizes={1,512}
  ROOT %sums = f32[1000,512]{1,0} scatter(%into, %order, %sorted), to_apply=%sum
}, execution_thread="sparsecore"

%scatters (into: f32[1000,512], updates: f32[64,512], order: s32[64]) -> f32[1000,512] {
  %into = f32[1000,512]{1,0} parameter(0)
  %updates = f32[64,512]{1,0} parameter(1)
  %order = s32[64]{0} parameter(2)
  ROOT %scattered = f32[1000,512]{1,0} fusion(%into, %updates, %order), kind=kCustom, calls=%added
}, execution_thread="sparsecore"

%copies (x: bf16[64,512]) -> bf16[64,512] {
  %x = bf16[64,512]{1,0} parameter(0)
  ROOT %copied = bf16[64,512]{0,1} copy(%x)
}, execution_thread="sparsecore"

%passes_on (x: bf16[64,512]) -> bf16[64,512] {
  %x = bf16[64,512]{1,0} parameter(0)
  %inner = ((bf16[64,512]{1,0}), bf16[64,512]{0,1}, u32[]{:S(8)}) call-start(%x), to_apply=%copies
  ROOT %inner-done = bf16[64,512]{0,1} call-done(%inner)
}, execution_thread="sparsecore"

%sends (x: bf16[64,512]) -> bf16[256,512] {
  %x = bf16[64,512]{1,0} parameter(0)
  ROOT %sent = bf16[256,512]{1,0} all-gather(%x), dimensions={0}
}, execution_thread="sparsecore"

ENTRY %main (x: bf16[64,512]) -> bf16[64,512] {
  %x = bf16[64,512]{1,0} parameter(0)
  %waits = ((), (), s32[]{:S(2)}) call-start(), async_execution_thread="sparsecore", to_apply=%sends
  %update = ((bf16[64,512]{1,0}), bf16[256,512]{1,0}) call-update(%waits, %x)
  %done = bf16[256,512]{1,0} call-done(%update)
  %at-once = ((bf16[64,512]{1,0}), bf16[64,512]{0,1}, u32[]{:S(8)}) call-start(%x), to_apply=%copies
  ROOT %out = bf16[64,512]{0,1} call-done(%at-once)
}
"""
MODULE = hlo.parse(PROGRAM)
ROWS = 64 * 512


def test_a_call_begins_where_its_operands_are_given():
    begun = {i.name: sparse_core.begun(MODULE, "main", i) for i in MODULE.computations["main"]}
    assert {name: called for name, called in begun.items() if called} == {"update": "sends", "at-once": "copies"}


@pytest.mark.parametrize(
    ("computation", "moved"),
    [
        ("copies", 2 * ROWS * 2),
        ("passes_on", 2 * ROWS * 2),
        ("gathers", 2 * ROWS * 2),  # not the table
        ("scatters", 3 * ROWS * 4),  # nor what is added to
        ("sends", None),
    ],
)
def test_bytes_are_those_of_the_rows(computation, moved):
    assert sparse_core.moved_bytes(MODULE, computation) == moved


def test_what_it_sends_is_counted_once():
    (kind,) = collectives.collectives(MODULE).kinds.values()
    assert (kind.count, kind.payload_bytes) == (1, 256 * 512 * 2)
