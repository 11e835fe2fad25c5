# SPDX-License-Identifier: Apache-2.0
"""The rule of the speedruns by numbers made by hand, the ledger that is only added to, and what the entries promise."""

import dataclasses
import json
import re
import subprocess
from pathlib import Path

import pytest

from bench.speedruns import entry, leaderboard, ledger, starter, vs_125m
from bench.speedruns.ledger import Row, places, races, records
from bench.speedruns.tracks import PYTHON_TEXTS
from grug_model.base.launch import GrugBaseLaunchConfig
from grug_model.score.cost import count_parameters
from tests.train.runs import log_event, summary_event, write_events
from train.evaluate import GrugEvalConfig
from train.executor_steps import plan
from train.history import read_history

FOLDER = Path(entry.__file__).parent
# sd 0.1 and n = 4: t = (5 - 4.85) / 0.05 = 3, where t(0.99, 3) = 4.5407 would be needed; p = 0.0288
CLOSE = (4.85 - 0.015**0.5, 4.85, 4.85, 4.85 + 0.015**0.5)
UNDER = (4.7, 4.8, 4.75, 4.75)


def row(name: str = "a", *, losses=UNDER, seconds=40.0, **changes) -> Row:
    seeds = tuple(range(len(losses)))
    made = Row(
        entry=name, track="texts", variant="base", commit=f"c{name}", config_hash="abcd1234", device="2 cores",
        texts="12345678", seeds=seeds, losses=tuple(losses), target=5.0, steps=100, tokens=204_800,
        training_seconds=(seconds,) * len(seeds), wall_seconds=(seconds + 20,) * len(seeds),
        date="2026-11-22T07:00:00+00:00",
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


@pytest.mark.parametrize(
    ("losses", "p"),
    [
        # mean 4.75, sd 0.0408248, t = 0.25 / 0.0204124 = 12.2474; with 3 degrees of freedom
        (UNDER, 0.000586115),
        # 5 - 4.8, sd 0.1, t = 0.2 / (0.1 / sqrt(3)) = 3.4641; half of 1 - t / sqrt(t^2 + 2)
        ((4.9, 4.8, 4.7), 0.0370900),
        ((5.1, 5.2, 5.15), 0.982451),
        ((4.0,), 1.0),
    ],
)
def test_p_is_that_of_a_mean_under_the_target(losses, p):
    assert row(losses=losses).p == pytest.approx(p, rel=1e-4)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({}, None),
        ({"losses": (4.9, 4.8, 4.7)}, "mean loss 4.8000 is not under 5 with p < 0.01: p = 0.037"),
        ({"losses": (5.1, 5.2)}, "is not under 5"),
        ({"losses": (4.0,)}, "one seed says nothing of the spread"),
        ({"commit": "c1+"}, r"no commit has these files \(c1\+\)"),
        ({"commit": "unknown"}, "no commit has these files"),
    ],
)
def test_what_counts(changed, why):
    found = row(**changed).why_not
    assert found is None if why is None else re.match(f".*{why}", found)


def test_a_p_of_exactly_the_limit_does_not_count(monkeypatch):
    monkeypatch.setattr(ledger, "p_below", lambda losses, target: 0.01)
    assert row().why_not is not None


def test_the_fastest_is_first_and_ties_go_to_the_lower_loss_and_then_to_the_older():
    slow, fast, twin = row("slow", seconds=50.0), row("fast"), row("twin")
    lower = row("lower", losses=[loss - 0.1 for loss in UNDER])
    failed = row("failed", losses=(5.1, 5.2), seconds=1.0)
    race = [slow, fast, failed, twin, lower]
    assert [one.entry for one in places(race)] == ["lower", "fast", "twin", "slow"]
    assert [one.entry for one in records(race)] == ["slow", "fast", "lower"]


def test_only_what_is_comparable_races():
    others = [row("d", device="4 cores"), row("t", texts="87654321"), row("g", target=4.9), row("k", track="web")]
    assert [[one.entry for one in race] for race in races([row("a"), *others, row("b")])] == [
        ["a", "b"],
        *[[other.entry] for other in others],
    ]


