# SPDX-License-Identifier: Apache-2.0
"""The meter against a simulated device and clock."""

import subprocess
import sys

import numpy as np
import pytest

from tests.train.simulated import BATCH, FLOPS, SEQ, new_meter, train
from train.metrics import NonFiniteLossError


def test_every_step_has_one_row_with_its_metrics(device):
    tracker, meter = new_meter(log_every=10)
    train(meter, device, range(1, 26), losses=lambda step: 1.0 + step)
    meter.flush()
    assert [step for step, _ in tracker.rows] == list(range(1, 26))
    assert tracker.series("train/loss") == {step: 1.0 + step for step in range(1, 26)}
    assert tracker.series("global_step") == {step: step for step in range(1, 26)}
    assert tracker.series("run_progress")[10] == 0.25
    assert tracker.series("optim/learning_rate")[7] == 0.5
    assert list(tracker.series("throughput/duration")) == [10, 20, 25]
    assert meter.last == tracker.rows[-1][1]


def test_nothing_is_fetched_between_log_steps(device):
    _, meter = new_meter(log_every=10)
    train(meter, device, range(1, 10))
    assert device.fetched == 0
    assert device.now == 0.0
    train(meter, device, [10])
    assert device.fetched == 10


def test_the_last_step_is_logged_without_a_flush(device):
    tracker, meter = new_meter(total_steps=13, log_every=10)
    train(meter, device, range(1, 14))
    assert tracker.rows[-1][0] == 13


def test_loading_that_hides_behind_the_device_is_not_subtracted(device):
    """Subtracted, it would report steps of 7 seconds from a device that needs 10."""
    tracker, meter = new_meter(log_every=10)
    train(meter, device, range(1, 21), loading=3.0)
    assert tracker.series("throughput/duration") == {10: pytest.approx(10.0), 20: pytest.approx(10.0)}
    assert tracker.series("throughput/loading_time")[20] == pytest.approx(3.0)


def test_a_slow_loader_shows_in_the_duration(device):
    """Ten loads of 50 s with the device busy for 10 of each: only the first, with no step in flight, is left out."""
    tracker, meter = new_meter(log_every=10)
    train(meter, device, range(1, 11), loading=50.0)
    assert tracker.series("throughput/duration")[10] == pytest.approx((9 * 50 + 10) / 10)


def test_logged_every_step_the_duration_is_the_step_alone(device):
    tracker, meter = new_meter(log_every=1)
    train(meter, device, range(1, 6), loading=50.0, hooks=7.0)
    assert set(tracker.series("throughput/duration").values()) == {10.0}
    assert set(tracker.series("throughput/loading_time").values()) == {50.0}
    assert tracker.series("throughput/hook_time")[5] == 7.0


def test_an_evaluation_after_a_flush_is_no_part_of_any_step(device):
    tracker, meter = new_meter(log_every=10)
    train(meter, device, range(1, 16))
    with meter.hooks():
        meter.flush()  # 50 s of waiting for the device: no hook's time
        device.now += 1000.0
    train(meter, device, range(16, 21))
    assert tracker.series("throughput/duration") == {10: 10.0, 15: 10.0, 20: 10.0}
    assert tracker.series("throughput/hook_time")[20] == pytest.approx(1000.0 / 5)


def test_throughput_is_what_the_names_say(device):
    tracker, meter = new_meter(log_every=10, start_step=20)
    train(meter, device, range(21, 31))
    row = dict(tracker.rows)[30]
    import jax

    assert row["throughput/duration"] == pytest.approx(10.0)
    assert row["throughput/examples_per_second"] == pytest.approx(0.8)
    assert row["throughput/tokens_per_second"] == pytest.approx(0.8 * SEQ)
    assert row["throughput/total_tokens"] == 30 * BATCH * SEQ
    assert row["throughput/gflops_per_second"] == pytest.approx(0.8 * SEQ * FLOPS.training / 1e9)
    assert row["throughput/total_gflops"] == pytest.approx(30 * BATCH * SEQ * FLOPS.training / 1e9)
    assert row["throughput/mfu"] == pytest.approx(100 * 0.8 * SEQ * FLOPS.training / (1e6 * jax.device_count()))
    assert row["throughput/mfu_causal"] == pytest.approx(row["throughput/mfu"] * 24 / 30)
    assert tracker.summary["throughput/flops_per_token_analytic"] == FLOPS.training
    assert tracker.summary["throughput/flops_per_example_analytic"] == FLOPS.training * SEQ
    assert tracker.summary["throughput/flops_per_example"] == FLOPS.training * SEQ
    assert tracker.summary["throughput/device_kind"] == jax.devices()[0].device_kind
    assert tracker.summary["throughput/theoretical_flops_per_device"] == 1e6
    assert tracker.summary["throughput/theoretical_flops"] == 1e6 * jax.device_count()
    assert tracker.summary["throughput/peak_source"] == "a table"


