# SPDX-License-Identifier: Apache-2.0
"""The main job from corpus to report, as `python -m train.run` does it, at a size that tests can afford."""

import json
import math
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from tests.train.tiny import FLAGS, STEPS, Ended, arrays_of, run, run_tiny, saved_steps
from train.evaluate_saved import main as evaluate
from train.history import History, read_history
from train.sample import sample
from train.saved import open_saved

BATCH, SEQ_LEN = FLAGS["--trainer.batch-size"], FLAGS["--trainer.seq-len"]

EVERY_STEP = {
    *("train/loss", "train/cross_entropy", "train/z_loss", "train/grad_norm", "train/update_norm"),
    *("global_step", "run_progress", "optim/learning_rate"),
}
EVERY_WINDOW = {
    *("throughput/duration", "throughput/examples_per_second", "throughput/tokens_per_second"),
    *("throughput/total_tokens", "throughput/gflops_per_second", "throughput/total_gflops", "throughput/mfu"),
    "throughput/mfu_causal",
    *("throughput/hook_time", "throughput/loading_time"),
    *("mixture/stage", "mixture/weight/prose", "mixture/weight/code"),
}
EVERY_EVALUATION = {
    f"{prefix}/{name}"
    for prefix in ("eval", "eval/ema")
    for name in (
        *("loss", "macro_loss", "bpb", "macro_bpb", "loading_time", "total_time"),
        *("python/micro_loss", "python/macro_loss", "python/bpb", "python/macro_bpb"),
        *("python/prose/loss", "python/prose/bpb", "python/code/loss", "python/code/bpb"),
        *("bpb_compat", "macro_bpb_compat", "python/prose/bpb_compat", "python/macro_bpb_compat"),
    )
}
WHOLE_RUN = {
    "throughput/flops_per_token_analytic",
    "throughput/flops_per_example_analytic",
    "throughput/flops_per_example",
    "throughput/flops_per_token_causal",
    "throughput/flops_per_token_executed",
    *(f"throughput/flops_per_token/{name}" for name in ("projections", "attention", "attention_causal", "mlp", "head")),
    "throughput/device_kind",
    "throughput/theoretical_flops_per_device",
    "throughput/theoretical_flops",
    "kernel/attention/implementation",
    "kernel/cross_entropy/implementation",
    "compile/seconds",
    "memory/arguments_bytes",
    "memory/temporaries_bytes",
    "baseline/byte_unigram_bpb",
}


class Finished(NamedTuple):
    ended: Ended
    path: Path

    @property
    def history(self) -> History:
        return read_history(self.path)


@pytest.fixture(scope="module")
def finished(folder) -> Finished:
    """A run from the first step to the report, with an average of its weights."""
    return Finished(run_tiny("whole", **{"--trainer.ema-beta": 0.9}), folder / "runs" / "whole")


def copied(finished: Finished, name: str) -> Path:
    return Path(shutil.copytree(finished.path, finished.path.with_name(name)))


def test_it_ends_with_a_summary_samples_and_a_report(finished):
    code, text = finished.ended
    assert code == 0, text
    for part in ("bits per byte", "MFU", "kernels", "── samples", "uv run python -m train.run --resume runs/whole"):
        assert part in text, text
    assert {"config.json", "metrics.jsonl", "summary.json", "report.html"} <= {p.name for p in finished.path.iterdir()}
    assert saved_steps(finished.path) == [3, 6]
    assert "<svg" in (finished.path / "report.html").read_text()


def test_every_metric_is_there_under_its_name(finished):
    rows = finished.history.rows
    assert sorted(rows) == list(range(1, STEPS + 1))
    for step, row in rows.items():
        assert row.keys() >= EVERY_STEP
        assert row.keys() >= EVERY_WINDOW or step % 2
        assert row.keys() >= EVERY_EVALUATION or step % 3
    assert finished.history.summary.keys() >= WHOLE_RUN


def test_the_numbers_are_those_of_the_run(finished):
    rows, summary = finished.history.rows, finished.history.summary
    assert [rows[step]["global_step"] for step in rows] == list(range(1, STEPS + 1))
    assert rows[3]["run_progress"] == 0.5
    assert rows[4]["throughput/total_tokens"] == 4 * BATCH * SEQ_LEN
    # warmup over two steps to the peak of the preset, as the optimizer used it
    assert [rows[step]["optim/learning_rate"] for step in (1, 2, 3)] == pytest.approx([1e-3, 2e-3, 3e-3])
    assert rows[2]["mixture/weight/prose"] == pytest.approx(0.125)
    assert rows[6]["mixture/stage"] == 0
    assert all(math.isfinite(value) for row in rows.values() for value in row.values())
    assert rows[1]["train/loss"] == pytest.approx(math.log(1024), rel=0.1)  # an untrained model guesses
    assert rows[6]["eval/loss"] < rows[3]["eval/loss"]
    assert rows[6]["eval/ema/loss"] > rows[6]["eval/loss"]  # the average is behind
    mean = (rows[6]["eval/python/prose/bpb"] + rows[6]["eval/python/code/bpb"]) / 2
    assert rows[6]["eval/macro_bpb"] == pytest.approx(mean)
    assert summary["kernel/attention/implementation"] == summary["kernel/cross_entropy/implementation"] == "xla"
    assert summary["throughput/theoretical_flops"] == 8 * summary["throughput/theoretical_flops_per_device"]


