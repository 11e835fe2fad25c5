# SPDX-License-Identifier: Apache-2.0
"""What holds a device's memory: XLA's dump of its buffers read, named, and beside the compiler's own figure."""

import os

import pytest

from bench.plan.holders import GAPS, GRADIENTS, KEPT, LOSS, OPTIMIZER, OTHER, WEIGHTS, WORK, by_kind, held, where
from bench.plan.memory import needed
from bench.plan.plan import Plan, make_plan
from bench.plan.text import text
from bench.tpu import hlo
from bench.tpu.buffers import Buffer, Layout, Value, parse_layout, read_layout
from bench.tpu.dump import Refusal
from bench.tpu.record import LaidOut
from bench.tpu.topology import LIBTPU_IS_MISSING, has_libtpu, tpu_topology
from tests.bench.plan_cases import DATA, GIB, MIB, tiny

needs_libtpu = pytest.mark.skipif(not has_libtpu(), reason=LIBTPU_IS_MISSING)

# As XLA writes it, but for the sizes: an argument, a result, VMEM, the host, and a heap in which a loop's state lies
# under three names and another value follows in its place.
ASSIGNMENT = """BufferAssignment:
allocation 0: size 512, page 0, thread-local:
 value: <203 sum.1 @0> (size=512,offset=0): f32[]{:T(128)}
allocation 1: size 4096, page 0, parameter 1, shape |f32[8,128]| at ShapeIndex {}, maybe-live-out:
 value: <1 param.37 @0> (size=4096,offset=0): f32[8,128]{1,0:T(8,128)}
allocation 2: size 1024, page 0, maybe-live-out:
 value: <2 add.886 @0> (size=1024,offset=0): f32[256]{0:T(256)}
allocation 3: size 9999, color 1, page 0, preallocated-temp:
 value: <3 copy-start.80{0} @1> (size=9999,offset=0): f32[8,128]{1,0:T(8,128)S(1)}
allocation 4: size 7000, color 5, page 0, preallocated-temp:
 value: <4 copy.81 @5> (size=7000,offset=0): f32[8,128]{1,0:T(8,128)S(5)}
allocation 5: size 40000, page 0, preallocated-temp:
 value: <5 broadcast.1 @0> (size=20000,offset=0): bf16[2,16,128]{2,1,0}
 value: <6 param.9{1} (phi) @0> (size=20000,offset=0): bf16[2,16,128]{2,1,0}
 value: <7 while.3{1} (phi) @0> (size=20000,offset=0): bf16[2,16,128]{2,1,0}
 value: <8 fusion.4 @0> (size=20000,offset=0): f32[16,128]{1,0}
 value: <9 dot.5 @0> (size=10000,offset=30000): f32[16,64]{1,0}
 value: <10 dot.6 @0> (size=5000,offset=20000): f32[16,32]{1,0}

Total bytes used: 1 (1.00MiB)
"""
RANGES = {
    "broadcast.1{}": (10, 12),
    "param.9{1}": (12, 20),
    "while.3{1}": (20, 30),
    "fusion.4{}": (31, 40),
    "dot.5{}": (15, 35),
    "dot.6{}": (33, 34),
}


def test_a_loops_state_is_one_buffer_under_its_names():
    layout = parse_layout(ASSIGNMENT, RANGES)
    assert (layout.heap_bytes, layout.results_bytes, layout.host_bytes) == (40000, 1024, 7000)
    shape = "bf16[2,16,128]{2,1,0}"
    state = [
        Value("broadcast.1{}", shape, 10, 12),
        Value("param.9{1}", shape, 12, 20),
        Value("while.3{1}", shape, 20, 30),
    ]
    assert layout.buffers[0] == Buffer(20000, tuple(state))
    assert [buffer.values[0].name for buffer in layout.buffers[1:]] == ["fusion.4{}", "dot.5{}", "dot.6{}"]


def test_the_fullest_place_has_what_is_in_use_there_and_under_the_names_of_then():
    place, alive = parse_layout(ASSIGNMENT, RANGES).fullest()
    assert place == 33
    assert [(buffer.size, buffer.values[0].name) for buffer in alive] == [
        (20000, "fusion.4{}"),
        (10000, "dot.5{}"),
        (5000, "dot.6{}"),
    ]
    assert (
        Layout(0, 0, 0, parse_layout(ASSIGNMENT, RANGES).buffers[:1]).fullest()[1][0].values[0].name == "broadcast.1{}"
    )


def test_a_compile_that_dumped_nothing_has_no_layout(tmp_path):
    assert read_layout(tmp_path) is None


