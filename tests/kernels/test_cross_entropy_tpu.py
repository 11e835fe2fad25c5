# SPDX-License-Identifier: Apache-2.0
"""The TPU kernels of the loss, interpreted on a CPU and held against float64."""

from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # has what detect_races found
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from grug_kernels import dispatch
from grug_kernels.cross_entropy import BlockSizes, api, linear_cross_entropy, pallas_tpu, token_losses, tpu_blocks
from grug_kernels.dispatch import UnsupportedError
from tests.kernels.cross_entropy_cases import (
    Inputs,
    error,
    loss_and_gradients,
    oracle,
    plain_loss,
    random_inputs,
    relative_error,
)
from tests.kernels.test_cross_entropy import ROUNDING

RACES = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
BLOCKS = BlockSizes(16)


@contextmanager
def interpreting(interpret=True, block_vocab=128, cores=1):
    """The kernels on this machine, in small tiles."""
    weighted = partial(api._weighted_losses_per_shard, partial(pallas_tpu.weighted_losses, interpret=interpret))
    by_token = partial(api._token_losses_per_shard, partial(pallas_tpu.token_losses, interpret=interpret))
    with (
        mock.patch.dict(api.WEIGHTED_LOSSES, {"pallas_tpu": weighted}),
        mock.patch.dict(api.TOKEN_LOSSES, {"pallas_tpu": by_token}),
        mock.patch.object(tpu_blocks, "_VOCAB", (block_vocab,)),
        mock.patch.object(tpu_blocks, "cores_of", return_value=cores),
    ):
        yield


def kernels(inputs: Inputs, interpret=True, block_vocab=128, cores=1, **kwargs) -> dict:
    with interpreting(interpret, block_vocab, cores):
        return loss_and_gradients(inputs, **{"implementation": "pallas_tpu", "block_sizes": BLOCKS} | kwargs)


def assert_as_good_as_plain(
    inputs: Inputs, interpret=True, blocks=BLOCKS, placed: Inputs | None = None, cores=1, **kwargs
):
    """As in `test_cross_entropy`: at most twice as wrong as plain jnp and autodiff in the same dtype.

    placed: the inputs as ours is to have them, on a mesh.
    """
    truth = oracle(inputs, cotangent=-2.7, **kwargs)
    plain = loss_and_gradients(inputs, function=plain_loss, cotangent=-2.7, **kwargs)
    ours = kernels(placed or inputs, interpret, cores=cores, cotangent=-2.7, block_sizes=blocks, **kwargs)
    for name, value in ours.items():
        is_matmul_gradient = name in ("dhidden", "dlm_head")
        rounding = ROUNDING[inputs.hidden.dtype.type if is_matmul_gradient else jnp.float32]
        size = truth.get(f"size_of_{name}", abs(truth[name]))
        assert error(value, truth[name]) <= 2 * error(plain[name], truth[name]) + rounding * size, name


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((37, 24, 300), {"z_loss_weight": 1e-2}),  # three blocks of tokens, three of the vocabulary, both ragged
        ((50, 24, 203), {"scale": 30.0, "reduction": "sum"}),
        ((20, 24, 256), {"scale": 3.0, "logit_soft_cap": 4.0, "z_loss_weight": 1e-2}),  # whole tiles
        ((1, 1, 2), {"scale": 0.0}),
    ],
    ids=str,
)
def test_as_good_as_plain_jnp(shape, dtype, options):
    options = dict(options)
    inputs = random_inputs(*shape, dtype=dtype, scale=options.pop("scale", 1.0))
    assert_as_good_as_plain(inputs, **options)


@settings(deadline=None, max_examples=6, derandomize=True, phases=[Phase.generate])
@given(
    tokens=st.integers(1, 300),
    hidden_dim=st.integers(1, 40),
    vocab_size=st.integers(1, 400),
    scale=st.sampled_from([0.0, 1.0, 30.0]),  # flat, ordinary, peaked
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    z_loss_weight=st.sampled_from([0.0, 1e-2]),
    logit_soft_cap=st.sampled_from([None, 5.0]),
    reduction=st.sampled_from(["mean", "sum"]),
)
def test_any_shape(tokens, hidden_dim, vocab_size, scale, dtype, **kwargs):
    assert_as_good_as_plain(random_inputs(tokens, hidden_dim, vocab_size, scale=scale, dtype=dtype), **kwargs)


@pytest.mark.parametrize(("scale", "options"), [(40.0, {}), (0.0, {}), (3.0, {"logit_soft_cap": 4.0})])
def test_equal_rows_and_labels_in_the_ragged_tail(scale, options):
    """Errors of equal rows add up instead of averaging; peaked, flat and capped logits."""
    inputs = random_inputs(tokens=50, vocab_size=300, scale=scale, dtype=jnp.bfloat16)
    labels = jnp.arange(50, dtype=jnp.int32) % 44 + 256  # the third tile is 44 columns wide
    inputs = replace(inputs, hidden=inputs.hidden.at[10:30].set(inputs.hidden[10]), labels=labels)
    assert_as_good_as_plain(inputs, z_loss_weight=1e-2, **options)


