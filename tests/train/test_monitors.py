# SPDX-License-Identifier: Apache-2.0
"""What the meter watches beside the steps: what the devices wait for, spikes, TensorStore's counters, memory."""

import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from grug_model.array_stacked.launch import PRESETS
from tests.train.simulated import new_meter, train
from train.rundir import check_fit
from train.spikes import AT_LEAST, WINDOW, Spikes
from train.stalls import Shares, Stalls
from train.store_metrics import COUNTERS, VARIABLE, store_metrics_every

# What the devices wait for


def bound_by(device, **costs):
    """(shares of data and host in the last window, what was said) of 40 steps of 10 s that cost the host so much."""
    tracker, meter = new_meter(log_every=10)
    said = []
    meter.tell = said.append
    train(meter, device, range(1, 41), **costs)
    row = tracker.rows[-1][1]
    return row["throughput/waiting_for_data"], row["throughput/waiting_for_host"], said


def test_a_loader_that_hides_keeps_no_device_waiting(device):
    """But for the load after each window's end, when no step is in flight: 5 s of 10 steps of 10 s."""
    data, host, said = bound_by(device, loading=5.0)
    assert (data, host, said) == (pytest.approx(100 * 5 / 105), 0.0, [])


def test_a_loader_slower_than_the_steps_is_what_binds(device):
    data, host, said = bound_by(device, loading=15.0)
    assert data == pytest.approx(100 * 150 / 160)  # all of the loading, and then one step is waited for
    assert host == 0.0
    assert len(said) == 1
    assert said[0].startswith(
        "step 30: for 94 % of the time the devices wait for data. Keep the token cache on a local"
    )


def test_python_slower_than_the_steps_is_what_binds(device, monkeypatch):
    dispatch = device.dispatch

    def slowly(value):
        device.now += 15.0
        return dispatch(value)

    monkeypatch.setattr(device, "dispatch", slowly)
    data, host, said = bound_by(device)
    assert data == 0.0
    assert host > 90
    assert len(said) == 1
    assert "the devices wait for the host. Raise --trainer.log-every" in said[0]


def test_evaluating_and_saving_is_no_waiting(device):
    """They have a time of their own, throughput/hook_time."""
    tracker, meter = new_meter(log_every=10)
    for step in range(1, 31):
        train(meter, device, [step])
        with meter.hooks():
            meter.flush()
            device.now += 500.0
    row = dict(tracker.rows)[30]
    assert (row["throughput/waiting_for_data"], row["throughput/waiting_for_host"]) == (0.0, 0.0)
    assert row["throughput/hook_time"] == 500.0


def test_one_bad_window_is_no_complaint_and_a_second_one_after_a_recovery_is():
    stalls = Stalls(lambda: 0.0, lambda: True)
    bad, good = Shares(data=50.0, host=20.0), Shares(data=9.0, host=9.0)
    said = [stalls.complaint(shares) is not None for shares in (bad, good, bad, bad, bad, good, bad, bad)]
    assert said == [False, False, False, True, False, False, False, True]
    assert (bad.verdict, good.verdict, Shares(10.0, 30.0).verdict) == ("data", "device", "host")


def test_the_memory_of_the_process_is_logged(device):
    tracker, meter = new_meter()
    train(meter, device, range(1, 11))
    assert 1e7 < tracker.rows[-1][1]["memory/host_rss_bytes"] < 1e12


# Spikes


def noisy(steps, *, sigma, seed=0):
    """A loss or gradient norm as it goes: falling from 10, then level at 2, under log-normal noise."""
    noise = np.exp(np.random.default_rng(seed).normal(0, sigma, steps))
    return (2 + 8 * np.exp(-np.arange(steps) / 40)) * noise


@pytest.mark.parametrize(("metric", "sigma"), [("train/loss", 0.04), ("train/grad_norm", 0.3)])
def test_noise_is_no_spike(metric, sigma):
    for seed in range(5):
        spikes = Spikes(metric)
        assert not any(spikes.look(value) for value in noisy(1000, sigma=sigma, seed=seed))


def test_a_run_that_warms_up_has_no_spikes():
    """However wild: there is nothing yet to measure it by."""
    spikes = Spikes("train/loss")
    assert not any(spikes.look(value) for value in noisy(AT_LEAST, sigma=2.0))
    assert spikes.look(1e6)


