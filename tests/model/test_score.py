# SPDX-License-Identifier: Apache-2.0
"""Statistics, verdicts, contract tests, page and ledger of a score; tests/train/test_score_command.py has the rest."""

import dataclasses
import json
import logging
import re

import pytest
from scipy import stats as scipy

from grug_model.base.launch import PRESETS
from grug_model.score import contract, last_scores, runs
from grug_model.score.card import plus_minus
from grug_model.score.contract import Contract, contracts
from grug_model.score.ledger import keep
from grug_model.score.page import card_page
from grug_model.score.runs import in_turn, sources_digest
from grug_model.score.stats import difference, mean, p_below
from grug_model.score.text import card_text
from tests.model.score_cases import COST, MIB, card, row
from tests.train.runs import a_run

BASE = [4.0, 4.2, 4.1]
WORSE = [4.1, 4.4, 4.4]  # by 0.1, 0.2, 0.3


def test_the_mean_of_three_by_hand():
    """sd 1, t(0.975, 2) = 4.302653: 4.302653 / sqrt(3)."""
    found = mean([1.0, 2.0, 3.0])
    assert found.value == 2
    assert found.half_width == pytest.approx(2.484138, rel=1e-6)


def test_a_difference_by_hand():
    """0.1, 0.2, 0.3: t = 0.2 / (0.1 / sqrt(3)) = 3.4641, and with two degrees of freedom p = 1 - t / sqrt(t^2 + 2)."""
    found = difference(BASE, WORSE)
    assert (found.mean, found.seeds) == (pytest.approx(0.2), 3)
    assert found.half_width == pytest.approx(0.2484138, rel=1e-6)
    assert found.p == pytest.approx(0.0741799, rel=1e-5)
    assert found.more_seeds == 1  # of four: t(0.975, 3) = 3.182446, times 0.1 / 2, is 0.159
    assert not found.is_shown


@pytest.mark.parametrize("comparisons", [1, 2, 5])
def test_a_difference_is_scipys_paired_test(comparisons):
    base, other = [4.13, 4.02, 4.31, 4.2, 4.07], [4.11, 3.9, 4.22, 4.25, 3.99]
    found, theirs = difference(base, other, comparisons=comparisons), scipy.ttest_rel(other, base)
    interval = theirs.confidence_interval(1 - 0.05 / comparisons)
    assert found.p == pytest.approx(min(1.0, comparisons * theirs.pvalue))
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx(
        (interval.low, interval.high)
    )


def test_the_seeds_that_are_missing_would_do_and_fewer_would_not():
    base, other = [0.0] * 4, [0.3, -0.1, 0.2, 0.0]
    found = difference(base, other)
    assert found.more_seeds > 1
    spread, count = scipy.tstd(other), 4 + found.more_seeds

    def half(n):
        return scipy.t.ppf(0.975, n - 1) * spread / n**0.5

    assert half(count) < found.mean <= half(count - 1)


@pytest.mark.parametrize(
    ("other", "p", "shown"), [(BASE, 1.0, False), ([5.0, 5.0, 5.0], 0.0, True), ([4.0, 4.0, 4.0], 1.0, False)]
)
def test_without_spread_there_is_nothing_to_divide_by(other, p, shown):
    found = difference(BASE if other is BASE else [4.0] * 3, other)
    assert (found.p, found.half_width, found.is_shown) == (p, 0, shown)


def test_more_seeds_than_anybody_would_take_are_none():
    assert difference([0.0] * 4, [1.0, -1.0, 1.0, -0.999]).more_seeds is None


def test_under_a_target_is_scipys_one_sided_test():
    losses = [4.9, 4.8, 4.7]
    assert p_below(losses, 5.0) == pytest.approx(scipy.ttest_1samp(losses, 5.0, alternative="less").pvalue)
    assert p_below(losses, 4.6) == pytest.approx(scipy.ttest_1samp(losses, 4.6, alternative="less").pvalue)
    assert (p_below([4.0, 4.0], 5.0), p_below([5.0, 5.0], 5.0), p_below([6.0, 6.0], 5.0)) == (0, 0.5, 1)


def test_one_value_has_no_interval():
    for call in (lambda: mean([1.0]), lambda: difference([1.0], [2.0]), lambda: p_below([1.0], 2.0)):
        with pytest.raises(ValueError, match="1 value has no spread"):
            call()


