# SPDX-License-Identifier: Apache-2.0
"""The TPU kernels of the loss on eight devices: interpreted they give what one gives, compiled they send what we expect
and nothing else."""

import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bench.tpu import hlo
from bench.tpu.collectives import collective_of
from bench.tpu.record import compiling
from bench.tpu.topology import LIBTPU_IS_MISSING, has_libtpu, tpu_topology
from grug_kernels.cross_entropy import BlockSizes, linear_cross_entropy, token_losses
from tests.kernels.cross_entropy_cases import Inputs, oracle, random_inputs, relative_error
from tests.kernels.test_cross_entropy_sharding import (
    BATCH,
    LAYOUTS,
    loss_and_gradients,
    mesh_of,
    placed,
    token_losses_and_gradients,
    unsharded,
)
from tests.kernels.test_cross_entropy_tpu import assert_as_good_as_plain, interpreting

# check_vma takes only the interpreter that simulates a TPU's memory.
INTERPRET = pltpu.InterpretParams()
# Those left out split nothing: a kernel sees in them what it sees on one device.
SPLIT = [name for name in LAYOUTS if name not in ("head over an axis without tokens", "nothing split")]


@pytest.mark.parametrize(
    ("function", "layout"),
    [
        *((loss_and_gradients, layout) for layout in SPLIT),
        *((token_losses_and_gradients, layout) for layout in ("fsdp and vocabulary", "vocabulary over two axes")),
    ],
)
def test_sharded_equals_unsharded(function, layout):
    """Shards of 50 and 100 columns, of a tile of 128: the columns that fill it have the numbers of others' labels."""
    lengths, *specs = LAYOUTS[layout]
    inputs, expected = unsharded(function)
    with jax.set_mesh(mesh_of(lengths)), interpreting(INTERPRET):
        arrays = placed(inputs, *specs)
        outputs, gradients = jax.jit(function, static_argnums=4)(*arrays, "pallas_tpu")
    for got, truth in zip(jax.tree.leaves((outputs, gradients)), expected, strict=True):
        assert relative_error(got, truth) < 2e-6
    for gradient, array in zip(gradients, arrays, strict=False):
        assert gradient.sharding.is_equivalent_to(array.sharding, gradient.ndim)


@pytest.mark.parametrize(("dtype", "scale"), [(jnp.float32, 60.0), (jnp.bfloat16, 1.0)])
def test_several_ragged_tiles_are_as_good_as_plain_jnp(dtype, scale):
    """Two tiles for each device's 150 columns. At 60 lse is 200, whose exponential float32 cannot hold."""
    lengths, *specs = LAYOUTS["tokens whole"]
    inputs = random_inputs(tokens=20, hidden_dim=16, vocab_size=600, dtype=dtype, scale=scale)
    with jax.set_mesh(mesh_of(lengths)):
        assert_as_good_as_plain(inputs, INTERPRET, placed=Inputs(*placed(inputs, *specs)), z_loss_weight=1e-3)


def losses_of(inputs: Inputs):
    """loss, and the loss, lse and argmax of each token, on four shards of the vocabulary."""

    @jax.jit
    def run(hidden, lm_head, labels, weight):
        kwargs = {"implementation": "pallas_tpu", "block_sizes": BlockSizes(16)}
        loss, _ = linear_cross_entropy(hidden, lm_head, labels, weight=weight, **kwargs)
        return loss, token_losses(hidden, lm_head, labels, return_argmax=True, **kwargs)

    lengths, *specs = LAYOUTS["tokens whole"]
    with jax.set_mesh(mesh_of(lengths)), interpreting(INTERPRET):
        loss, by_token = run(*placed(inputs, *specs))
    return float(loss), [np.asarray(x) for x in by_token]