def test_the_summary_file_says_what_was_printed(finished):
    summary = json.loads((finished.path / "summary.json").read_text())
    assert summary["steps"] == summary["total_steps"] == STEPS
    assert summary["failure"] is None
    assert summary["checkpoint"].endswith("runs/whole/checkpoints/step-6")
    assert summary["resume_command"] in finished.ended.text
    assert len(summary["samples"]) == 3
    assert f"{summary['loss']['last']['value']:.3f} at step 6" in finished.ended.text


def test_a_checkpoint_says_whose_it_is(finished):
    metadata = json.loads((finished.path / "checkpoints/step-3/metadata.json").read_text())
    assert (metadata["run_id"], metadata["variant"], metadata["data_offset"]) == ("whole", "array_stacked", 3 * BATCH)
    assert any(name.startswith("ema_params/") for name in metadata["specs"])


def test_evaluating_its_checkpoint_gives_what_it_logged(finished, tmp_path):
    evaluate(
        ["--checkpoint", "runs/whole/checkpoints/step-3", "--weights", "both", "--json", str(tmp_path / "eval.json")]
    )
    found, row = json.loads((tmp_path / "eval.json").read_text()), finished.history.rows[3]
    logged = {name: value for name, value in row.items() if name.startswith("eval/") and not name.endswith("_time")}
    assert {name: found["metrics"][name] for name in logged} == pytest.approx(logged, rel=1e-6)
    assert (found["step"], found["tokens"]) == (3, dict.fromkeys(("python/prose", "python/code"), 8 * (SEQ_LEN - 1)))


def test_sampling_from_its_checkpoint_gives_the_lines_of_the_summary(finished):
    saved = open_saved("runs/whole")
    with jax.set_mesh(saved.mesh):
        lines = sample(saved.params, saved.data.tokenizer)
    assert lines == json.loads((finished.path / "summary.json").read_text())["samples"]


def test_starting_a_finished_run_again_says_so_and_does_nothing(finished):
    before = (finished.path / "metrics.jsonl").read_bytes()
    code, text = run_tiny("whole", **{"--trainer.ema-beta": 0.9})
    assert code == 0
    assert "whole finished at step 6: nothing to train. Its summary is runs/whole/summary.json" in text
    assert (finished.path / "metrics.jsonl").read_bytes() == before


def test_a_run_killed_before_its_summary_gets_one_when_started_again(finished):
    path = copied(finished, "unsummarised")
    (path / "summary.json").unlink()
    (path / "report.html").unlink()
    code, text = run("--resume", "runs/unsummarised")
    assert code == 0, text
    before, after = (json.loads((where / "summary.json").read_text()) for where in (finished.path, path))
    assert {name: after[name] for name in ("steps", "loss", "bits_per_byte", "kernels")} == {
        name: before[name] for name in ("steps", "loss", "bits_per_byte", "kernels")
    }
    assert (path / "report.html").is_file()
    assert saved_steps(path) == [3, 6]


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_the_last_good_checkpoint(finished):
    """A learning rate at which the first update overflows; a checkpoint is due after every step."""
    path = copied(finished, "exploded")
    absurd = {"--optimizer.learning-rate": 1e30, "--steps": 12, "--checkpoint.every": 1}
    code, text = run("--resume", "runs/exploded", *(str(part) for pair in absurd.items() for part in pair))
    assert code == 3, text
    assert "train/update_norm is inf at step 7" in text
    assert f"holds examples {6 * BATCH} to {7 * BATCH - 1} of the training data" in text
    assert "last good checkpoint: runs/exploded/checkpoints/step-6" in text
    assert "warning: whole goes on with optimizer.learning_rate = 1e+30; it was 0.003 when the run began." in text
    assert saved_steps(path) == [3, 6]
    left = arrays_of(path / "checkpoints" / "step-6")
    assert left == arrays_of(finished.path / "checkpoints" / "step-6")
    assert all(np.isfinite(np.frombuffer(left[name], np.float32)).all() for name in left if name.startswith("params/"))
    assert "is inf at step 7" in (path / "report.html").read_text()
    assert read_history(path).summary["run/failed_step"] == 7
