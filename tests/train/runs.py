# SPDX-License-Identifier: Apache-2.0
"""Metrics files as the loop writes them, without a loop."""

import json

from train.summary import BYTE_UNIGRAM, TOKEN_UNIGRAM, Ending
from train.tracker import METRICS_FILE

ENDING = Ending("uv run python -m train.run --resume runs/tiny", "runs/tiny/checkpoints/step-40", 133.2)


def log_event(step, **metrics):
    return {
        "event": "log",
        "step": step,
        "metrics": {name.replace("__", "/"): value for name, value in metrics.items()},
    }


def summary_event(**metrics):
    return {"event": "summary", "metrics": {name.replace("__", "/"): value for name, value in metrics.items()}}


def write_events(run_dir, events, tail=""):
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / METRICS_FILE).write_text("".join(json.dumps(event) + "\n" for event in events) + tail)
    return run_dir


CONSTANTS = summary_event(
    throughput__flops_per_example=1.6e6,
    throughput__flops_per_token_analytic=1e5,
    throughput__flops_per_token_causal=8e4,
    throughput__flops_per_token_executed=1.1e5,
    throughput__device_kind="cpu",
    throughput__device_count=2,
    throughput__theoretical_flops=2e9,
    throughput__peak_source="measured on this machine",
    compile__seconds=4.2,
)
BASELINES = {"event": "summary", "metrics": {BYTE_UNIGRAM: 4.93, TOKEN_UNIGRAM: 3.31}}


def a_run(run_dir, *, steps=40, speed=lambda step: 100.0):
    """A metrics file as the loop writes it: windows of ten steps, an evaluation every twenty."""
    events = [{"event": "hparams", "hparams": {"model.hidden_dim": 64}}]
    events += [summary_event(run__start_step=0, run__total_steps=steps), CONSTANTS, BASELINES]
    for step in range(1, steps + 1):
        row = log_event(step, train__loss=8.0 - step / 10, optim__learning_rate=3e-4)
        if step % 10 == 0:
            examples = speed(step)
            row["metrics"] |= {
                "throughput/duration": 8 / examples,
                "throughput/examples_per_second": examples,
                "throughput/tokens_per_second": examples * 16,
            }
        events.append(row)
        if step % 20 == 0:
            bits = {"eval/bpb": 3 - step / 50, "eval/a/bpb": 3.0, "eval/a/b/bpb": 2.5, "eval/a/c/bpb": 2.25}
            events.append({"event": "log", "step": step, "metrics": {"eval/loss": 8.1 - step / 10} | bits})
    return write_events(run_dir, events)