@pytest.fixture
def own_ledger(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(ledger, "PAGE", tmp_path / "speedruns.md")
    return tmp_path / "results.json"


def test_rows_are_added_and_old_ones_stay_as_they_are(own_ledger):
    ledger.add(row("a"))
    before = json.loads(own_ledger.read_text())
    ledger.add(row("b", seconds=30.0))
    after = json.loads(own_ledger.read_text())
    assert after[:1] == before
    assert ledger.read() == [row("a"), row("b", seconds=30.0)]


def test_a_row_is_not_measured_again_until_it_is_fast(own_ledger):
    ledger.add(row("a"))
    with pytest.raises(ValueError, match=r"results.json: row 1 has these seeds of a at commit ca already"):
        ledger.add(row("a", seconds=1.0, date="2026-11-23"))
    assert ledger.read() == [row("a")]


def test_a_ledger_that_was_tampered_with_is_said_to_be(own_ledger):
    values = dataclasses.asdict(row())
    own_ledger.write_text(json.dumps([values, values | {"speed": 3}]))
    with pytest.raises(ValueError, match=r"row 2 is none: .*speed.*added by --submit"):
        ledger.read()
    own_ledger.write_text(json.dumps([values | {"losses": [4.0]}]))
    with pytest.raises(ValueError, match="row 1 has not one loss and one time for each of its seeds"):
        ledger.read()


def test_the_page_lists_what_counts_and_what_does_not_and_why(own_ledger):
    for one in (
        row("slow", seconds=50.0),
        row("fast", note="a | bar"),
        row("close", losses=CLOSE),
        row("x", device="8 cores"),
    ):
        ledger.add(one)
    leaderboard.write()
    lines = ledger.PAGE.read_text().splitlines()
    table = [line for line in lines if line.startswith("| ") and "---" not in line]
    assert [line.split(" | ")[1] for line in table if "record" in line or line.startswith("| 2")] == [
        *("fast (base)", "slow (base)", "x (base)")
    ]
    [close] = [line for line in table if "close (base)" in line]
    assert "p = 0.029" in close
    assert "a / bar" in ledger.PAGE.read_text()
    assert [line for line in lines if line.startswith("## ")] == [
        "## texts: loss 5, on 2 cores, texts 12345678",
        "## texts: loss 5, on 8 cores, texts 12345678",
    ]


def test_the_page_is_that_of_the_ledger():
    """Where this fails: python -m bench.speedruns"""
    assert ledger.PAGE.read_text() == leaderboard.page(ledger.read())


def git(folder: Path, *arguments: str) -> str:
    names = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.check_output(["git", *names, *arguments], cwd=folder, text=True)


def test_a_dirty_tree_is_refused_but_for_the_ledger_itself(tmp_path):
    with pytest.raises(ValueError, match="is no git repository"):
        ledger.commit_of_clean_tree(tmp_path)
    results = tmp_path / "bench" / "speedruns" / "results.json"
    results.parent.mkdir(parents=True)
    results.write_text("[]")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "first")
    head = git(tmp_path, "rev-parse", "--short", "HEAD").strip()
    results.write_text("[1]")
    assert ledger.commit_of_clean_tree(tmp_path) == head
    (tmp_path / "model.py").write_text("")
    with pytest.raises(ValueError, match=r"these files differ from .*\n\?\? model.py\nCommit them first"):
        ledger.commit_of_clean_tree(tmp_path)


def history(folder, start: int = 0):
    events = [summary_event(run__start_step=start, run__total_steps=25)]
    durations = {10: 0.5, 20: 0.4, 25: 0.2}
    events += [log_event(step, throughput__duration=value) for step, value in durations.items()]
    return read_history(write_events(folder, events))


def test_the_time_of_a_run_is_that_of_its_steps(tmp_path):
    assert entry.training_seconds(history(tmp_path), tmp_path) == pytest.approx(10 * 0.5 + 10 * 0.4 + 5 * 0.2)


def test_a_run_that_was_stopped_has_no_time(tmp_path):
    with pytest.raises(ValueError, match="went on after step 5: its time is not that of one run"):
        entry.training_seconds(history(tmp_path, start=5), tmp_path)


