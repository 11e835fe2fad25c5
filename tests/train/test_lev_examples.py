# SPDX-License-Identifier: Apache-2.0
"""Examples of arrays and examples with named axes say the same, whichever way one comes from the other."""

import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from levanter.data.dataset import ListAsyncDataset
from levanter.layers.attention import AttentionMask

from train import lev
from train.data import build_train_dataset, build_validation_sets
from train.lev_examples import _ensure_grug_lm_example, grug_examples

from .test_data import BATCH_SIZE, CONFIG, SEQ_LEN, mesh_of, tiny_data
from .test_levanter_parity import levanter_config

POS = hax.Axis("position", 12)
EOS = 7


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("cache"))


def random_example(seed: int, batch: tuple[int, ...] = (), window: int | None = None):
    """Tokens, weights and segment ids that are all different from what a default would give."""
    rng = np.random.default_rng(seed)
    shape = (*batch, POS.size)
    segment_ids = jnp.asarray(rng.integers(-1, 3, shape), jnp.int32)
    mask = lev.GrugLmExample(jnp.zeros(1), jnp.zeros(1)).attn_mask.with_segment_ids(segment_ids)
    mask = type(mask)(is_causal=True, segment_ids=mask.segment_ids, sliding_window=window)
    tokens = jnp.asarray(rng.integers(0, 100, shape), jnp.int32)
    return lev.GrugLmExample(tokens, jnp.asarray(rng.random(shape), jnp.float32), mask)


def assert_same(one, other) -> None:
    """Tokens, loss weights, and every part of the mask: bit for bit."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)


@settings(deadline=None, max_examples=6)
@given(
    tokens=st.lists(st.integers(0, 9), min_size=POS.size, max_size=POS.size),
    ignore_id=st.sampled_from([None, 3]),
    window=st.sampled_from([None, 4]),
)
def test_unnamed_lm_example_parity_with_named(tokens, ignore_id, window):
    array = jnp.asarray(tokens, jnp.int32)
    grug = lev.GrugLmExample.causal(array, ignore_id=ignore_id, eos_id=EOS, sliding_window=window)
    named = lev.LmExample.causal(hax.named(array, POS), ignore_id=ignore_id, eos_id=EOS, sliding_window=window)
    assert_same(lev.grug_lm_example_from_named(named), grug)
    # By hand: the last position has no next token, and a new document begins after each end.
    weights = [float(i + 1 < len(tokens) and tokens[i + 1] != ignore_id) for i in range(len(tokens))]
    assert grug.loss_weight.tolist() == weights
    assert grug.attn_mask.segment_ids[0].tolist() == [tokens[:i].count(EOS) for i in range(len(tokens))]


@settings(deadline=None, max_examples=6)
@given(seed=st.integers(0, 99), batch=st.sampled_from([(), (3,)]), window=st.sampled_from([None, 5]))
def test_named_unnamed_lm_example_roundtrip(seed, batch, window):
    example = random_example(seed, batch, window)
    named = lev.named_lm_example_from_grug(example, POS)
    axes = ("batch", "position") if batch else ("position",)
    assert tuple(axis.name for axis in named.tokens.axes) == axes
    assert np.array_equal(named.tokens.array, example.tokens)
    assert np.array_equal(named.loss_weight.array, example.loss_weight)
    assert_same(lev.grug_lm_example_from_named(named), example)


def test_masks_convert_and_those_that_cannot_are_refused():
    mask = random_example(1, window=5).attn_mask
    named = lev.named_attention_mask_from_grug(mask, POS)
    assert (named.is_causal, named.sliding_window) == (True, 5)
    assert [ids.axes[0].name for ids in named.segment_ids] == ["position", "key_position"]
    assert_same(lev.grug_attention_mask_from_named(named), mask)
    explicit = AttentionMask.explicit(hax.ones((POS, POS.alias("key_position"))))
    with pytest.raises(NotImplementedError, match="Explicit attention masks"):
        lev.grug_attention_mask_from_named(explicit)


def test_both_kinds_are_ensured_and_anything_else_is_refused():
    example = random_example(2)
    named = lev.named_lm_example_from_grug(example, POS)
    assert lev.LmEvalExample == lev.LmExample | lev.GrugLmExample
    assert _ensure_grug_lm_example(example) is example
    assert_same(_ensure_grug_lm_example(named), example)
    assert lev._ensure_named_lm_example(named, EvalBatch=None, model_pos=POS) is named
    assert_same(
        lev.grug_lm_example_from_named(lev._ensure_named_lm_example(example, EvalBatch=None, model_pos=POS)), example
    )
    with pytest.raises(TypeError, match="an LmExample or a GrugLmExample, and this is a <class 'dict'>"):
        _ensure_grug_lm_example({})


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_train_set_last_mile_wraps_to_named(prepared, packing):
    """Inside everything is arrays; Levanter's `train_set` names the axes of the same examples at the very end."""
    config, cfg = levanter_config(prepared, packing)
    position, schedule = hax.Axis("position", SEQ_LEN), lev.BatchSchedule(BATCH_SIZE)
    wrapped = config.train_set(position, schedule, key=jax.random.PRNGKey(0)).as_sync_dataset().get_batch(range(4))
    ours = build_train_dataset(prepared, cfg, SEQ_LEN, BATCH_SIZE, seed=0)
    for example, plain in zip(wrapped, ours.mixture.as_sync_dataset().get_batch(range(4)), strict=True):
        assert isinstance(example, lev.LmExample)
        assert example.tokens.axes == (position,)
        assert_same(_ensure_grug_lm_example(example), plain)


def test_tagged_evaluator_accepts_grug_lm_examples(prepared):
    """The same sequences under two tags, once of arrays and once with names, normalised before they are batched."""
    plain = build_validation_sets(prepared, CONFIG, SEQ_LEN)["python/code"].take(8)
    examples = plain.as_sync_dataset().get_batch(range(8))
    position = hax.Axis("position", SEQ_LEN)
    named = ListAsyncDataset([lev.named_lm_example_from_grug(example, position) for example in examples])
    nats = jnp.asarray(np.random.default_rng(0).random(prepared.vocab_size), jnp.float32)

    def losses(params, batch):
        assert isinstance(batch, lev.GrugLmExample)
        targets = jnp.roll(batch.tokens, -1, axis=1)
        return params.at[targets].get(out_sharding=jax.typeof(targets).sharding), batch.loss_weight, targets

    mesh, mapping = mesh_of(1, 2), {"batch": ("replica_dcn", "data")}
    tagged = [(plain, ["arrays"]), (grug_examples(named), ["names"])]
    evaluator = lev.TaggedEvaluator(4, tagged, losses, device_mesh=mesh, axis_mapping=mapping)
    with jax.set_mesh(mesh), lev.axis_mapping(mapping):
        metrics = lev.eval_model(evaluator, nats)
    targets = np.concatenate([np.asarray(example.tokens)[1:] for example in examples])
    # Levanter's running means are float32.
    assert metrics["arrays/loss"] == pytest.approx(np.asarray(nats)[targets].mean(), rel=1e-5)
    assert metrics["names/loss"] == pytest.approx(metrics["arrays/loss"], rel=1e-6)
