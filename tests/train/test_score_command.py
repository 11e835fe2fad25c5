# SPDX-License-Identifier: Apache-2.0
"""`python -m grug_model.score` and a speedrun's entry from the command line to the page, at a size tests can afford."""

import contextlib
import importlib
import io
import json
import subprocess
from pathlib import Path

import pytest

from bench.speedruns import entry, ledger
from bench.speedruns.tracks import Track
from bench.tpu.topology import LIBTPU_IS_MISSING, has_libtpu
from grug_model.score import contract, cost, last_scores, main, runs
from tests.bench.plan_cases import FLAGS as PLAN_FLAGS
from tests.train.runs import summary_event, write_events
from tests.train.tiny import FLAGS, Ended
from train.data import DataConfig
from train.history import read_history
from train.run import Choose, choose, parse

pytestmark = pytest.mark.usefixtures("folder")
STEPS = 4
LAYERS = 1
ONCE = {"--eval.every": 100, "--checkpoint.every": 100, "--model.num-layers": LAYERS}  # at the end alone
TINY = [str(part) for name, value in (FLAGS | ONCE).items() if name != "--steps" for part in (name, value)]
SMALL = ["--seeds", "2", "--steps", str(STEPS), "--tpu", "none"]


def score(*argv: str) -> Ended:
    """`python -m grug_model.score argv...` in this process."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said), pytest.raises(SystemExit) as ended:
        main(list(argv))
    return Ended(ended.value.code, said.getvalue())


@pytest.fixture(scope="module", autouse=True)
def no_samples():
    """Which take longer to compile than to draw, and which no score has."""
    with pytest.MonkeyPatch.context() as patch:
        for variant in ("base", "attn_sink"):
            patch.setattr(f"grug_model.{variant}.train.sample", lambda *_: [])
        yield


@pytest.fixture(scope="module")
def scored(folder, no_samples) -> Ended:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contract, "TESTS", Path("nowhere/test_contracts.py"))
        return score("base", "attn_sink", *SMALL, "--", *TINY)


def the_score() -> dict:
    [file] = Path("runs/scores").glob("*-base-attn_sink.json")
    return json.loads(file.read_text())


def test_it_trains_each_variant_with_each_seed_and_says_what_came_of_it(scored):
    assert scored.code == 0, scored.text
    found = the_score()
    assert found["seeds"] == [0, 1]
    for variant in ("base", "attn_sink"):
        for run in found["rows"][variant]["runs"]:
            history = read_history(run["path"])
            assert run["loss"] == history.rows[STEPS]["eval/loss"]
            assert run["bits_per_byte"] == history.rows[STEPS]["eval/macro_bpb"]
            assert run["flops_per_token"] == history.summary["throughput/flops_per_token_analytic"]
    losses = {variant: [run["loss"] for run in row["runs"]] for variant, row in found["rows"].items()}
    assert len({*losses["base"], *losses["attn_sink"]}) == 4
    apart = [after - before for before, after in zip(losses["base"], losses["attn_sink"], strict=True)]
    assert found["differences"]["attn_sink"]["mean"] == pytest.approx(sum(apart) / 2)
    assert (
        found["rows"]["attn_sink"]["parameters"] - found["rows"]["base"]["parameters"]
        == LAYERS * FLAGS["--model.num-heads"]
    )
    assert found["verdicts"]["attn_sink"] in " ".join(scored.text.split())
    assert last_scores()["attn_sink"]["loss"] == pytest.approx(sum(losses["attn_sink"]) / 2)
    assert "contract tests not run: there is no test_contracts.py here" in scored.text
    assert "cost on a TPU not measured: left out with --tpu none" in scored.text
    assert Path(found["page"]).read_text().count("<svg") == 3


def test_seeds_differ_and_variants_see_the_same_batches(scored):
    configs = {}
    for variant, row in the_score()["rows"].items():
        for run in row["runs"]:
            config = json.loads((Path(run["path"]) / "config.json").read_text())["config"]
            configs[variant, config["trainer"]["seed"]] = config
    assert sorted(configs) == [("attn_sink", 0), ("attn_sink", 1), ("base", 0), ("base", 1)]
    for seed in (0, 1):
        ours, theirs = configs["base", seed], configs["attn_sink", seed]
        assert (ours["trainer"], ours["data"]) == (theirs["trainer"], theirs["data"])


def test_what_is_finished_is_not_done_again(scored, monkeypatch):
    """One of the four runs is without its end; it alone is started again."""
    left = Path(the_score()["rows"]["base"]["runs"][1]["path"])
    (left / "summary.json").unlink()
    launch = importlib.import_module("grug_model.base.launch")
    started, run = [], launch.run
    monkeypatch.setattr(launch, "run", lambda config: (started.append(config.output_path), run(config)))
    monkeypatch.setattr("grug_model.attn_sink.launch.run", None)
    before = the_score()
    ended = score("base", "attn_sink", *SMALL, "--no-tests", "--", *TINY)
    assert ended.code == 0, ended.text
    assert started == [str(left)]
    assert ended.text.count(", finished before") == 3
    assert "note: contract tests not run: left out with --no-tests" in ended.text
    after = json.loads(max(Path("runs/scores").glob("*.json")).read_text())
    assert after["differences"] == before["differences"]


def configuration(variant: str = "array_stacked", **changed: object):
    argv = ["--variant", variant, *TINY, *(str(part) for pair in changed.items() for part in pair)]
    chosen, start = choose(argv, Choose())
    return parse(argv, chosen, start, prog="", description="")[1]


def test_a_variant_that_diverges_has_failed_and_a_full_disk_is_not_its_fault(monkeypatch):
    config = runs.named("array_stacked", configuration(), 3)

    def diverge(config):
        write_events(Path(config.output_path), [summary_event(run__failure="train/loss is nan at step 2")])
        raise SystemExit(3)

    monkeypatch.setattr("grug_model.array_stacked.launch.run", diverge)
    run = runs.train("array_stacked", config)
    assert (run.seed, run.loss, run.failure) == (3, None, "train/loss is nan at step 2")
    assert "seed3" in run.path

    def no_space(config):
        raise SystemExit(4)

    monkeypatch.setattr("grug_model.array_stacked.launch.run", no_space)
    with pytest.raises(SystemExit):
        runs.train("array_stacked", config)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["base"], ["name a baseline and what is held against it"]),
        (["base", "base"], ["each once"]),
        (["base", "no_such"], ["there is no grug_model/no_such/launch.py", "array_stacked, attn_sink, base"]),
        (["base", "attn_sink", "--seeds", "1"], ["--seeds 1", "Choose 2 or more"]),
        (["base", "attn_sink", "--preset", "900b"], ["--preset 900b: base has no such preset"]),
        (["base", "attn_sink", "--tpu-preset", "900b"], ["--preset 900b: base has no such preset"]),
        (["base", "attn_sink", "--tpu", "v9"], ["'v9' is no TPU that can be compiled for. Chips are v4, v5e, v5p"]),
        (["base", "attn_sink", "--steps", "0"], ["steps=0; it is at least 1"]),
        (["base", "attn_sink", "--steps", "20"], ["warmup_steps=20 is not below steps=20"]),
        (["base", "attn_sink", "--", "--trainer.seed", "3"], ["-- --trainer.seed: this is for the score to set"]),
        (["base", "attn_sink", "--", "--run_id=x"], ["-- --run_id=x: this is for the score to set"]),
        (["base", "attn_sink", "--", "--trainer.seq-len", "512"], ["seq_len=512 is longer than model.max_seq_len=256"]),
        (["base", "attn_sink", "--", "--no-such-flag", "1"], ["no-such-flag"]),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_run(argv, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = score(*argv)
    assert ended.code == 2, ended.text
    assert "Traceback" not in ended.text
    for part in parts:
        assert part in " ".join(ended.text.split()), ended.text
    assert not any(tmp_path.iterdir())


def test_without_libtpu_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("bench.tpu.topology.has_libtpu", lambda: False)
    said = io.StringIO()

    def reached(configs, seeds):
        raise KeyboardInterrupt

    monkeypatch.setattr("grug_model.score.command._train", reached)
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit, match="130"):
        main(["base", "attn_sink", "--no-tests"])
    assert "base is not compiled for a TPU: libtpu" in said.getvalue()
    assert "uv sync --extra tpu" in said.getvalue()


def planner(monkeypatch, plan: dict | None) -> list[list[str]]:
    """train.plan as it would be if it had found `plan`, or had understood nothing; and the commands it was given."""
    given = []

    def run(command, **_):
        given.append(command)
        if plan is not None:
            Path(command[command.index("--json") + 1]).write_text(json.dumps(plan))
        return subprocess.CompletedProcess(command, 2 if plan is None else 0)

    monkeypatch.setattr(cost.subprocess, "run", run)
    return given


PLAN = {
    "hbm/reserved_bytes": 3000,
    "hbm/temporaries_bytes": 1000,
    "seconds": 0.25,
    "compile_seconds": 40.0,
    "compile_cpu_seconds": 61.0,
}


def test_what_was_compiled_is_kept_until_something_changes(monkeypatch):
    config, flags = configuration(), ["--trainer.seq-len", "32"]
    given = planner(monkeypatch, PLAN)
    found = cost.measure("array_stacked", "laptop", config, "v5p:2x2x1", flags)
    expected = ["--variant", "array_stacked", "--preset", "laptop", "--tpu", "v5p:2x2x1", *flags, "--json"]
    assert given[0][1:-1] == ["-m", "train.plan", *expected]
    d, f, v = 16, 32, 1024
    assert found.parameters == LAYERS * (2 * d * 16 + 2 * d * 8 + 3 * d * f + 2 * d) + 2 * v * d + d
    assert (found.hbm_bytes, found.temporaries_bytes, found.step_seconds) == (3000, 1000, 0.25)
    assert (found.compile_seconds, found.compile_cpu_seconds) == (40, 61)
    assert cost.measure("array_stacked", "laptop", config, "v5p:2x2x1", flags) == found
    assert len(given) == 1
    planner(monkeypatch, {"unsupported": "too large", "refused_at": "compile", "error": "E"})
    assert cost.measure("array_stacked", "laptop", config, "v6e:2x2").refused == "compile raised E: too large"


def test_what_train_plan_does_not_understand_is_an_error(monkeypatch):
    planner(monkeypatch, None)
    with pytest.raises(ValueError, match=r"ended with exit code 2; what it said stands above.*--tpu none"):
        cost.measure("array_stacked", "laptop", configuration(), "v5e:2x2")


@pytest.mark.long
@pytest.mark.skipif(not has_libtpu(), reason=LIBTPU_IS_MISSING)
def test_a_step_is_compiled():
    flags = ["--trainer.batch-size" if flag == "--batch" else flag for flag in PLAN_FLAGS[1:]]
    argv = ["--variant", "array_stacked", "--preset", "130m", *flags]
    chosen, start = choose(argv, Choose())
    config = parse(argv, chosen, start, prog="", description="")[1]
    found = cost.measure("array_stacked", "130m", config, "v5p:2x2x1", flags)
    assert found.refused is None
    assert found.step_seconds > 0
    assert found.hbm_bytes > found.temporaries_bytes > 0
    assert found.compile_cpu_seconds > 0


def test_a_speedrun_from_its_seeds_to_the_page(tmp_path, monkeypatch):
    track = Track("tiny", target=7.5, data=DataConfig(vocab_size=1024), eval_examples=8)
    race = entry.Entry("tiny-run", {"base": configuration("base", **{"--steps": STEPS})}, track, on_laptop=True)
    page = tmp_path / "speedruns.md"
    monkeypatch.setattr(ledger, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(ledger, "PAGE", page)
    monkeypatch.setattr(ledger, "commit_of_clean_tree", lambda: "abc1234")
    entry.main(race, ["--seeds", "2", "--submit", "--note", "of a test"])
    [row] = ledger.read()
    assert (row.entry, row.variant, row.commit, row.seeds, row.note) == (
        "tiny-run",
        "base",
        "abc1234",
        (0, 1),
        "of a test",
    )
    assert row.tokens == STEPS * 8 * 32
    for seed, (loss, seconds, wall) in enumerate(zip(row.losses, row.training_seconds, row.wall_seconds, strict=True)):
        [path] = Path("runs").glob(f"tiny-run-base-*-seed{seed}")
        assert loss == read_history(path).rows[STEPS]["eval/loss"]
        assert 0 < seconds < wall
    assert len(set(row.losses)) == 2
    assert "tiny-run (base)" in page.read_text()
    with pytest.raises(SystemExit) as again:
        entry.main(race, ["--seeds", "2", "--submit"])
    assert again.value.code == 2
    assert len(ledger.read()) == 1
