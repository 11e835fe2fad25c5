# SPDX-License-Identifier: Apache-2.0
"""A device, a clock and a tracker that are none, for the meter to measure."""

from types import SimpleNamespace

import numpy as np

from grug_kernels.mfu import TokenFlops
from train.metrics import Meter

PEAK = SimpleNamespace(flops_per_second=1e6, source="a table", is_measured=False)
BATCH, SEQ = 8, 16
FLOPS = TokenFlops(projections=10, attention=6, softmax=2, attention_causal=2, mlp=8, head=4, recompute=5)


class Rows:
    """Stands in for a RunTracker."""

    def __init__(self):
        self.rows, self.summary = [], {}

    def log(self, row, *, step):
        self.rows.append((step, dict(row)))

    def log_summary(self, values):
        self.summary |= values

    def series(self, name):
        return {step: row[name] for step, row in self.rows if name in row}


class Device:
    """Runs one step after the other, `seconds` each, while the host goes on; `now` is the host's clock."""

    def __init__(self, seconds):
        self.seconds, self.now, self.free_at, self.fetched = seconds, 0.0, 0.0, 0

    def clock(self):
        return self.now

    def dispatch(self, value):
        self.free_at = max(self.now, self.free_at) + self.seconds
        return OnDevice(self, self.free_at, value)


class OnDevice:
    """A scalar that is not there yet: looking at it takes the clock to the moment when it is."""

    def __init__(self, device, ready_at, value):
        self.device, self.ready_at, self.value = device, ready_at, value

    def is_ready(self):
        return self.device.now >= self.ready_at

    def __array__(self, dtype=None, copy=None):
        self.device.fetched += 1
        self.device.now = max(self.device.now, self.ready_at)
        return np.asarray(self.value, dtype)


def new_meter(**changes):
    given = {"total_steps": 40, "batch_size": BATCH, "seq_len": SEQ, "flops": FLOPS, "peak": PEAK} | changes
    tracker = Rows()
    return tracker, Meter(tracker, **given)


def train(meter, device, steps, *, loading=0.0, hooks=0.0, losses=lambda step: 2.0):
    for step in steps:
        with meter.loading():
            device.now += loading
        meter.step(step, {"train/loss": device.dispatch(losses(step)), "optim/learning_rate": np.float32(0.5)})
        with meter.hooks():
            device.now += hooks