def test_a_spike_is_seen_in_every_step_and_spoken_of_once():
    spikes, values = Spikes("train/grad_norm"), noisy(300, sigma=0.1)
    values[200:204] *= 8
    found = {step: spike for step, value in enumerate(values) if (spike := spikes.look(value))}
    assert list(found) == [200, 201, 202, 203]
    ratio, sentence = found[200]
    assert 6 < ratio < 11
    assert f"train/grad_norm is {values[200]:.4g}, {ratio:.2f} times the median of the last 128 steps" in sentence
    assert [found[step][1] for step in (201, 202, 203)] == ["", "", ""]


def test_a_level_that_stays_is_no_spike_for_ever():
    spikes = Spikes("train/loss")
    found = [bool(spikes.look(value)) for value in [2.0] * 200 + [3.0] * 200]
    assert found[200]
    assert not any(found[200 + WINDOW // 2 + 1 :])


def test_a_steady_loss_needs_a_tenth_more():
    for value, is_spike in ((2.15, False), (2.25, True)):
        spikes = Spikes("train/loss")
        for _ in range(100):
            spikes.look(2.0)
        assert bool(spikes.look(value)) == is_spike


def test_a_spike_is_logged_and_said_with_its_batch_and_training_goes_on(device):
    tracker, meter = new_meter(total_steps=200, log_every=10)
    said = []
    meter.tell = said.append
    train(meter, device, range(1, 201), losses=lambda step: 9.0 if step == 150 else 2.0)
    assert tracker.series("train/loss_spike") == {150: pytest.approx(4.5)}
    (line,) = said
    assert line.startswith("spike at step 150 (examples 1192 to 1199, batch 149 counted from 0): train/loss is 9, 4.50")
    assert tracker.rows[-1][0] == 200


# TensorStore


def test_what_tensorstore_counts_is_logged_every_n_steps(device, monkeypatch, tmp_path):
    import tensorstore

    monkeypatch.setenv(VARIABLE, "4")
    tracker, meter = new_meter(log_every=10)
    train(meter, device, range(1, 6))
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(tmp_path)}}
    store = tensorstore.open(spec, create=True, dtype=tensorstore.int32, shape=[4]).result()
    store.write(7).result()
    assert store.read().result().sum() == 28
    train(meter, device, range(6, 11))
    rows = tracker.series("data/tensorstore/file_bytes_written_delta")
    assert list(rows) == [4, 8]
    assert rows[4] == 0
    assert rows[8] > 4
    totals = tracker.series("data/tensorstore/file_bytes_written_total")
    assert totals[8] - totals[4] == rows[8]
    assert tracker.series("data/tensorstore/cache_chunk_writes_delta")[8] >= 1
    assert "data/tensorstore/cache_miss_count_total" in tracker.rows[7][1]


def test_names_of_store_metrics_are_levanters():
    """Read in its source: importing it takes ten seconds."""
    source = Path(find_spec("levanter").submodule_search_locations[0]) / "callbacks" / "tensorstore_callbacks.py"
    theirs = dict(re.findall(r'_MetricSpec\("(\w+)", "([\w/]+)"\)', source.read_text()))
    assert len(theirs) == 9
    assert theirs.items() <= COUNTERS.items()
    assert VARIABLE in source.read_text()


@pytest.mark.parametrize(("text", "every"), [("100", 100), (" 7 ", 7), ("0", None)])
def test_steps_between_store_metrics(monkeypatch, text, every):
    monkeypatch.setenv(VARIABLE, text)
    assert store_metrics_every() == every


@pytest.mark.parametrize("text", ["often", "-1", "1.5", ""])
def test_steps_between_store_metrics_are_a_number(monkeypatch, text):
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(ValueError, match=rf"{VARIABLE}='{text}' is no number of steps. Expected a whole number"):
        check_fit(PRESETS["laptop"])  # before anything is written


def test_no_store_metrics_unless_they_are_asked_for(device, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    tracker, meter = new_meter()
    train(meter, device, range(1, 11))
    assert not any(name.startswith("data/") for name in tracker.rows[-1][1])