def test_labels_anywhere():
    """The first and last of each shard of 50 columns; ignored ones; such as no shard has."""
    inputs = random_inputs(tokens=13, hidden_dim=16, vocab_size=200)
    inside = [0, 49, 50, 99, 100, 149, 150, 199]
    outside = [200, 227, 2**31 - 1]
    labels = jnp.asarray([*inside, *outside, -1, -(2**31)], jnp.int32)
    counts = (labels >= 0) & (labels < 200)
    inputs = replace(inputs, labels=labels, weight=counts.astype(jnp.float32))
    truth = oracle(replace(inputs, labels=jnp.where(counts, labels, -1)))
    loss, (token_loss, lse, argmax) = losses_of(inputs)
    assert loss == pytest.approx(truth["loss"], rel=1e-6)
    assert relative_error(lse, truth["lse"]) < 1e-6
    assert argmax.tolist() == truth["argmax"].tolist()
    assert relative_error(token_loss[:8], truth["token_loss"][:8]) < 1e-6
    assert np.isnan(token_loss[8:11]).all()
    assert not token_loss[11:].any()
    loss, _ = losses_of(replace(inputs, weight=inputs.weight.at[9].set(1.0)))
    assert np.isnan(loss)


def test_argmax_takes_the_first_of_equals_in_all_shards():
    """Equal in shards 1 and 3, and less in 0 and 2."""
    inputs = random_inputs(tokens=3, hidden_dim=16, vocab_size=200)
    lm_head = jnp.zeros((16, 200)).at[:, jnp.asarray([60, 61, 160])].set(1.0)
    _, (*_, argmax) = losses_of(replace(inputs, hidden=jnp.ones((3, 16)), lm_head=lm_head))
    assert argmax.tolist() == [60] * 3


@pytest.mark.skipif(not has_libtpu(), reason=LIBTPU_IS_MISSING)
def test_collectives_on_a_tpu():
    """Once: the head's shard is gathered over "data" and its gradient scattered there, and the loss summed. For each
    block, over "model": the largest lse, the sum of the softmax, the label's logit, and dhidden.

    Never the logits, nor the vocabulary: no array is as wide as all of it, or as large as one device's logits.
    """
    tokens, hidden_dim, vocab_size, block_tokens = 2048, 384, 1536, 256
    topology = tpu_topology("v5p:2x2x1")
    mesh = topology.mesh(model=2)

    def struct(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    def loss(hidden, lm_head, labels, weight):
        blocks = BlockSizes(block_tokens)
        return linear_cross_entropy(hidden, lm_head, labels, weight=weight, reduction="sum", block_sizes=blocks)[0]

    args = (
        struct((tokens, hidden_dim), jnp.bfloat16, BATCH, None),
        struct((hidden_dim, vocab_size), jnp.bfloat16, "data", "model"),
        struct((tokens,), jnp.int32, BATCH),
        struct((tokens,), jnp.float32, BATCH),
    )
    with topology.targeted(mesh):
        compiled = compiling(jax.value_and_grad(loss, argnums=(0, 1)), *args, topology=topology)
        with compiled as (record, program):
            assert record.refusal is None, str(record.refusal)
            assert [choice.used for choice in record.choices] == ["pallas_tpu"]
            module, text = program.module, program.compiled.hlo

    (loop,) = (i for i in module.computations[module.entry] if i.opcode == "while")
    tokens_here, vocab_here = tokens // 2, vocab_size // 2
    assert sent_by(module, module.entry) == [
        ("all-gather", f"bf16[{hidden_dim // 2},{vocab_here}]"),
        ("all-reduce", "f32[]"),
        ("reduce-scatter", f"f32[{hidden_dim},{vocab_here}]"),
    ]
    assert module.trips_of(loop) == tokens_here // block_tokens
    assert sent_by(module, *loop.called("body")) == [
        *[("all-reduce", f"f32[{block_tokens}]")] * 3,
        ("all-reduce", f"f32[{hidden_dim},{block_tokens}]"),
    ]
    shapes = [[int(extent) for extent in dims.split(",")] for dims in re.findall(r"\w\[([\d,]+)\]", text)]
    assert max(map(math.prod, shapes)) < tokens_here * vocab_here
    assert not [shape for shape in shapes if vocab_size in shape]


def sent_by(module: hlo.Module, computation: str) -> list[tuple[str, str]]:
    """Each array that goes into a collective of `computation`, not of its loops: kind, type and shape. Sorted."""
    shapes = {instruction.name: instruction.shape for instruction in module.computations[computation]}
    sent = []
    for instruction in module.computations[computation]:
        if collective := collective_of(module, computation, instruction):
            sent += [(collective.kind, re.sub(r"\{.*", "", shapes[name])) for name in instruction.operands]
        if instruction.opcode != "while":
            sent += [each for callee in instruction.called("calls") for each in sent_by(module, callee)]
    return sorted(sent)