def verdict(*rows) -> str:
    [said] = card(*rows).verdicts.values()
    return said


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([3.9, 4.09, 4.01], "mine is better than base by 0.100 ± 0.025 nats per token (3 seeds, p = 0.0033)"),
        ([4.1, 4.31, 4.19], "mine is worse than base by 0.100 ± 0.025 nats per token (3 seeds, p = 0.0033)"),
        (
            WORSE,
            "no difference shown: mine is +0.20 ± 0.25 nats per token from base (3 seeds, p = 0.074);"
            " if the next seeds are like these, 1 more would show one",
        ),
        (BASE, "mine and base have the very same losses (3 seeds)"),
        ([3.9, "not finite", 4.0], "no verdict on mine: mine failed, seed 1: not finite"),
    ],
)
def test_the_verdict_is_a_sentence(losses, said):
    assert verdict(row("base", BASE), row("mine", losses)).startswith(said)


@pytest.mark.parametrize(
    ("costs", "said"),
    [
        ({}, "; on v5p:2x2x1 a step takes as much time and as much HBM (compiled, not run)."),
        (
            {"step_seconds": 0.103, "hbm_bytes": 1012 * MIB},
            "; on v5p:2x2x1 a step takes 3.0 % more time and 12.0 MiB more HBM (compiled, not run).",
        ),
        ({"step_seconds": 0.09, "hbm_bytes": 900 * MIB}, "takes 10.0 % less time and 100.0 MiB less HBM"),
        ({"step_seconds": None}, "; what it costs on a TPU was not measured."),
        ({"refused": "compile raised E: too large"}, "; on v5p:2x2x1 the step of mine is refused: compile raised E"),
    ],
)
def test_the_verdict_names_the_cost(costs, said):
    assert said in verdict(row("base", BASE), row("mine", WORSE, **costs))


def test_a_baseline_that_failed_leaves_no_verdict():
    found = card(row("base", [4.0, "out of memory", 4.1]), row("mine", WORSE))
    assert "no verdict on mine: base failed, seed 1: out of memory" in found.verdicts["mine"]
    assert not found.is_sound
    assert "failed" in card_text(found)
    assert found.rows[0].mean("loss") is None  # that of the seeds which did not fail would flatter


def test_two_against_one_baseline_pay_for_two_chances():
    alone, both = card(row("base", BASE), row("a", WORSE)), card(row("base", BASE), row("a", WORSE), row("b", BASE))
    assert both.differences["a"].p == pytest.approx(2 * alone.differences["a"].p)
    assert both.differences["a"].half_width > alone.differences["a"].half_width


def test_contract_tests_that_fail_are_in_the_verdict():
    failing = row("mine", WORSE, contract=Contract(passed=17, failed=("test_a[mine]", "test_b[mine-cpu]")))
    found = card(row("base", BASE), failing)
    assert found.verdicts["mine"].endswith("; mine fails 2 of its contract tests.")
    assert not found.is_sound
    assert "mine fails test_a[mine], test_b[mine-cpu]" in card_text(found)


@pytest.mark.parametrize(
    ("value", "half_width", "text"),
    [(0.0314, 0.012, "0.031 ± 0.012"), (1.5, 12.3, "2 ± 12"), (0.00001234, 0.0000012, "0.0000123 ± 0.0000012")],
)
def test_numbers_end_where_they_are_known(value, half_width, text):
    assert plus_minus(value, half_width) == text


def test_variants_take_turns():
    assert list(in_turn(["a", "b"], range(2))) == [("a", 0), ("b", 0), ("b", 1), ("a", 1)]


def test_a_run_belongs_to_the_sources_it_was_made_with(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    (tmp_path / "grug_model").mkdir()
    file = tmp_path / "grug_model" / "model.py"
    file.write_text("x = 1\n")
    before = sources_digest(("grug_model",))
    assert sources_digest(("grug_model",)) == before
    file.write_text("x = 2\n")
    assert sources_digest(("grug_model",)) != before


def test_a_run_is_named_after_configuration_sources_and_seed(monkeypatch):
    config = PRESETS["laptop"]
    longer = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, steps=300))
    first, second = (runs.named("base", config, seed) for seed in (0, 1))
    assert (first.trainer.seed, second.trainer.seed) == (0, 1)
    assert first.run_id.removesuffix("0") == second.run_id.removesuffix("1")
    assert first.output_path == f"runs/{first.run_id}"
    others = [runs.digest("base", longer), runs.digest("attn_sink", config)]
    monkeypatch.setattr(runs, "sources_digest", lambda folders: "".join(folders))
    others.append(runs.digest("base", config))
    assert len({first.run_id.split("-")[2], *others}) == 4


