# SPDX-License-Identifier: Apache-2.0
"""Copies of whole stacks: in small programs written by hand, and planted in scans that libtpu compiles."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from bench.tpu import hlo, stack_copies, step
from bench.tpu.record import compiling
from bench.tpu.stack_copies import Finding, StackedLeaf
from bench.tpu.topology import LIBTPU_IS_MISSING, has_libtpu, tpu_topology

needs_libtpu = pytest.mark.skipif(not has_libtpu(), reason=LIBTPU_IS_MISSING)

LEAF = StackedLeaf("state.params.w", shape=(5, 128, 96), shard=(5, 32, 96))

BODY = """
%written (p0: f32[5,32,96], p1: f32[32,96], p2: s32[]) -> f32[5,32,96] {
  %p0 = f32[5,32,96]{2,1,0} parameter(0)
  %p1 = f32[32,96]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %one = f32[1,32,96]{2,1,0} bitcast(%p1)
  ROOT %written_at = f32[5,32,96]{2,1,0} dynamic-update-slice(%p0, %one, %p2)
}

%body (state: (s32[], f32[5,32,96], f32[5,32,96], f32[32])) -> (s32[], f32[5,32,96], f32[5,32,96], f32[32]) {
  %state = (s32[], f32[5,32,96]{2,1,0}, f32[5,32,96]{2,1,0}, f32[32]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %weights = f32[5,32,96]{2,1,0} get-tuple-element(%state), index=1
  %grads = f32[5,32,96]{2,1,0} get-tuple-element(%state), index=2
  %x = f32[32]{0} get-tuple-element(%state), index=3
  %weight = f32[32,96]{1,0} dynamic-slice(%weights, %i)
  %grad = f32[32,96]{1,0} multiply(%weight, %x)
  %grads_written = f32[5,32,96]{2,1,0} fusion(%grads, GRAD, %i), kind=kLoop, calls=%written
  ROOT %next = (s32[], f32[5,32,96]{2,1,0}, f32[5,32,96]{2,1,0}, f32[32]{0}) tuple(%i, %weights, NEXT, %x)
}
"""

ENTRY = """
ENTRY %main (w: f32[5,32,96], x: f32[32]) -> (f32[5,32,96]) {
  %w = f32[5,32,96]{2,1,0} parameter(0), metadata={op_name="state.params.w"}
  %x = f32[32]{0} parameter(1), metadata={op_name="batch.x"}
  %zero = s32[] constant(0)
  %zeros = f32[5,32,96]{2,1,0} broadcast(%zero), dimensions={}
  EXTRA
  %start = (s32[], f32[5,32,96]{2,1,0}, f32[5,32,96]{2,1,0}, f32[32]{0}) tuple(%zero, %w, %zeros, %x)
  %loop = (s32[], f32[5,32,96]{2,1,0}, f32[5,32,96]{2,1,0}, f32[32]{0}) while(%start), condition=%c, body=%body
  %gradient = f32[5,32,96]{2,1,0} get-tuple-element(%loop), index=2
  AFTER
  %updated = f32[5,32,96]{2,1,0} add(%w, GRADIENT)
  ROOT %result = (f32[5,32,96]{2,1,0}) tuple(%updated)
}
"""


def program(extra="", after="", gradient="%gradient", grad="%grad", written="%grads_written") -> hlo.Module:
    """w - its gradient, by a loop over five layers; with these lines or operands in it."""
    body = BODY.replace("GRAD", grad).replace("NEXT", written)
    entry = ENTRY.replace("EXTRA", extra).replace("AFTER", after).replace("GRADIENT", gradient)
    return hlo.parse(body + entry)


def found(module: hlo.Module) -> list[tuple[str, str]]:
    """(instruction, first words of the cause) of each finding."""
    findings = stack_copies.stack_copies(module, [LEAF])
    return [(finding.instruction, " ".join(finding.cause.split()[:4])) for finding in findings]


def test_one_gradient_buffer_written_in_place_and_the_result_are_no_copies():
    assert found(program()) == []


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("%whole = bf16[5,32,96]{2,1,0} convert(%w)", "The stack is cast"),
        ("%whole = f32[5,96,32]{2,1,0} transpose(%w), dimensions={0,2,1}", "The stack is laid"),
        ("%whole = f32[5,128,96]{2,1,0} all-gather(%w), dimensions={1}", "All layers are gathered"),
        ("%whole = f32[5,32,128]{2,1,0} pad(%w, %zero), padding=0_0x0_0x0_32", "Parameters of all layers"),
    ],
)
def test_what_is_made_of_all_layers_before_the_loop(line, cause):
    assert found(program(extra=line)) == [("whole", cause)]


def test_an_asynchronous_copy_counts_once_and_one_into_vmem_not_at_all():
    start = "%begun = ({}, f32[5,32,96]{{2,1,0}}, u32[]) copy-start(%w)\n%whole = {} copy-done(%begun)"
    hbm, vmem = "f32[5,32,96]{2,1,0:T(8,128)}", "f32[5,32,96]{2,1,0:T(8,128)S(1)}"
    assert found(program(extra=start.format(hbm, hbm))) == [("whole", "The stack is laid")]
    assert found(program(extra=start.format(vmem, vmem))) == []


def test_parameters_that_the_loop_writes_down_again():
    assert found(program(grad="%weight")) == [("zeros", "The scan keeps something")]


def test_a_loop_that_writes_all_layers_each_round():
    """The sum is of the whole stack, and no slice of it is written in place."""
    all_layers = "%grads_written = f32[5,32,96]{2,1,0} add(%grads, %grads)"
    module = program()
    body = BODY.replace("GRAD", "%grad").replace("NEXT", "%summed")
    summed = body.replace("ROOT %next", f"{all_layers.replace('grads_written', 'summed')}\n  ROOT %next").replace(
        "add(%grads, %grads)", "add(%grads, %grads_written)"
    )
    module.computations["body"] = hlo.parse(summed + ENTRY).computations["body"]
    assert found(module) == [("summed", "The stack is in")]


def test_a_second_buffer_for_gradients():
    other = '%more = f32[5,32,96]{2,1,0} custom-call(), custom_call_target="AllocateBuffer"'
    assert found(program(extra=other)) == [("more", "There is one more")]


def test_a_gradient_that_every_device_holds_whole():
    other = "%more = f32[5,128,96]{2,1,0} broadcast(%zero), dimensions={}"
    assert found(program(extra=other)) == [("more", "Every device holds all")]


def test_a_gradient_scaled_where_it_lies_is_none_and_one_kept_twice_is_one():
    scaled = "%scaled = f32[5,32,96]{2,1,0} multiply(%gradient, %zero)"
    assert found(program(after=scaled, gradient="%scaled")) == []
    both = scaled + "\n  %both = f32[5,32,96]{2,1,0} add(%scaled, %gradient)"
    assert found(program(after=both, gradient="%both")) == [("scaled", "Neither gradient nor result:")]


def test_a_finding_says_how_much_what_and_whose():
    line = '%whole = bf16[5,32,96]{2,1,0:T(8,128)(2,1)} convert(%w), metadata={op_name="jit(step)/convert"}'
    [finding] = stack_copies.stack_copies(program(extra=line), [LEAF])
    assert finding.size_bytes == 5 * 32 * 128 * 2  # 96 of 128 lanes
    assert str(finding).startswith(
        "0.04 MiB: bf16[5,32,96]{2,1,0:T(8,128)(2,1)} convert %whole (jit(step)/convert)\n"
        "  all layers of state.params.w. The stack is cast"
    )


def test_a_leaf_that_is_no_argument():
    with pytest.raises(ValueError, match=r"'state.params.v' is none of the program's 2 arguments: batch.x, state"):
        stack_copies.stack_copies(program(), [StackedLeaf("state.params.v", (5, 8), (5, 8))])


# Scans over five layers [256, 384], split over four devices, whose loss is descended by one step. bfloat16 throughout
# where nothing else is said: XLA casts float32 that is only multiplied in front of a scan by itself.

LAYERS, WIDE, NARROW = 5, 384, 256


def layer(x, weight):
    whole = jax.reshard(weight, P(None, None)).astype(x.dtype)
    return x + jnp.tanh(jnp.einsum("bf,df->bd", jnp.tanh(jnp.einsum("bd,df->bf", x, whole)), whole))


def scanned(stack, x):
    return jax.lax.scan(jax.checkpoint(lambda x, weight: (layer(x, weight), None)), x, stack)[0]


def kept_as_gathered(stack, x):
    return jax.lax.scan(lambda x, weight: (layer(x, weight), None), x, stack)[0]


def cast_as_a_whole(stack, x):
    return scanned(stack.astype(x.dtype), x)


def gathered_as_a_whole(stack, x):
    return scanned(jax.reshard(stack, P(None, None, None)), x)


def taken_by_index(stack, x):
    """The body closes over the stack: every layer it takes out is kept for the backward pass."""

    def body(x, i):
        return layer(x, jax.lax.dynamic_index_in_dim(stack, i, keepdims=False)), None

    return jax.lax.scan(body, x, jnp.arange(LAYERS))[0]


def carried(stack, x):
    """Each round changes the stack that the next one reads."""

    def body(carry, i):
        x, stack = carry
        weight = jax.lax.dynamic_index_in_dim(stack, i, keepdims=False)
        return (layer(x, weight), stack * jnp.mean(x).astype(x.dtype)), None

    return jax.lax.scan(body, (x, stack), jnp.arange(LAYERS))[0][0]


def findings_of(forward: Callable[..., Any], dtype: Any) -> list[Finding]:
    def descend(params, x):
        grads = jax.grad(lambda params: jnp.sum(forward(params["w"], x).astype(jnp.float32) ** 2))(params)
        return jax.tree.map(lambda old, new: old - new.astype(old.dtype), params, grads)

    topology = tpu_topology("v5p:2x2x1")
    mesh = topology.mesh()
    split = jax.NamedSharding(mesh, P(None, "data", None))
    params = {"w": jax.ShapeDtypeStruct((LAYERS, NARROW, WIDE), dtype, sharding=split)}
    x = jax.ShapeDtypeStruct((2048, NARROW), jnp.bfloat16, sharding=jax.NamedSharding(mesh, P("data", None)))
    leaf = StackedLeaf("params['w']", (LAYERS, NARROW, WIDE), (LAYERS, NARROW // 4, WIDE))
    descending = jax.jit(descend, donate_argnums=0)
    with topology.targeted(mesh), compiling(descending, params, x, topology=topology) as (record, program):
        assert program, record.refusal
        return stack_copies.stack_copies(program.module, [leaf])


@needs_libtpu
def test_a_scan_over_the_stack_has_no_copies():
    assert findings_of(scanned, jnp.bfloat16) == []


@needs_libtpu
@pytest.mark.parametrize(
    ("forward", "dtype", "cause"),
    [
        (cast_as_a_whole, jnp.float32, "The stack is cast"),
        (gathered_as_a_whole, jnp.bfloat16, "All layers are gathered"),
        (kept_as_gathered, jnp.bfloat16, "The scan keeps something"),
        (taken_by_index, jnp.bfloat16, "The scan keeps something"),
        (carried, jnp.bfloat16, "The stack is in"),
    ],
)
def test_a_planted_copy_is_found(forward, dtype, cause):
    findings = findings_of(forward, dtype)
    assert [finding for finding in findings if finding.cause.startswith(cause)], findings


@needs_libtpu
@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_stacked_variants_step_copies_no_stack(remat):
    """Float32 parameters that layers read as bfloat16: XLA cast all of them in front of both loops, and remat="none"
    kept those casts once more. It also turned w_q in front of the loops, and the gradient of w_gate behind them."""
    sizes = {"num_layers": 5, "hidden_dim": 512, "intermediate_dim": 1408, "vocab_size": 1024, "max_seq_len": 256}
    heads = {"num_heads": 4, "num_kv_heads": 4, "head_dim": 128}
    trainer = {"batch_size": 4, "seq_len": 256}
    config = step.template("array_stacked", model=sizes | heads | {"remat": remat}, trainer=trainer)
    assert not stack_copies.of_step("array_stacked", config, tpu_topology("v5p:2x2x1"))


@needs_libtpu
def test_a_variant_without_a_stack():
    with pytest.raises(ValueError, match="base has no ArrayStacked among its parameters"):
        stack_copies.of_step("base", step.template("base"), tpu_topology("v5p:2x2x1"))


FINDING = Finding("state.params.w", "convert.1", "convert", "bf16[6,8]", 96, "", "The stack is cast.")


@pytest.mark.parametrize(("findings", "code"), [([], 0), ([FINDING], 1)])
def test_the_command_fails_where_there_is_a_copy(findings, code, monkeypatch, capsys):
    def fake(variant, config, topology):
        assert (variant, config.model.num_layers, config.model.remat, topology) == ("array_stacked", 7, "none", "v5p")
        return findings

    monkeypatch.setattr(stack_copies, "of_step", fake)
    monkeypatch.setattr(stack_copies, "tpu_topology", str)
    command = ["stack_copies", "array_stacked", "v5p", "--num-layers", "7", "--remat", "none"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as exited:
        stack_copies.main()
    assert exited.value.code == code
    assert ("state.params.w" if findings else "no copies of whole stacks") in capsys.readouterr().out
