# SPDX-License-Identifier: Apache-2.0
"""The order of the data against Levanter's own documented route, built here on the same caches: bit for bit."""

import contextlib
import itertools
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from train import lev
from train.corpus import COMPONENTS
from train.data import DataConfig, build_train_dataset, build_validation_sets
from train.mixture import mixture_metrics, mixture_news

from .test_data import BATCH_SIZE, SEQ_LEN, batches, mesh_of, tiny_data


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("cache"))


def levanter_config(prepared, packing="stream", weights=None):
    """Levanter's own configuration of the same caches, by its documented route, and ours of the same wishes."""
    cfg = DataConfig(vocab_size=300, packing=packing, weights=weights, mixture_block_size=16)
    config = lev.LmDataConfig(
        tokenizer=str(prepared.tokenizer_dir),
        auto_build_caches=False,
        components={
            name: lev.DatasetComponent(cache_dir=str(cache.splits["train"].parent), pack=packing == "documents")
            for name, cache in prepared.caches.items()
        },
        train_weights=weights or {"prose": 0.125, "code": 0.875},
        mixture_block_size=16,
        shuffle=lev.BlockShuffleConfig(io_block_size=16, window_blocks=32),
    )
    return config, cfg


STAGES = [(0, {"prose": 1.0}), (2, {"prose": 0.25, "code": 0.75}), (6, {"code": 1.0})]


@pytest.mark.parametrize("packing", ["stream", "documents"])
@pytest.mark.parametrize("weights", [None, STAGES], ids=["shares", "stages"])
def test_batches_are_levanters_bit_for_bit(prepared, packing, weights):
    """Every array of every batch, from any step on, against Levanter's loader walked through from its beginning."""
    config, cfg = levanter_config(prepared, packing, weights)
    mixture = config.train_mixture(
        lev.Axis("position", SEQ_LEN), lev.BatchSchedule(BATCH_SIZE), key=jax.random.PRNGKey(3)
    )
    loader = lev.DataLoader(mixture, BATCH_SIZE, mesh=mesh_of(1, 1), axis_resources={"batch": ("replica_dcn", "data")})
    with contextlib.closing(iter(loader)) as batches_of_levanter:
        expected = list(itertools.islice(batches_of_levanter, 8))
    for start in (0, 5):
        ours = batches(prepared, 8 - start, cfg=cfg, seed=3, start=start, mesh=mesh_of(1, 2))
        for step, (theirs, mine) in enumerate(zip(expected[start:], ours, strict=True)):
            assert jax.tree.structure(theirs) == jax.tree.structure(mine)
            for a, b in zip(jax.tree.leaves(theirs), jax.tree.leaves(mine), strict=True):
                assert np.array_equal(a, b), f"batch {start + step}"


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_validation_sets_are_levanters_bit_for_bit(prepared, packing):
    config, cfg = levanter_config(prepared, packing)
    theirs = config.build_token_datasets(
        config.build_caches("validation"), lev.Axis("position", SEQ_LEN), split="validation"
    )
    ours = build_validation_sets(prepared, cfg, SEQ_LEN)
    for name in COMPONENTS:
        shuffled = theirs[name].shuffle(jax.random.PRNGKey(0)).as_sync_dataset()
        mine = ours[f"python/{name}"].as_sync_dataset()
        assert len(mine) == len(shuffled) > 1
        for a, b in zip(shuffled, mine, strict=True):
            assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_stages_are_said_and_logged_as_levanter_logs_them(prepared, monkeypatch):
    """At the steps at which Levanter's own hook logs a stage, ours says it; the numbers are the same."""
    from levanter.callbacks import mixture_weight_logging_hook

    _, cfg = levanter_config(prepared, weights=STAGES)
    dataset = build_train_dataset(prepared, cfg, SEQ_LEN, BATCH_SIZE, 0)
    logged = {}
    monkeypatch.setattr("levanter.tracker.log", lambda metrics, step: logged.update({step + 1: metrics}))
    hook = mixture_weight_logging_hook(lev.BatchSchedule(BATCH_SIZE), dataset.mixture)
    for step in range(1, 10):
        hook(SimpleNamespace(step=step - 1))
    assert list(logged) == [1, 3, 7]
    for step in range(1, 10):
        ours = mixture_metrics(dataset, step)
        stage = max(start for start in logged if start <= step)
        assert {name: value for name, value in ours.items() if "epochs" not in name} == logged[stage]
    said = {step: news for step in range(1, 10) if (news := mixture_news(dataset, step))}
    assert said == {
        3: "step 3: the data mixture enters stage 1 (the last is 2): prose 0.25, code 0.75",
        7: "step 7: the data mixture enters stage 2 (the last is 2): code 1",
    }