@pytest.mark.parametrize(
    ("file", "figures"),
    [("before_codegen", (46.20 * GIB, 15.75 * GIB)), ("after_codegen", (12.25 * MIB, 12 * MIB))],
)
def test_both_of_the_compilers_refusals_are_read(file, figures):
    """Real ones: 32 layers with remat none on v5e; the tiny step with --xla_tpu_max_hbm_size_mib=12."""
    message = (DATA / "refusals" / f"{file}.txt").read_text()
    refusal = Refusal.of("compile", RuntimeError(message))
    assert needed(refusal) == tuple(map(int, figures))


def test_a_refusal_for_another_reason_needs_no_memory():
    vmem = "Scoped allocation with size 18.00M and limit 16.00M exceeded scoped vmem limit by 2.00M."
    assert needed(Refusal("compile", "JaxRuntimeError", vmem)) is None
    assert needed(None) is None


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (
            "jit(train_step)/transpose(jvp(stacked_layers))/while/body/eval_jaxpr/checkpoint/mlp/btf,fd->btd/dot_general",
            "backward: stacked_layers/mlp/btf,fd->btd/dot_general",
        ),
        ("jit(train_step)/jvp()/shard_map/cross_entropy/while", "cross_entropy"),
        ("", "copy.1{}"),
    ],
)
def test_a_path_of_jax_is_cut_to_what_says_something(path, words):
    assert where(path, "copy.1{}") == words


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan("array_stacked", tiny(), tpu_topology("v5p"))


@needs_libtpu
def test_the_parts_add_up_to_what_the_compiler_sets_aside(plan):
    memory = plan.memory
    assert memory.total_bytes == plan.record.hbm.reserved_bytes
    assert sum(memory.temporaries.values()) == plan.record.laid_out.layout.heap_bytes
    assert 0 <= memory.rest_bytes < 0.05 * memory.total_bytes  # small temporaries that have no place in the heap
    assert memory.in_use_bytes <= memory.total_bytes
    assert len(memory.largest) == 5


@needs_libtpu
def test_temporaries_are_named_by_what_they_are_for(plan):
    """The fullest place is in the loss, where the head's gradient is whole, in float32."""
    kinds = plan.memory.temporaries
    tokens, d, v = plan.rows * 256, 128, 1024
    assert kinds[GRADIENTS] >= d * v * 4
    assert kinds[LOSS] >= tokens * v * 2  # what the logits are kept as
    assert kinds[KEPT] >= 2 * tokens * d * 2  # the inputs of two layers
    assert sum(kinds[kind] for kind in (GRADIENTS, LOSS, KEPT)) > 0.8 * (sum(kinds.values()) - kinds[GAPS])


@needs_libtpu
def test_what_is_donated_is_counted_once(plan):
    """`temp_size_in_bytes` counts it twice: a state of 2.9 GB more than there was, of a program that compiled."""
    hbm = plan.record.hbm
    state = sum(hbm.arguments[name] for name in ("parameters", "optimizer"))
    assert hbm.donated_bytes >= state
    gaps = plan.memory.total_bytes - plan.memory.in_use_bytes
    assert hbm.reserved_bytes == hbm.arguments_bytes + hbm.temporaries_bytes + hbm.code_bytes + (
        hbm.outputs_bytes - hbm.donated_bytes
    )
    assert gaps < hbm.code_bytes + hbm.temporaries_bytes


@needs_libtpu
def test_a_step_refused_for_its_size_says_what_holds_the_memory(monkeypatch, plan):
    """The compiler is told that the chip has 6 MiB. XLA has laid its buffers out before it refuses."""
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"{os.environ.get('LIBTPU_INIT_ARGS', '')} --xla_tpu_max_hbm_size_mib=6")
    refused = make_plan("array_stacked", tiny(), tpu_topology("v5p"))
    assert not refused.fits
    assert refused.limit_bytes == 6 * MIB
    assert refused.prediction is None
    total, _ = needed(refused.record.refusal)
    memory = refused.memory
    assert memory.total_bytes == pytest.approx(total, rel=0.01)
    assert 0 <= memory.rest_bytes < 0.05 * memory.total_bytes  # refused before there was code
    assert memory.arguments["parameters"] == plan.memory.arguments["parameters"]
    assert refused.over_bytes == memory.total_bytes - 6 * MIB
    said = text(refused)
    assert "verdict: does not fit. 0.01 GiB needed, 0.01 GiB there on each device" in said
    assert f"first: {refused.advice[0]} (reckoned)" in said
    assert f"  {GRADIENTS}" in said