def test_a_track_lets_nobody_change_the_texts_or_the_evaluation():
    PYTHON_TEXTS.check(starter.CONFIG)
    elsewhere = dataclasses.replace(starter.CONFIG.data, cache_dir="elsewhere")
    PYTHON_TEXTS.check(dataclasses.replace(starter.CONFIG, data=elsewhere))
    easier = dataclasses.replace(starter.CONFIG.data, vocab_size=256)
    with pytest.raises(ValueError, match=r"data.vocab_size=256 in place of 4096.*Change it back"):
        PYTHON_TEXTS.check(dataclasses.replace(starter.CONFIG, data=easier))
    with pytest.raises(ValueError, match=r"eval.max_examples_per_dataset=1 in place of 64"):
        PYTHON_TEXTS.check(dataclasses.replace(starter.CONFIG, eval=GrugEvalConfig(max_examples_per_dataset=1)))


def test_entries_use_the_run_configuration_and_nothing_of_old():
    """No wrapper of the model, no configuration or default runner of another framework."""
    assert type(starter.CONFIG) is GrugBaseLaunchConfig
    for file in FOLDER.glob("*.py"):
        text = file.read_text()
        for name in ("grug_wrapper", "GrugWrapper", "LmConfig", "default_speedrun", "default_train", "levanter"):
            assert name not in text, f"{file}: {name}"
        if file.stem not in ("entry", "tracks", "ledger", "leaderboard"):
            assert "not canonical" in text or file.stem == "__main__", file


def test_the_head_to_head_is_between_models_of_125m_that_see_the_same():
    configs = vs_125m.ENTRY.configs
    counts = {variant: count_parameters(variant, config) for variant, config in configs.items()}
    assert counts["base"] == pytest.approx(125e6, rel=0.02)
    assert counts["attn_sink"] - counts["base"] == 12 * 12  # a sink for each head
    parts = {
        variant: (config.data, config.optimizer, config.trainer, config.eval) for variant, config in configs.items()
    }
    assert parts["base"] == parts["attn_sink"]


@pytest.mark.parametrize(
    ("race", "argv", "said"),
    [
        (vs_125m.ENTRY, [], "FLOPs a seed are not for a CPU. --plan says what it takes on a TPU"),
        (vs_125m.ENTRY, ["--executor"], "FLOPs a seed are not for a CPU"),
        (starter.ENTRY, ["--dry-run"], "--dry-run: it is for --executor; without that, the seeds would be trained"),
        (starter.ENTRY, ["--seeds", "0"], "--seeds 0: choose 1 or more"),
        (vs_125m.ENTRY, ["--plan", "--tpu", "v9"], "'v9' is no TPU that can be compiled for"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_run(race, argv, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        entry.main(race, argv)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_without_a_track_nothing_is_submitted(monkeypatch, capsys):
    monkeypatch.setattr(ledger, "commit_of_clean_tree", lambda: "abc1234")
    with pytest.raises(SystemExit):
        entry.main(vs_125m.ENTRY, ["--submit"])
    assert "has no track, as nobody has set a target yet" in capsys.readouterr().err


def test_its_runs_are_steps_of_the_executor_one_for_each_variant_and_seed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    planned = plan(entry.steps(vs_125m.ENTRY, range(2)), Path("runs"))
    names = [one.step.name.removeprefix("grugformer-vs-hackable-125m-") for one in planned]
    assert names == ["base-seed0", "attn_sink-seed0", "attn_sink-seed1", "base-seed1"]
    assert [one.config.trainer.seed for one in planned] == [0, 0, 1, 1]
    assert len({one.path.name.rpartition("-")[2] for one in planned}) == 4
    assert planned[0].config.output_path == str(planned[0].path)
    with pytest.raises(SystemExit) as ended:
        entry.main(starter.ENTRY, ["--executor", "--dry-run", "--seeds", "1"])
    assert ended.value.code == 0
    assert "grugformer-starter-base-seed0: would run (never begun)" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        entry.main(starter.ENTRY, ["--executor", "--submit"])
    assert ended.value.code == 2
    assert not any(tmp_path.iterdir())