def test_an_unknown_peak_is_said_and_gives_no_mfu(device, caplog):
    tracker, meter = new_meter(log_every=10, peak=None)
    train(meter, device, range(1, 11))
    assert "throughput/mfu" not in tracker.rows[-1][1]
    assert "throughput/theoretical_flops" not in tracker.summary
    assert [record.getMessage() for record in caplog.records] == [
        "no peak FLOP/s known for cpu: throughput/mfu will not be reported. Pass --peak-tflops to have it."
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_names_its_step_and_its_examples(device, value):
    tracker, meter = new_meter(log_every=10)
    with pytest.raises(NonFiniteLossError, match=rf"train/loss is {value} at step 13.*examples 96 to 103 ") as caught:
        train(meter, device, range(1, 21), losses=lambda step: value if step >= 13 else 1.0)
    assert caught.value.step == 13
    assert (caught.value.first_example, caught.value.last_example) == (96, 103)
    assert [step for step, _ in tracker.rows] == list(range(1, 13))
    assert tracker.summary["run/failed_step"] == 13
    assert "at step 13" in tracker.summary["run/failure"]


@pytest.mark.parametrize("metric", ["train/grad_norm", "grad/norm/total"])
def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_saved(device, metric):
    _, meter = new_meter(log_every=10)
    meter.step(1, {"train/loss": device.dispatch(1.0), metric: np.float32("nan")})
    with pytest.raises(NonFiniteLossError, match=f"{metric} is nan at step 1, expected a finite number"):
        meter.flush()


def test_no_step_is_logged_twice(device):
    tracker, meter = new_meter(log_every=10)
    train(meter, device, range(1, 6))
    meter.flush()
    meter.flush()
    assert [step for step, _ in tracker.rows] == [1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match=r"step 5 after step 5.*counted from 1"):
        train(meter, device, [5])
    _, resumed = new_meter(start_step=20)
    with pytest.raises(ValueError, match="step 20 after step 20"):
        train(resumed, device, [20])


def test_a_step_without_loss_is_refused(device):
    _, meter = new_meter()
    with pytest.raises(ValueError, match=r"no 'train/loss' among \['loss'\]"):
        meter.step(1, {"loss": 1.0})


def test_log_every_is_at_least_one(device):
    with pytest.raises(ValueError, match="log_every=0, expected at least 1"):
        new_meter(log_every=0)


def test_median_and_deciles_are_logged_at_the_last_step(device):
    tracker, meter = new_meter(total_steps=60, log_every=10)
    for step in range(1, 61):
        device.seconds = {10: 99.0}.get(10 * ((step + 9) // 10), 1.0 + (step - 11) // 10)
        train(meter, device, [step])
    of_windows = [tracker.series("throughput/duration")[step] for step in (20, 30, 40, 50, 60)]
    assert of_windows == [pytest.approx(1.0 + i) for i in range(5)]
    summary = tracker.summary
    named = [summary[f"throughput/{which}_duration"] for which in ("p10", "p50", "p90")]
    assert named == [pytest.approx(value) for value in (1.4, 3.0, 4.6)]
    assert summary["throughput/p50_tokens_per_second"] == pytest.approx(BATCH * SEQ / 3)


def test_these_modules_import_neither_jax_nor_levanter():
    code = (
        "import sys; import train.metrics, train.progress, train.summary, train.report;"
        " print([name for name in ('jax', 'levanter', 'numpy') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