# A forward loop that keeps the input of each of two layers, a loss, a backward loop that gathers a layer's weight and
# makes its gradient, and an update. The weight is f32[2,8,32] on each of four devices.
STEP = """HloModule jit_step, is_scheduled=true

%forward (state: (bf16[2,64,32])) -> (bf16[2,64,32]) {
  %state = (bf16[2,64,32]) parameter(0)
  %old = bf16[2,64,32] get-tuple-element(%state), index=0
  %x = bf16[1,64,32] fusion(%old), metadata={op_name="FORWARD/body/mlp/mul"}
  %saved = bf16[2,64,32] fusion(%old, %x), metadata={op_name="FORWARD/dynamic_update_slice"}
  ROOT %next = (bf16[2,64,32]) tuple(%saved)
}

%c (state.1: (bf16[2,64,32])) -> pred[] {
  ROOT %state.1 = (bf16[2,64,32]) parameter(0)
}

ENTRY %main (w: f32[2,8,32]) -> f32[2,8,32] {
  %w = f32[2,8,32] parameter(0), metadata={op_name="state.params.blocks.stacked.mlp.w_up"}
  %cast = bf16[2,8,32] convert(%w)
  %start = (bf16[2,64,32]) custom-call(), custom_call_target="AllocateBuffer"
  %loop = (bf16[2,64,32]) while(%start), condition=%c, body=%forward, metadata={op_name="FORWARD"}
  %logits = bf16[64,99] custom-call(%cast), metadata={op_name="jit(train_step)/jvp()/cross_entropy_with_gradients"}
  %whole = bf16[32,32] all-gather(%cast), metadata={op_name="BACKWARD/mlp/convert"}
  %again = bf16[64,99] fusion(%whole), metadata={op_name="BACKWARD/mlp/dot"}
  %grad = f32[32,32] fusion(%whole), metadata={op_name="BACKWARD/mlp/dot"}
  %moment = f32[2,8,32] fusion(%w), metadata={op_name="jit(train_step)/optimizer/mul"}
  %sign = () custom-call(%w), metadata={op_name="jit(train_step)/sign"}
  ROOT %stray = f32[5,5] fusion(%w), metadata={op_name="jit(train_step)/iota"}
}
""".replace("FORWARD", "jit(train_step)/jvp(stacked_layers)/while").replace(
    "BACKWARD", "jit(train_step)/transpose(jvp(stacked_layers))/while/body"
)
IN_USE = [  # name, bytes, from, to; the backward pass begins at 20 with the first fusion of it
    ("loop{0}", 8192, 5, 30, KEPT, "stacked_layers/mlp/mul"),
    ("logits{}", 4096, 10, 30, LOSS, "cross_entropy_with_gradients"),
    ("grad{}", 2048, 21, 30, GRADIENTS, "backward: stacked_layers/mlp/dot"),
    ("again{}", 1024, 20, 30, WORK, "backward: stacked_layers/mlp/dot"),
    ("whole{}", 512, 19, 30, WEIGHTS, "backward: stacked_layers/mlp/convert"),
    ("cast{}", 256, 1, 30, WEIGHTS, "state.params.blocks.stacked.mlp.w_up"),
    ("moment{}", 128, 29, 30, OPTIMIZER, "optimizer/mul"),
    ("stray{}", 64, 29, 30, OTHER, "iota"),
    ("sign{}", 32, 29, 30, OTHER, "sign"),
]


def test_each_temporary_is_of_the_kind_that_its_maker_and_its_shape_say():
    module = hlo.parse(STEP)
    shapes = {i.name: i.shape for block in module.computations.values() for i in block} | {"loop": "bf16[2,64,32]"}
    buffers = tuple(
        Buffer(size, (Value(name, shapes[name.partition("{")[0]], start, end),))
        for name, size, start, end, *_ in IN_USE
    )
    found = held(LaidOut(module, Layout(20000, 0, 0, buffers)), axes=(4, 1))
    assert [(one.size, one.kind, one.where) for one in found[:-1]] == [(size, *said) for _, size, _, _, *said in IN_USE]
    gaps = 20000 - sum(size for _, size, *_ in IN_USE)
    assert by_kind(found) == {
        GRADIENTS: 2048,
        KEPT: 8192,
        WEIGHTS: 768,
        WORK: 1024,
        LOSS: 4096,
        OPTIMIZER: 128,
        OTHER: 96,
        GAPS: gaps,
    }
