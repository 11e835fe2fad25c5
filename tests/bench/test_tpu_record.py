# SPDX-License-Identifier: Apache-2.0
"""What a record says of programs small enough to add up by hand, compiled by libtpu itself."""

import contextlib
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

from bench.tpu import schedule, step
from bench.tpu.collectives import KINDS
from bench.tpu.dump import Refusal
from bench.tpu.record import Record, compile_record, compiling
from bench.tpu.schedule import Schedule
from bench.tpu.topology import LIBTPU_IS_MISSING, has_libtpu, tpu_topology
from grug_kernels import dispatch
from grug_kernels.attention import AttentionMask, attention
from grug_kernels.attention.tpu_backward_blocks import BackwardBlocks

pytestmark = pytest.mark.skipif(not has_libtpu(), reason=LIBTPU_IS_MISSING)

MIB, GIB = 2**20, 2**30


def struct(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any
    ema_params: Any
    key: Any


def make_state() -> State:
    """8 layers of [256, 128] float32, split over "data", with two moments and an average each."""

    def weights():
        return {"layers": jnp.zeros((8, 256, 128), out_sharding=P(None, "data", None))}

    return State(jnp.zeros((), jnp.int32), weights(), (weights(), weights()), weights(), jax.random.key(0))


def train_step(state: State, batch: Any) -> State:
    """A scan whose body gathers one layer's weight; its gradient is summed over the devices."""

    def layer(x, weight):
        whole = jax.reshard(weight, P(None, None))
        return jnp.tanh(jnp.einsum("bf,df->bd", jnp.einsum("bd,df->bf", x, whole), whole)), None

    def loss(params):
        return jnp.sum(jax.lax.scan(layer, batch, params["layers"])[0])

    grads = jax.grad(loss)(state.params)
    params, first, second, ema = (
        jax.tree.map(lambda old, new: 0.9 * old + new, tree, grads)
        for tree in (state.params, *state.opt_state, state.ema_params)
    )
    return State(state.step + 1, params, (first, second), ema, state.key)


@pytest.fixture(scope="module")
def step_of_four() -> Record:
    topology = tpu_topology("v6e")
    mesh = topology.mesh()
    with topology.targeted(mesh):
        state = jax.eval_shape(make_state)
        batch = jax.ShapeDtypeStruct((512, 256), jnp.float32, sharding=jax.NamedSharding(mesh, P("data", None)))
        return compile_record(jax.jit(train_step, donate_argnums=0), state, batch, topology=topology)


def test_arguments_are_split_by_what_they_are(step_of_four):
    weights = 8 * 256 * 128 * 4 // 4  # of one device of four
    arguments = step_of_four.hbm.arguments
    assert arguments.pop("padding") < 10 * 1024
    assert arguments == {
        "parameters": weights,
        "optimizer": 2 * weights,
        "ema": weights,
        "batch": 512 * 256 * 4 // 4,
        "other": 128 * 4 + 128 * 4,  # the counter and the key, each alone in a tile's row
    }


def test_donated_arguments_are_not_counted_twice(step_of_four):
    hbm = step_of_four.hbm
    assert hbm.donated_bytes >= 4 * hbm.arguments["parameters"]
    assert hbm.reserved_bytes < hbm.arguments_bytes + hbm.outputs_bytes
    assert hbm.left_bytes == int(31.24 * GIB) - hbm.reserved_bytes


def test_collectives_of_a_scan_count_once_a_layer(step_of_four):
    """Each of 8 weights is gathered, in bf16: the matmul would round it anyway, and XLA rounds first."""
    kinds = step_of_four.collectives.kinds
    assert kinds["all-gather"].count in (8, 16)  # the backward pass's too, or the forward pass's kept
    assert kinds["all-gather"].payload_bytes == kinds["all-gather"].count * 256 * 128 * 2
    assert kinds["all-reduce"].count + kinds["reduce-scatter"].count in (1, 8)
    assert step_of_four.collectives.loops_of_unknown_length == 0


def test_the_row_is_flat_and_json(step_of_four):
    row = json.loads(json.dumps(step_of_four.row()))
    assert row["topology"] == "v6e:2x2"
    assert row["devices"] == 4
    assert min(row["trace_seconds"], row["lower_seconds"], row["compile_seconds"], row["compile_cpu_seconds"]) > 0
    assert row["stablehlo_lines"] > 20
    assert row["stablehlo_bytes"] > 40 * row["stablehlo_lines"] / 2
    assert row["hbm/left_bytes"] == row["hbm/available_bytes"] - row["hbm/reserved_bytes"]
    assert row["collectives/all-gather/payload_bytes"] > 0
    assert "unsupported" not in row


def test_printed_it_says_how_much_is_left(step_of_four):
    text = str(step_of_four)
    assert "v6e:2x2, 4 devices" in text
    assert "parameters 0.2 MiB, optimizer 0.5 MiB, ema 0.2 MiB" in text
    assert "of 31989.8 MiB on each device" in text
    assert "all-gather: " in text


@pytest.mark.parametrize("chip", ["v5e", "v5p", "tpu7x"])
def test_a_plain_function_goes_on_one_device(chip):
    """A [1000, 300] float32 fills tiles of [8, 128]. libtpu lays it out with 1000 along the lanes: [304, 1024]."""
    record = compile_record(lambda x, scale: (x @ x.T) * scale, struct(1000, 300), 2.0, topology=tpu_topology(chip))
    assert record.hbm.arguments["other"] == 304 * 1024 * 4 + 512
    assert 0 <= record.hbm.arguments["padding"] < 1024
    assert record.hbm.outputs_bytes == 1000 * 1024 * 4
    assert not record.collectives.kinds
    assert record.refusal is None


def test_kernels_are_chosen_for_a_tpu():
    q = struct(1, 256, 2, 128, dtype=jnp.bfloat16)
    record = compile_record(lambda q: attention(q, q, q, AttentionMask(causal=True)), q, topology=tpu_topology("v6e"))
    assert [(choice.op, choice.platform) for choice in record.choices] == [("attention", "tpu")]
    assert record.row()["implementation/attention"] == record.choices[0].used


def test_a_program_too_large_for_the_chip_is_a_row():
    def sort(x):
        return jnp.sort(x, 0) + 1

    record = compile_record(sort, struct(2**16, 2**18), topology=tpu_topology("v6e"))
    assert record.refusal.stage == "compile"
    assert "exceeds available HBM (31.24G)" in record.refusal.sentence
    row = record.row()
    assert row["unsupported"] == record.refusal.sentence
    assert row["stablehlo_lines"] > 0
    assert "compile_seconds" not in row
    assert "unsupported: compile raised JaxRuntimeError: RESOURCE_EXHAUSTED" in str(record)


def kernel(body):
    return lambda x: pl.pallas_call(body, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x)


def test_a_kernel_too_large_for_vmem_is_a_row():
    def copy_a_corner(x_ref, out_ref):
        out_ref[:8, :128] = x_ref[:8, :128]

    record = compile_record(kernel(copy_a_corner), struct(4096, 65536), topology=tpu_topology("v5p"))
    assert record.refusal.stage == "compile"
    assert "(size=1073741824) would exceed memory (size=67108864)" in record.refusal.sentence


def test_a_kernel_that_does_not_lower_is_a_row():
    def sort(x_ref, out_ref):
        out_ref[...] = jnp.sort(x_ref[...])

    record = compile_record(kernel(sort), struct(8, 128), topology=tpu_topology("v5p"))
    assert (record.refusal.stage, record.refusal.error) == ("lower", "NotImplementedError")
    assert "Unimplemented primitive in Pallas TPU lowering for tc: sort" in record.refusal.sentence
    assert set(record.row()) & {"trace_seconds", "lower_seconds", "compile_seconds"} == {"trace_seconds"}


def test_a_kernels_own_refusal_is_a_row_and_a_callers_mistake_is_not():
    def refuses(x):
        raise dispatch.UnsupportedError("attention: head_dim=3 is too odd.\nMore about it.")

    record = compile_record(refuses, struct(8), topology=tpu_topology("v6e"))
    assert record.refusal == Refusal("trace", "UnsupportedError", "attention: head_dim=3 is too odd.")
    with pytest.raises(TypeError, match="dot_general requires contracting dimensions to have the same shape"):
        compile_record(lambda x: x @ x, struct(8, 7), topology=tpu_topology("v6e"))


def test_a_batch_that_does_not_divide_over_the_devices():
    config = step.template("base", trainer={"batch_size": 6})
    with pytest.raises(ValueError, match="batch_size=6 is not a multiple of the 4 devices of v6e:2x2"):
        step.step_record("base", config, tpu_topology("v6e"))


def test_a_variants_step_compiles_from_shapes_alone():
    sizes = {"num_layers": 1, "hidden_dim": 128, "intermediate_dim": 128, "num_heads": 1, "num_kv_heads": 1}
    sizes |= {"head_dim": 128, "vocab_size": 256, "max_seq_len": 128}
    config = step.template("array_stacked", model=sizes, trainer={"batch_size": 4, "seq_len": 128, "ema_beta": 0.9})
    record = step.step_record("array_stacked", config, tpu_topology("v6e"))
    arguments = record.hbm.arguments
    assert set(arguments) == {"parameters", "optimizer", "ema", "batch", "other", "padding"}
    assert arguments["parameters"] == arguments["ema"]
    assert arguments["optimizer"] == pytest.approx(2 * arguments["parameters"], rel=0.01)
    assert {(choice.op, choice.used) for choice in record.choices} == {
        ("attention", "pallas_tpu"),
        ("cross_entropy", "pallas_tpu"),
    }


@pytest.fixture(scope="module")
def schedule_of_four() -> tuple[Record, Schedule]:
    topology = tpu_topology("v6e")
    mesh = topology.mesh()
    with topology.targeted(mesh):
        state = jax.eval_shape(make_state)
        batch = jax.ShapeDtypeStruct((512, 256), jnp.float32, sharding=jax.NamedSharding(mesh, P("data", None)))
        step_of_it = jax.jit(train_step, donate_argnums=0)
        with compiling(step_of_it, state, batch, topology=topology, schedules=True) as (record, program):
            return record, schedule.read(record, program)


def test_a_sharded_program_is_compiled_once_for_record_and_prediction(schedule_of_four, step_of_four):
    record, read = schedule_of_four
    assert record.hbm.peak_bytes == step_of_four.hbm.peak_bytes
    # What a test has asked for in vain is there too, counted 0.
    assert {**record.collectives.kinds} == {name: k for name, k in step_of_four.collectives.kinds.items() if k.count}
    for name, kind in record.collectives.kinds.items():
        transfers = [transfer for transfer in read.transfers if transfer.kind == name]
        assert sum(transfer.calls for transfer in transfers) == kind.count
        assert sum(transfer.calls * transfer.payload_bytes for transfer in transfers) == kind.payload_bytes
    # 3/4 of a weight over two links of 100 GB/s.
    gathers = [transfer for transfer in read.transfers if transfer.kind == "all-gather"]
    assert gathers[0].ms == pytest.approx(gathers[0].calls * 0.75 * 256 * 128 * 2 / 200e9 * 1e3)


def test_a_collective_is_never_executed_as_a_kernel(schedule_of_four):
    """Its program waits for what another chip sends, and would be executed until it is given up, after minutes."""
    _, read = schedule_of_four
    assert read.kernels
    assert not [k.name for k in read.kernels if k.name.startswith(KINDS)]
    assert not [note for note in read.notes if "given up" in note]
    assert {k.calls for k in read.kernels} <= {1, 8}  # the scans are of eight layers
    assert read.predicted_ms > read.exposed_ms > 0


def test_trips_that_no_loop_has_are_an_error_that_names_the_loops():
    def repeat(n, x):
        return jax.lax.fori_loop(0, n, lambda i, x: jnp.tanh(x @ x), x)

    args = (struct(dtype=jnp.int32), struct(256, 256))
    thrice = schedule.analyze(repeat, args, "v5p", trips={"while": 3})
    assert max(k.calls for k in thrice.kernels) == 3
    with pytest.raises(ValueError, match=r"no loop of unknown length has \['layers'\]; loops here: while"):
        schedule.analyze(repeat, args, "v5p", trips={"layers": 3})


SMALL = {"num_layers": 1, "hidden_dim": 128, "intermediate_dim": 128, "num_heads": 1, "num_kv_heads": 1}
SMALL |= {"head_dim": 128, "vocab_size": 256}


def test_levanters_step_is_predicted_beside_ours():
    config = step.template("base", model=SMALL | {"max_seq_len": 128}, trainer={"batch_size": 4, "seq_len": 128})
    record, prediction = step.predicted_step("base", config, tpu_topology("v5p"), levanter=True)
    assert record.refusal is None
    assert not record.choices  # none of our kernels has been asked
    splash = [k for k in prediction.schedule.kernels if k.is_pallas]
    assert {k.scope for k in splash} == {"attention"}
    assert not [note for note in prediction.schedule.notes if "known at run time only" in note]
    assert prediction.tokens_per_second_per_chip == pytest.approx(4 * 128 / prediction.seconds / 4)


def test_a_schedule_that_cannot_be_read_is_said_and_leaves_what_was_compiled(monkeypatch, caplog):
    def unreadable(*_):
        raise ValueError("the branch at 0x1191 goes to region 35, which the program lacks.")

    topology = tpu_topology("v5p")
    compiled = contextlib.nullcontext((Record(topology), object()))
    monkeypatch.setattr(step, "compiling_step", lambda *_, **__: compiled)
    monkeypatch.setattr(schedule, "read", unreadable)
    config = step.template("base", trainer={"batch_size": 4, "seq_len": 512})
    record, prediction = step.predicted_step("base", config, topology)
    assert (record.topology, prediction) == (topology, None)
    assert "no time is predicted for base: the branch at 0x1191" in caplog.text


def test_what_levanter_cannot_do_is_a_row():
    config = step.template("base", model=SMALL | {"max_seq_len": 96}, trainer={"batch_size": 4, "seq_len": 96})
    row = step.step_record("base", config, tpu_topology("v5p"), levanter=True).row()
    assert row["refused_at"] == "trace"
    assert row["unsupported"].startswith("Splash attention requires key/value sequence length to be a multiple of 128")


def test_attention_is_counted_under_a_causal_mask():
    """Stripes of 128 queries, all of which see the first key, and one of which the last of their own."""
    tables = step.attention_tables(rows=2, seq_len=1024)
    assert set(tables) == {("attention_forward", 0), ("attention_backward", 0)}
    stripes = tables["attention_backward", 0].reshape(2, 8, 4)
    assert not stripes[:, :, :2].any()
    assert stripes[1, :, 3].tolist() == [128, 256, 384, 512, 640, 768, 896, 1024]
    assert step.attention_tables(rows=2, seq_len=1000) == {}


def test_attention_to_a_split_row_is_counted_for_the_device_that_has_most_to_do():
    """Its last positions; of a ring, in which many blocks are seen whole, one such block."""
    model = {"num_kv_heads": 8, "head_dim": 128, "max_seq_len": 2**18}
    for seq_len, keys in ((4096, 4096), (2**18, 2**18 // 4)):
        trainer = {"batch_size": 1, "seq_len": seq_len, "context_axis": 4}
        assert step.attended(step.template("base", model=model, trainer=trainer), 1) == (seq_len // 4, keys)
    last = step.attention_tables(1, 4096, queries=1024)["attention_forward", 0].reshape(8, 4)
    assert last[:, 3].tolist() == [3200, 3328, 3456, 3584, 3712, 3840, 3968, 4096]
    block = step.attention_tables(1, 1024, queries=1024, causal=False)["attention_forward", 0].reshape(8, 4)
    assert (block == [0, 0, 1024, 1024]).all()


def test_attention_over_several_chunks_of_keys_is_counted_with_its_grid():
    """At 32768 tokens on v5p. With the stripes in the grid's place the backward pass was predicted to take nothing."""
    blocks = BackwardBlocks(block_q=512, block_kv=512, row_chunk=256, key_chunk=512)
    tables = step.attention_tables(1, 1024, blocks)
    assert int(tables["attention_backward", 0]) == 2  # both query blocks see the first 512 keys
    assert tables["attention_backward", 1].tolist() == tables["attention_forward", 0].tolist()
    assert tables["attention_backward", 2].tolist() == [0, 1]  # and the second alone the others