CONTRACTS = """
import pytest
@pytest.mark.parametrize("variant", ["base", "base_too", "mine"])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_step(variant, platform):
    assert variant != "base_too"
    assert (variant, platform) != ("mine", "tpu")
@pytest.mark.parametrize("variant", ["base", "mine"])
def test_loss(variant):
    pytest.skip("not here")
"""


@pytest.fixture
def tests(tmp_path, monkeypatch):
    """A file in place of the contract tests."""
    monkeypatch.setattr(contract, "TESTS", tmp_path / "test_contracts.py")
    return contract.TESTS


def test_contract_tests_are_counted_by_variant(tests):
    """base_too, which `-k base` runs as well, fails alone."""
    tests.write_text(CONTRACTS)
    found = contracts(["base", "mine", "theirs"])
    assert found["base"] == Contract(passed=2, skipped=1)
    assert found["mine"] == Contract(passed=1, skipped=1, failed=("test_step[tpu-mine]",))
    assert found["theirs"] == Contract(not_run="no contract test of theirs was found")
    assert str(found["mine"]) == "1 failed, 1 passed, 1 skipped"


def test_contract_tests_that_cannot_run_are_not_passed(tests):
    tests.write_text("import no_such_module\n")
    assert contracts(["base"])["base"] == Contract(not_run="pytest ended with exit code 2, see above")
    tests.unlink()
    absent = contracts(["base"])["base"]
    assert absent.passed == 0
    assert str(absent) == "not run: there is no test_contracts.py here: it comes with the repository"
    said = card_text(card(row("base", BASE, contract=absent), row("mine", WORSE, contract=absent)))
    assert "note: contract tests not run: there is no test_contracts.py here" in said


@pytest.fixture
def scored(tmp_path):
    """A card whose runs have left their metrics."""
    for name in ("base", "a<b"):
        for seed in range(3):
            a_run(tmp_path / f"{name}{seed}")
    folder = str(tmp_path)
    return card(row("base", BASE, folder=folder), row("a<b", WORSE, folder=folder, hbm_bytes=1012 * MIB))


def test_the_page_needs_nothing_else(scored):
    html = card_page(scored)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|<script|<link|@import|url\(|src=", html)
    assert "prefers-color-scheme: dark" in html
    assert "a<b" not in html
    for part in (
        "no difference shown: a&lt;b is +0.20 ± 0.25 nats",
        "+12.0 MiB",
        "Training loss minus base",
        "seed by seed",
    ):
        assert part in html, part
    assert html.count("<circle") >= 6  # a point per seed


def test_the_page_of_runs_that_failed_has_no_mean_and_says_why():
    html = card_page(card(row("base", ["out of memory"] * 3), row("mine", ["not <finite>"] * 3)))
    assert "no run has ended" in html
    assert "mine, seed 2: not &lt;finite&gt;" in html


def test_the_ledger_has_the_last_row_of_each_variant(scored, tmp_path, caplog):
    folder = tmp_path / "scores"
    assert last_scores(folder) == {}
    page = keep(scored, folder)
    later = card(
        row("base", [3.0, 3.1, 3.2], folder=str(tmp_path)), row("mine", ["failed"] * 3, cost=COST, step_seconds=None)
    )
    object.__setattr__(later, "date", "2026-11-23T07:00:00+00:00")
    keep(later, folder)
    (folder / "2026-99.json").write_text("{half a")
    with caplog.at_level(logging.WARNING):
        found = last_scores(folder)
    assert "2026-99.json left out: it is no score" in caplog.text
    assert sorted(found) == ["a<b", "base", "mine"]
    assert found["a<b"]["loss"] == pytest.approx(4.3)
    assert (found["a<b"]["hbm_mib"], found["a<b"]["step_ms"], found["a<b"]["page"]) == (1012, 100, str(page))
    assert found["base"]["date"] == "2026-11-23T07:00:00+00:00"
    assert found["base"]["loss"] == pytest.approx(3.1)
    assert found["base"]["verdict"] is None
    assert (found["mine"]["loss"], found["mine"]["step_ms"]) == (None, None)
    score = json.loads(page.with_suffix(".json").read_text())
    assert score["rows"]["a<b"]["runs"][1]["loss"] == 4.4
    assert (score["commit"], score["seeds"], score["devices"]) == ("1234567", [0, 1, 2], ["2 × cpu"])
