# SPDX-License-Identifier: Apache-2.0
"""A sweep: which candidates are compiled, which are spared, what is kept for the next time, which is best."""

import io
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from bench.plan import candidates, sweep
from bench.plan.candidates import Candidate, Kept, Outcome, groups
from bench.plan.frontier import best, frontier, rows, table
from bench.plan.page import page, picture
from bench.plan.plan import changed
from bench.tpu.topology import LIBTPU_IS_MISSING, has_libtpu
from tests.bench import tpu_cases
from tests.bench.plan_cases import GIB, tiny

FOUR_CHIPS = tpu_cases.topology("v5p", 2, 2, 1)


def outcome(remat: str, model: int, batch: int, gib: float | None, rate: float | None = None, **more) -> Outcome:
    return Outcome(
        Candidate(remat, model, batch),
        total_bytes=None if gib is None else int(gib * GIB),
        step_seconds=None if rate is None else batch / rate,
        tokens_per_second_per_chip=rate,
        mfu=None if rate is None else rate / 1000,
        **more,
    )


def test_what_is_usual_is_every_policy_three_batches_and_the_axes_that_divide():
    found = groups(tiny(), FOUR_CHIPS, (), (), ())
    assert {candidate.model for group in found for candidate in group} == {1}  # the model has one head
    assert {candidate.remat for group in found for candidate in group} >= {"none", "full", "save_attention"}
    assert all([candidate.batch for candidate in group] == [8, 16, 32] for group in found)


def test_model_axes_are_of_the_devices_that_the_other_axes_leave():
    """Of four, two for each copy of the weights."""
    config = changed(tiny(replica_dcn=2), model={"num_heads": 4, "num_kv_heads": 4, "head_dim": 32})
    assert {candidate.model for group in groups(config, FOUR_CHIPS, (), (), ()) for candidate in group} == {1, 2}


def test_what_is_named_is_tried_the_smallest_batch_first():
    found = groups(tiny(), FOUR_CHIPS, ["none"], [32, 8], [2, 1])
    assert found == [
        [Candidate("none", 1, 8), Candidate("none", 1, 32)],
        [Candidate("none", 2, 8), Candidate("none", 2, 32)],
    ]
    with pytest.raises(ValueError, match="--remat most: GrugModelConfig has no such policy"):
        groups(tiny(), FOUR_CHIPS, ["most"], [], [])


def test_a_candidate_is_the_configuration_with_it_in():
    config = Candidate("none", 2, 64).of(tiny())
    assert (config.model.remat, config.trainer.model_axis, config.trainer.batch_size) == ("none", 2, 64)
    assert config.model.hidden_dim == tiny().model.hidden_dim


@pytest.fixture
def swept(monkeypatch, tmp_path):
    """swept(groups, sizes) runs a sweep whose compiles are looked up in `sizes`, GiB by candidate, on a chip of 10 GiB;
    returns (outcomes, what was compiled in its order, the last line of progress)."""

    def run(found, sizes):
        compiled = []

        def tried(variant, config, topology, candidate) -> Outcome:
            compiled.append(candidate)
            size = sizes[candidate]
            return outcome(*candidate, size, 100.0 if size <= 10 else None, seconds=1.0)

        monkeypatch.setattr(sweep, "tried", tried)
        monkeypatch.setattr(sweep, "ProcessPoolExecutor", lambda workers, **_: ThreadPoolExecutor(1))
        said = io.StringIO()
        kept = Kept(tmp_path / "compiled", "array_stacked", tiny(), FOUR_CHIPS)
        outcomes = sweep.sweep("array_stacked", tiny(), "v5p:2x2x1", found, kept, 10 * GIB, stream=said)
        return outcomes, compiled, said.getvalue().splitlines()[-1]

    return run


GROUPS = [[Candidate(remat, 1, batch) for batch in (8, 16, 32)] for remat in ("full", "none")]
SIZES = dict(zip((candidate for group in GROUPS for candidate in group), (2, 4, 8, 6, 12, 24), strict=True))


@pytest.mark.skipif(not has_libtpu(), reason=LIBTPU_IS_MISSING)  # its version is part of what an outcome is kept under
def test_a_batch_that_does_not_fit_spares_the_larger_ones(swept):
    outcomes, compiled, said = swept(GROUPS, SIZES)
    assert Candidate("none", 1, 32) not in compiled
    assert len(compiled) == 5
    assert [one.candidate for one in outcomes] == [candidate for group in GROUPS for candidate in group]
    assert outcomes[-1].skipped
    assert outcomes[-1].why == "not compiled: batch 16 did not fit"
    assert [one.fits(10 * GIB) for one in outcomes] == [True, True, True, True, False, False]
    assert said.startswith("6 of 6 candidates, ")


@pytest.mark.skipif(not has_libtpu(), reason=LIBTPU_IS_MISSING)
def test_a_sweep_that_was_stopped_goes_on(swept):
    first, _, _ = swept(GROUPS[:1], SIZES)
    outcomes, compiled, _ = swept(GROUPS, SIZES)
    assert compiled == [Candidate("none", 1, 8), Candidate("none", 1, 16)]
    assert outcomes[:3] == first
    assert swept(GROUPS, SIZES)[1] == []