def test_products_in_pieces(monkeypatch):
    monkeypatch.setattr(tpu_blocks, "_PRODUCT_ROWS", (32,))
    inputs = random_inputs(tokens=300, hidden_dim=160, vocab_size=300, dtype=jnp.bfloat16)
    assert_as_good_as_plain(inputs, blocks=BlockSizes(256), z_loss_weight=1e-3)


@pytest.mark.parametrize(
    ("shape", "block_tokens", "dtype", "logit_soft_cap"),
    [
        ((37, 24, 300), 16, jnp.float32, 4.0),
        ((37, 24, 300), 16, jnp.bfloat16, None),  # the last block of tokens rounds dlm_head
        ((300, 256, 200), 256, jnp.float32, None),  # hidden_dim in two chunks
    ],
)
def test_memory_is_used_as_a_tpu_would(shape, block_tokens, dtype, logit_soft_cap):
    """With races looked for and memory that starts as NaN."""
    inputs, blocks = random_inputs(*shape, dtype=dtype), BlockSizes(block_tokens)
    assert_as_good_as_plain(inputs, RACES, blocks, z_loss_weight=1e-2, logit_soft_cap=logit_soft_cap)
    assert interpret_pallas_call.races is not None
    assert not interpret_pallas_call.races.races_found


class TestTokensThatDoNotCount:
    def test_change_nothing(self):
        inputs = random_inputs(vocab_size=300)
        counts = np.asarray((inputs.labels >= 0) & (inputs.weight != 0))
        kept = Inputs(inputs.hidden[counts], inputs.lm_head, inputs.labels[counts], inputs.weight[counts])
        full, short = (kernels(x, z_loss_weight=1e-2) for x in (inputs, kept))
        for name in ("loss", "weight_sum", "dlm_head"):
            assert relative_error(full[name], short[name]) < 1e-5, name
        assert not np.asarray(full["dhidden"])[~counts].any()
        assert not np.asarray(full["dweight"])[~counts].any()

    def test_are_all_of_them(self):
        inputs = random_inputs()
        empty = Inputs(inputs.hidden, inputs.lm_head, inputs.labels, jnp.zeros_like(inputs.weight))
        for name, value in kernels(empty, z_loss_weight=1e-2).items():
            assert not np.asarray(value).any(), name

    def test_may_have_losses_that_overflow(self):
        inputs = random_inputs(tokens=8)
        labels, weight = inputs.labels.at[0].set(-1), inputs.weight.at[1].set(0.0)
        huge = Inputs(inputs.hidden.at[:2].set(1e20), inputs.lm_head, labels, weight)
        for name, value in kernels(huge, z_loss_weight=1e-2).items():
            assert np.isfinite(np.asarray(value)).all(), name

    def test_huge_logits_without_z_loss_are_finite(self):
        inputs = random_inputs(tokens=8, vocab_size=300)
        huge = Inputs(inputs.hidden * 1e20, inputs.lm_head, inputs.labels, inputs.weight)
        assert np.isfinite(kernels(huge)["loss"])

    def test_label_outside_the_vocabulary_is_nan_if_it_counts(self):
        """101 is a column of the last tile."""
        inputs = random_inputs(vocab_size=101)
        wrong = Inputs(inputs.hidden, inputs.lm_head, inputs.labels.at[3].set(101), inputs.weight)
        result = kernels(wrong)
        assert np.isnan(result["loss"])
        assert np.isnan(result["dlm_head"]).all()
        ignored = Inputs(wrong.hidden, wrong.lm_head, wrong.labels, wrong.weight.at[3].set(0.0))
        assert np.isfinite(kernels(ignored)["loss"])
        with interpreting():
            loss, lse = token_losses(*wrong.arrays[:3], implementation="pallas_tpu", block_sizes=BLOCKS)
        assert np.isnan(loss).nonzero()[0].tolist() == [3]
        assert np.isfinite(lse).all()


def test_parts_carry_no_gradient():
    inputs = random_inputs()

    def parts_sum(hidden, weight):
        kwargs = {"weight": weight, "z_loss_weight": 1.0, "implementation": "pallas_tpu", "block_sizes": BLOCKS}
        _, parts = linear_cross_entropy(hidden, inputs.lm_head, inputs.labels, **kwargs)
        return parts.cross_entropy + parts.z_loss + parts.weight_sum

    with interpreting():
        for gradient in jax.grad(parts_sum, argnums=(0, 1))(inputs.hidden, inputs.weight):
            assert not gradient.any()


