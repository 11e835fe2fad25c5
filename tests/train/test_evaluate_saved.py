# SPDX-License-Identifier: Apache-2.0
"""`python -m train.evaluate` against Levanter's own evaluator, on the same checkpoint and the same held-out text."""

import contextlib
import io
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from grug_kernels.attention import AttentionMask
from tests.train.checkpointed import mesh_of
from tests.train.saved_runs import restored, write_run
from train import evaluate
from train.data import build_validation_sets
from train.evaluate_saved import main
from train.mesh import BATCH_AXES
from train.saved import open_saved

SEQ_LEN, EXAMPLES, BATCH = 32, 12, 8


@pytest.fixture(scope="module")
def run(folder) -> Path:
    return write_run("base", "evaluated", mesh_of(1, 1))


def three_levels(sets: dict) -> list:
    """Tags that are three deep, one that is alone below its parent, and one that is a parent itself."""
    prose, code = sets.values()
    return [(prose, "web/news/daily"), (code, "web/forum"), (prose, "web/forum/old"), (code, "books")]


def levanters_own(run: Path) -> dict[str, float]:
    """Current weights and average by Levanter's callback: with a tokenizer, from the state that resuming restores."""
    import haliax
    from levanter.callbacks.state_adapter import StateCallbackRunner
    from levanter.eval import TaggedEvaluator, cb_tagged_evaluate
    from levanter.tokenizers import load_tokenizer
    from levanter.tracker import NoopTracker, current_tracker

    saved, mesh = open_saved(run), mesh_of(8, 1)
    state = restored(run, "base", saved.config, mesh)

    def loss_fn(model, batch):
        mask = AttentionMask(causal=True, segment_ids=batch.attn_mask.segment_ids[0])
        losses = model.next_token_losses(batch.tokens, batch.loss_weight, mask)
        return losses, batch.loss_weight, jnp.roll(batch.tokens, -1, axis=-1)

    sets = build_validation_sets(saved.data, saved.config.data, SEQ_LEN)
    logged: dict[str, float] = {}

    class Tracker(NoopTracker):
        def log(self, metrics, *, step, commit=None):
            logged.update(metrics)

    mapping = {"batch": BATCH_AXES}
    with jax.set_mesh(mesh), haliax.axis_mapping(mapping), current_tracker(Tracker()):
        evaluator = TaggedEvaluator(
            haliax.Axis("batch", BATCH),
            [(dataset, [tag]) for dataset, tag in three_levels(sets)],
            loss_fn,
            tokenizer=load_tokenizer(str(saved.data.tokenizer_dir)),
            device_mesh=mesh,
            axis_mapping=mapping,
            max_examples_per_dataset=EXAMPLES,
        )
        runner = StateCallbackRunner(
            step_getter=lambda state: state.step + 1,
            model_getter=lambda state: state.params,
            eval_model_getter=lambda state: state.ema_params,
            opt_state_getter=lambda state: state.opt_state,
        )
        runner.add_hook(cb_tagged_evaluate(evaluator), every=1)
        runner.run(state, loss=0.0, step_duration=0.0, force=True)
    return logged


def command(*argv: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([*argv])
        except SystemExit as end:
            return end.code, out.getvalue(), err.getvalue()
    return 0, out.getvalue(), err.getvalue()


def test_current_weights_and_average_have_the_metrics_that_levanter_logs(run, monkeypatch, tmp_path):
    monkeypatch.setattr(
        evaluate, "build_validation_sets", lambda *args: {t: s for s, t in three_levels(build_validation_sets(*args))}
    )
    file = tmp_path / "eval.json"
    asked = ("--weights", "both", "--max-examples", str(EXAMPLES), "--batch-size", str(BATCH), "--json", str(file))
    code, table, said = command("--checkpoint", str(run), *asked)
    assert code == 0, said
    ours, theirs = json.loads(file.read_text())["metrics"], levanters_own(run)
    assert {"eval/web/news/daily/loss", "eval/web/news/micro_loss", "eval/web/forum/macro_bpb"} < theirs.keys()
    assert len(theirs) == 2 * (4 + 2 + 6 + 2 + 6 + 3)  # loss and times, macro, micro; bpb, micro, macro
    times = {f"{prefix}/{name}" for prefix in ("eval", "eval/ema") for name in ("loading_time", "total_time")}
    theirs_as_ours = {
        f"{name}_compat" if name.endswith("bpb") else name: value for name, value in theirs.items() if name not in times
    }
    # The same batches through the same model: only what XLA fuses may differ.
    assert {name: ours[name] for name in theirs_as_ours} == pytest.approx(theirs_as_ours, rel=1e-6)
    exact = {name for name in theirs if name.endswith("bpb")}
    assert ours.keys() == theirs_as_ours.keys() | times | exact
    assert ours["eval/ema/loss"] != ours["eval/loss"]
    for name in exact:
        assert ours[name] == pytest.approx(ours[f"{name}_compat"], rel=0.1)
    assert f"{ours['eval/web/news/daily/loss']:.4f}" in table
    assert "evaluating ema weights: done in" in said
