# SPDX-License-Identifier: Apache-2.0
"""What is advised where memory is short. Sizes are in GiB, and made up so that they can be added up by hand."""

import dataclasses

import pytest

from bench.plan import advice as plan_advice
from bench.plan.advice import Advice, Situation, advice, reckoned_kept
from bench.plan.holders import GRADIENTS, KEPT, LOSS, WEIGHTS, WORK
from grug_model.array_stacked.model import GrugModelConfig
from tests.bench.plan_cases import GIB

ACTIVATIONS = Situation(
    over_bytes=10 * GIB,
    held={"parameters": 1 * GIB, "optimizer": 2 * GIB, KEPT: 64 * GIB, WORK: 8 * GIB, WEIGHTS: GIB, GRADIENTS: GIB},
    remat="none",
    policies=("none", "full", "save_attention"),
    kept_bytes={"full": 8 * GIB, "save_attention": 20 * GIB},
    rows=16,
    batch_size=64,
    model_axis=1,
    data_axis=4,
    replicas=1,
    devices=4,
)
STATE = dataclasses.replace(
    ACTIVATIONS,
    held={"parameters": 30 * GIB, "optimizer": 60 * GIB, KEPT: GIB, WORK: GIB, WEIGHTS: GIB, GRADIENTS: 2 * GIB},
    remat="full",
    rows=1,
    batch_size=4,
)


def test_where_activations_dominate_the_policy_that_computes_least_twice_comes_first():
    first, second, third, *_ = advice(ACTIVATIONS)
    assert first == Advice("--remat save_attention in place of none", 44 * GIB)
    assert second == Advice("--remat full in place of none", 56 * GIB)
    assert third.text == "--batch 32 in place of 64, 8 rows on a device"  # 12 rows would do, and do not divide 16
    assert third.saves_bytes == (64 + 8) / 2 * GIB
    assert str(first) == "--remat save_attention in place of none: saves about 44.00 GiB"


def test_a_batch_is_made_no_smaller_than_it_has_to_be():
    nearly = dataclasses.replace(ACTIVATIONS, rows=15, batch_size=60)  # 15 rows: of 5, 3 and 1 the first is enough
    assert "--batch 20 in place of 60, 5 rows on a device" in [way.text for way in advice(nearly)]


def test_only_policies_that_the_variant_has_are_advised():
    fewer = dataclasses.replace(ACTIVATIONS, policies=("none", "full"))
    assert advice(fewer)[0].text == "--remat full in place of none"
    assert not [way for way in advice(dataclasses.replace(fewer, remat="full")) if "remat" in way.text]


def test_a_policy_of_which_nothing_can_be_reckoned_is_not_advised():
    unknown = dataclasses.replace(ACTIVATIONS, policies=("none", "save_matmuls"))
    assert not [way for way in advice(unknown) if "remat" in way.text]


def test_where_the_state_dominates_it_goes_to_the_host_or_over_more_chips():
    """Neither remat nor the batch, one row already, can do anything about it."""
    first, second, *others = advice(STATE)
    assert first == Advice("--trainer.offload optimizer, into the host's memory", 60 * GIB)
    assert second == Advice("twice as many chips (--tpu; 4 devices now) for the same batch", 45 * GIB)
    assert [way.text for way in others] == ["--trainer.model-axis 2, which splits whole weights and their gradients"]
    assert others[0].saves_bytes == 1.5 * GIB


def test_an_average_of_the_weights_goes_first_where_that_is_enough():
    held = STATE.held | {"ema": 30 * GIB}
    assert (
        advice(dataclasses.replace(STATE, held=held))[0].text == "no average of the weights (--trainer.ema-beta None)"
    )


def test_where_nothing_is_enough_what_saves_most_comes_first():
    desperate = dataclasses.replace(ACTIVATIONS, over_bytes=1000 * GIB)
    saves = [way.saves_bytes for way in advice(desperate)]
    assert saves == sorted(saves, reverse=True)
    assert advice(desperate)[0].text == "--batch 4 in place of 64, 1 rows on a device"


def test_the_model_axis_is_advised_only_where_there_are_devices_for_it():
    """Those along "data": of four devices, with sequences split over four, none is left."""
    assert [way for way in advice(ACTIVATIONS) if "model-axis 2" in way.text]
    assert not [way for way in advice(dataclasses.replace(ACTIVATIONS, data_axis=1)) if "model-axis" in way.text]


def test_of_several_copies_of_the_weights_one_is_advised():
    ways = advice(dataclasses.replace(STATE, replicas=2, data_axis=2))
    assert Advice("--trainer.replica-dcn 1 in place of 2, one copy of the weights", 45 * GIB) in ways
    assert not [way for way in advice(STATE) if "replica-dcn" in way.text]


def test_the_loss_is_split_by_the_model_axis():
    held = ACTIVATIONS.held | {LOSS: 40 * GIB}
    ways = advice(dataclasses.replace(ACTIVATIONS, held=held))
    assert next(way for way in ways if "model-axis 2" in way.text).saves_bytes == (1 + 1 + 40) / 2 * GIB


def test_what_is_kept_is_reckoned_from_the_sizes():
    model = GrugModelConfig(num_layers=16, hidden_dim=512, num_heads=8, head_dim=64)
    kept = reckoned_kept(model, rows=2, seq_len=1024)
    inputs = 2 * 1024 * 16 * 512 * 2
    assert kept == {
        "offload": 0,
        "nested": pytest.approx(inputs / 2),  # 4 groups' inputs, and those of the 4 layers of one group
        "full": inputs,
        "save_attention": 2 * inputs + 2 * 1024 * 16 * 8 * 4,
        "save_matmuls": 7 * inputs + 2 * 1024 * 16 * (8 * 4 + 2 * 1792 * 2),  # q, k, v; of the MLP two; two outputs
    }


def test_policies_are_ordered_from_the_least_to_the_most_that_is_kept():
    model = GrugModelConfig(num_layers=16)
    kept = reckoned_kept(model, rows=1, seq_len=4096)
    assert list(kept) == [policy for policy in plan_advice.LEAST_KEPT_FIRST if policy in kept]
    assert list(kept.values()) == sorted(kept.values())