@pytest.mark.parametrize("logit_soft_cap", [None, 2.0])
def test_token_losses_and_their_gradients(logit_soft_cap):
    inputs = random_inputs(vocab_size=300, scale=2.0)
    truth = oracle(inputs, logit_soft_cap=logit_soft_cap)
    cotangents = jax.random.normal(jax.random.key(0), (2, 37))

    @partial(jax.jit, static_argnums=2)
    def run(hidden, lm_head, implementation):
        def losses(hidden, lm_head):
            *outputs, argmax = token_losses(
                hidden,
                lm_head,
                inputs.labels,
                logit_soft_cap=logit_soft_cap,
                return_argmax=True,
                implementation=implementation,
                block_sizes=None if implementation == "reference" else BLOCKS,
            )
            return outputs, argmax

        outputs, pull, argmax = jax.vjp(losses, hidden, lm_head, has_aux=True)
        return *outputs, argmax, pull(list(cotangents))

    with interpreting():
        loss, lse, argmax, gradients = run(inputs.hidden, inputs.lm_head, "pallas_tpu")
    assert relative_error(loss, truth["token_loss"]) < 1e-6
    assert relative_error(lse, truth["lse"]) < 1e-6
    assert argmax.tolist() == truth["argmax"].tolist()
    for ours, theirs in zip(gradients, run(inputs.hidden, inputs.lm_head, "reference")[-1], strict=True):
        assert relative_error(ours, theirs) < 1e-5


def test_argmax_takes_the_first_of_equals():
    hidden, lm_head = jnp.ones((3, 4)), jnp.ones((4, 300)).at[:, :2].set(0.0)
    with interpreting():
        *_, argmax = token_losses(
            hidden, lm_head, jnp.zeros(3, jnp.int32), return_argmax=True, implementation="pallas_tpu"
        )
    assert argmax.tolist() == [2, 2, 2]


def test_named_where_there_is_no_tpu_it_says_so():
    inputs = random_inputs()
    with pytest.raises(UnsupportedError, match="'pallas_tpu' is for TPUs, and there is none here"):
        loss_and_gradients(inputs, implementation="pallas_tpu")


def test_blocks_that_do_not_fit_are_refused_with_what_they_take():
    with pytest.raises(UnsupportedError, match=r"8192 tokens of hidden_dim=4096 takes .* MiB of VMEM \(sum of dhidden"):
        tpu_blocks.tpu_blocks(16384, 4096, 128_256, 2, "v6e", 8192)
    one, other = (tpu_blocks.tpu_blocks(16384, hidden_dim, 128_256, 2, "v6e") for hidden_dim in (4096, 8192))
    assert (one.block_tokens, one.block_vocab) == (2048, 768)
    assert other.block_tokens * other.block_vocab < one.block_tokens * one.block_vocab


@pytest.mark.parametrize(
    "specs",
    [(P("data", None), P("data", "model")), (P(None, None), P(None, None)), None],
    ids=["split", "copies on all devices", "made outside of the mesh"],
)
def test_a_tpu_has_its_kernels_without_being_asked(specs):
    """On a mesh of TPUs that need not be there, and without a warning of a fallback: warnings are errors here."""
    mesh = mesh_of_tpus(AxisType.Explicit)
    with jax.sharding.use_abstract_mesh(mesh), dispatch.targeting("tpu"), dispatch.recording() as choices:
        shardings = [None] * 2 if specs is None else [NamedSharding(mesh, spec) for spec in specs]
        arrays = [
            jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)
            for shape, sharding in zip([(512, 256), (256, 1000)], shardings, strict=True)
        ]
        text = jax.jit(jax.grad(mean_loss, (0, 1))).trace(*arrays).lower(lowering_platforms=("tpu",)).as_text()
    assert [choice.used for choice in choices] == ["pallas_tpu"]
    assert text.count('kernel_name = "cross_entropy_logits"') == 1
    assert text.count('kernel_name = "cross_entropy_gradients"') == 1


def test_several_devices_on_automatic_axes_are_refused():
    """XLA cannot split the kernels: lowering them would raise."""
    with jax.sharding.use_abstract_mesh(mesh_of_tpus(AxisType.Auto)), dispatch.targeting("tpu"):
        shapes = jax.ShapeDtypeStruct((512, 256), jnp.bfloat16), jax.ShapeDtypeStruct((256, 1000), jnp.bfloat16)
        with pytest.raises(UnsupportedError, match=r"cannot be split by XLA.*Make them explicit.*or use 'xla'"):
            jax.jit(partial(mean_loss, implementation="pallas_tpu")).trace(*shapes)


def mesh_of_tpus(axis_type):
    device = AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu")
    return AbstractMesh((2, 2), ("data", "model"), axis_types=(axis_type,) * 2, abstract_device=device)


def mean_loss(hidden, lm_head, implementation=None):
    labels, weight = jnp.zeros(len(hidden), jnp.int32), jnp.ones(len(hidden))
    return linear_cross_entropy(hidden, lm_head, labels, weight=weight, implementation=implementation)[0]