@pytest.mark.skipif(not has_libtpu(), reason=LIBTPU_IS_MISSING)
def test_what_is_kept_is_of_one_configuration_one_chip_and_these_sources(tmp_path, monkeypatch):
    candidate = Candidate("full", 1, 8)
    kept = Kept(tmp_path, "array_stacked", tiny(), FOUR_CHIPS)
    kept.put(outcome(*candidate, 2.0, 100.0))
    assert kept.get(candidate) == outcome(*candidate, 2.0, 100.0)
    assert kept.get(Candidate("full", 1, 16)) is None
    for other in (
        Kept(tmp_path, "base", tiny(), FOUR_CHIPS),
        Kept(tmp_path, "array_stacked", tiny(ema_beta=0.9), FOUR_CHIPS),
        Kept(tmp_path, "array_stacked", tiny(), tpu_cases.topology("v6e", 2, 2, 1)),
    ):
        assert other.get(candidate) is None
    monkeypatch.setattr(candidates, "sources_digest", lambda: "edited")
    assert Kept(tmp_path, "array_stacked", tiny(), FOUR_CHIPS).get(candidate) is None


def test_a_source_that_is_edited_changes_the_digest(tmp_path, monkeypatch):
    for folder in candidates._SOURCES:
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setattr(candidates, "_ROOT", tmp_path)
    source = tmp_path / "train" / "optimizer.py"
    source.write_text("rate = 1")
    before = candidates.sources_digest()
    source.write_text("rate = 2")
    assert candidates.sources_digest() != before


OUTCOMES = [
    outcome("full", 1, 8, 2.0, 100.0),
    outcome("full", 1, 16, 4.0, 150.0),
    outcome("none", 1, 8, 6.0, 140.0),  # more memory and less speed than the one before
    outcome("none", 1, 16, 9.0, 200.0),
    outcome("none", 1, 32, 30.0, why="too large: (30.00G) exceeds available HBM (10.00G)"),
    outcome("none", 1, 64, None, skipped=True, why="not compiled: batch 32 did not fit"),
    outcome("none", 2, 8, None, why="step: num_heads=1 does not divide over 2 devices"),
]


def test_the_frontier_is_what_no_other_beats_in_both():
    assert frontier(OUTCOMES) == [OUTCOMES[0], OUTCOMES[1], OUTCOMES[3]]


def test_the_best_is_the_fastest_that_fits():
    assert best(OUTCOMES, 10 * GIB) is OUTCOMES[3]
    assert best(OUTCOMES, 5 * GIB) is OUTCOMES[1]
    assert best(OUTCOMES, 1 * GIB) is None


def test_of_two_as_fast_the_smaller_is_best():
    pair = [outcome("none", 1, 8, 5.0, 100.0), outcome("full", 1, 8, 2.0, 100.0)]
    assert best(pair, 10 * GIB) is pair[1]
    assert frontier(pair) == [pair[1]]


def test_the_table_says_what_became_of_each():
    words = [row[-1] for row in rows(OUTCOMES, 8 * GIB)]
    assert words == [
        "on the frontier",
        "best that fits",
        "",
        "does not fit",
        "does not fit",
        "not compiled: batch 32 did not fit",
        "step: num_heads=1 does not divide over 2 devices",
    ]
    lines = table(OUTCOMES, 8 * GIB).splitlines()
    assert lines[1].split() == ["full", "1", "8", "2.00", "80.0", "100", "0.1", "on", "the", "frontier"]
    assert lines[5].split()[3:5] == ["30.00", "–"]


def test_the_picture_draws_limits_points_and_the_frontier():
    svg = picture("sweep", OUTCOMES, {"v5p": 11 * GIB, "budget": 5 * GIB})
    assert svg.count("<circle") == 4 + 3  # points; in the legend two policies and a model axis of 1
    assert svg.count('style="fill:var(--paper)') == 2  # hollow: 6 and 9 GiB do not fit into 5
    assert "v5p 11 GiB" in svg
    assert "budget 5 GiB" in svg
    joined = re.search(r'd="M([^"]*)" stroke="var\(--soft\)"', svg)
    assert len(joined[1].split("L")) == 3
    assert "none, model axis 1, batch 16: 9.00 GiB, 200 tokens/s per chip" in svg


def test_a_limit_that_is_far_away_is_told_and_not_drawn():
    svg = picture("sweep", OUTCOMES, {"v5p": 95 * GIB})
    assert "v5p: 95 GiB, to the right" in svg
    assert "level" not in svg


def test_labels_cover_no_point_and_no_other_label():
    crowd = [outcome("full", 1, 2**i, 2.0 + i / 200, 100.0 + i % 3) for i in range(12)]
    crowd.append(outcome("full", 1, 1, 1.0, 10.0))  # far away, so that the others are close together
    svg = picture("sweep", crowd, {"v5p": 3 * GIB})
    texts = re.findall(r'<text class="halo" x="([\d.]+)" y="([\d.]+)">(\d+)</text>', svg)
    assert 3 <= len(texts) < 13
    boxes = [(float(x), float(y) - 9, float(x) + 6.4 * len(text), float(y)) for x, y, text in texts]
    boxes += [
        (float(x) - 4, float(y) - 4, float(x) + 4, float(y) + 4) for x, y in re.findall(r'cx="(.*?)" cy="(.*?)"', svg)
    ]
    for i, a in enumerate(boxes[: len(texts)]):
        for b in boxes[i + 1 :]:
            assert a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3]


def test_the_page_is_light_and_dark_and_has_the_command():
    svg = picture("sweep", OUTCOMES, {"v5p": 10 * GIB})
    html = page("sweep", OUTCOMES, {"v5p": 10 * GIB}, svg, ["best: none", "uv run python -m train.run --x <1>"])
    assert "prefers-color-scheme: dark" in html
    assert "<pre>uv run python -m train.run --x &lt;1&gt;</pre>" in html
    assert html.count('<tr class="best">') == 1
    assert "not compiled: batch 32 did not fit" in html
    assert "<script" not in html


def test_a_picture_of_nothing_is_refused():
    with pytest.raises(ValueError, match="nothing to draw"):
        picture("sweep", OUTCOMES[4:], {"v5p": 10 * GIB})
