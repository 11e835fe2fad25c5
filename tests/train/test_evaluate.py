# SPDX-License-Identifier: Apache-2.0
"""Tagged evaluation against sums written out by hand, in float64, over the sequences themselves."""

import math
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tokenizers import Tokenizer

from train import lev
from train.data import build_validation_sets
from train.evaluate import GrugEvalConfig, bits_per_byte, build_tagged_evaluator
from train.mesh import BATCH_AXES

from .test_data import CONFIG, SEQ_LEN, mesh_of, tiny_data

TAGS = ("python/prose", "python/code")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("cache"))


def per_token_losses(params, batch):
    """A model whose loss depends on the target alone: params [vocab_size] are the nats."""
    targets = jnp.roll(batch.tokens, -1, axis=1)
    return params.at[targets].get(out_sharding=jax.typeof(targets).sharding), batch.loss_weight, targets


def evaluator_of(prepared, losses=per_token_losses, *, batch_size=4, mesh=None, examples=None):
    cfg = GrugEvalConfig(max_examples_per_dataset=examples)
    return build_tagged_evaluator(prepared, CONFIG, cfg, SEQ_LEN, batch_size, mesh or mesh_of(1, 1), losses)


def random_nats(prepared):
    """Rare tokens cost much and are long: a mean of ratios would be far from the ratio of means."""
    return np.random.default_rng(1).gamma(0.5, 8.0, prepared.vocab_size).astype(np.float32)


def by_hand(prepared, nats, *, examples=None) -> dict[str, float]:
    """Every key but the times. The texts are ASCII, so a token's bytes are the characters it decodes to."""
    tokenizer = Tokenizer.from_file(str(prepared.tokenizer_dir / "tokenizer.json"))
    sums = {}
    for tag, dataset in build_validation_sets(prepared, CONFIG, SEQ_LEN).items():
        targets = [t for example in list(dataset.as_sync_dataset())[:examples] for t in np.asarray(example.tokens)[1:]]
        num_bytes = sum(len(tokenizer.decode([t])) for t in targets)
        sums[tag] = np.array([sum(float(nats[t]) for t in targets), len(targets), num_bytes])
    total = sum(sums.values())
    loss = {tag: s[0] / s[1] for tag, s in sums.items()}
    bpb = {tag: s[0] / s[2] / math.log(2) for tag, s in sums.items()}
    expected = {f"eval/{tag}/loss": loss[tag] for tag in TAGS} | {f"eval/{tag}/bpb": bpb[tag] for tag in TAGS}
    for where, name in (("eval", "loss"), ("eval/python", "micro_loss")):
        expected[f"{where}/{name}"] = total[0] / total[1]
        expected[f"{where}/bpb"] = total[0] / total[2] / math.log(2)
        expected[f"{where}/macro_loss"] = sum(loss.values()) / 2
        expected[f"{where}/macro_bpb"] = sum(bpb.values()) / 2
    return expected


def exact(metrics, prefix="eval"):
    """Without the times, and Levanter's bits per byte: `test_evaluate_saved.py` holds those against Levanter."""
    times = {f"{prefix}/loading_time", f"{prefix}/total_time"}
    assert times <= set(metrics)
    assert {name for name in metrics if name.endswith("_compat")} == {
        f"{name}_compat" for name in metrics if name.endswith("bpb")
    }
    return {name: value for name, value in metrics.items() if name not in times and not name.endswith("_compat")}


# 7 divides neither set, so the last batch is filled up; 512 is more than there is.
@pytest.mark.parametrize("batch_size", [4, 7, 512])
def test_losses_and_bits_per_byte_are_the_sums_by_hand(prepared, batch_size):
    nats = random_nats(prepared)
    evaluate = evaluator_of(prepared, batch_size=batch_size)
    metrics = evaluate(jnp.asarray(nats))
    # Levanter's running means are float32: 1e-5 covers their rounding over a few hundred batches.
    assert exact(metrics) == pytest.approx(by_hand(prepared, nats), rel=1e-5)
    sets = build_validation_sets(prepared, CONFIG, SEQ_LEN)
    assert evaluate.tokens == {tag: (SEQ_LEN - 1) * len(sets[tag].as_sync_dataset()) for tag in TAGS}


def test_sharded_over_eight_devices_the_answer_is_the_same(prepared):
    def sharded_losses(params, batch):
        assert jax.typeof(batch.tokens).sharding.spec == P(BATCH_AXES, None)
        return per_token_losses(params, batch)

    nats = random_nats(prepared)
    evaluate = evaluator_of(prepared, sharded_losses, batch_size=8, mesh=mesh_of(2, 2, 2), examples=5)
    assert exact(evaluate(jnp.asarray(nats))) == pytest.approx(by_hand(prepared, nats, examples=5), rel=1e-5)


def test_inside_a_mesh_for_other_weights_under_another_prefix(prepared):
    """As the loop calls it: twice on one step, for the weights and for their average."""
    nats, mesh, told = random_nats(prepared), mesh_of(1, 2), []
    evaluate = evaluator_of(prepared, mesh=mesh, examples=8)
    with jax.set_mesh(mesh):
        current = evaluate(jnp.asarray(nats), progress=lambda *done: told.append(done))
        average = evaluate(jnp.asarray(2 * nats), prefix="eval/ema")
    assert told == [(0, 4), (1, 4), (2, 4), (3, 4)]  # batches of 4, of two sets of 8
    assert average["eval/ema/bpb"] == pytest.approx(2 * current["eval/bpb"])
    assert {name.replace("eval/ema", "eval") for name in average} == set(current)


def test_bytes_are_counted_where_the_losses_have_weight(prepared):
    """A loss that leaves out long tokens must leave out their bytes: all nats are 1, so bpb is 1 / ln 2 / (1 byte)."""
    lengths = jnp.asarray(prepared.byte_lengths)

    def single_bytes_only(params, batch):
        losses, weights, targets = per_token_losses(params, batch)
        of_target = lengths.at[targets].get(out_sharding=jax.typeof(targets).sharding)
        return losses, weights * (of_target == 1), targets

    metrics = evaluator_of(prepared, single_bytes_only)(jnp.ones(prepared.vocab_size))
    assert metrics["eval/bpb"] == pytest.approx(1 / math.log(2))
    assert evaluator_of(prepared)(jnp.ones(prepared.vocab_size))["eval/bpb"] < 1.2


def test_no_progress_bar_cuts_through_the_runs_own(prepared, monkeypatch):
    """Levanter draws one on terminals only, so its output cannot be looked for here."""
    monkeypatch.setattr(sys.modules[lev.TaggedEvaluator.__module__], "tqdm", None)
    evaluator_of(prepared, examples=4)(jnp.ones(prepared.vocab_size))


def test_a_failed_evaluation_leaves_no_thread_behind(prepared):
    """A reading thread left behind aborts the interpreter at exit: code 134 where 1, or 130 after Ctrl-C, is due."""

    def failing(params, batch):
        raise RuntimeError("no loss today")

    evaluate = evaluator_of(prepared, failing)
    before = set(threading.enumerate())
    with pytest.raises(RuntimeError, match="no loss today") as raised:
        evaluate(None)
    assert set(threading.enumerate()) == before, raised


def test_bits_per_byte_is_a_ratio_of_sums():
    """Batches of 100 tokens, 300 nats and 400 and 200 bytes: 1 nat per byte, where a mean of ratios says 1.125."""
    nats = {"loss": 3.0, "a/loss": 3.0, "b/loss": 3.0, "macro_loss": 3.0}
    bpb = bits_per_byte(nats, {"loss": 3.0, "a/loss": 3.0, "b/loss": 1.0})
    assert bpb == pytest.approx(
        {name: x / math.log(2) for name, x in {"a/bpb": 1, "b/bpb": 3, "bpb": 1, "macro_bpb": 2}.items()}
    )


def test_a_macro_mean_is_of_the_tags_below_a_parent():
    """Of any depth; a tag that is a parent itself does not count among those below it; one tag alone has no mean."""
    tags = {"a/b/c": 1.0, "a/b": 2.0, "a/d": 6.0, "e": 11.0}
    nats = {f"{tag}/loss": bits * math.log(2) for tag, bits in tags.items()} | {"loss": 1.0}
    bpb = bits_per_byte(nats, dict.fromkeys(nats, 1.0))
    macro = {name: value for name, value in bpb.items() if name.endswith("macro_bpb")}
    assert macro == pytest.approx({"macro_bpb": 5, "a/macro_bpb": 3, "a/b/macro_bpb": 1})
    assert bits_per_byte({"loss": 1.0, "a/b/loss": 1.0}, {"loss": 1.0, "a/b/loss": 1.0}).keys() == {"bpb", "a/b/bpb"}


def test_a_batch_that_does_not_divide_over_the_mesh_is_refused(prepared):
    with pytest.raises(ValueError, match="batch_size=6 is not a multiple of the mesh's 4 data shards"):
        evaluator_of(prepared, batch_size=6, mesh=mesh_of(2, 2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"every": 0}, "every=0 steps; choose 1 or more"),
        ({"max_examples_per_dataset": 0}, "max_examples_per_dataset=0; choose 1 or more, or None"),
        ({"eval_current": False, "eval_ema": False}, "leave nothing to evaluate"),
    ],
)
def test_configurations_that_evaluate_nothing_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        GrugEvalConfig(**fields)
