# SPDX-License-Identifier: Apache-2.0
"""Rows compiled ahead: each once, told as times, after everything that is timed, and skipped aloud without libtpu."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from bench import ahead as module
from bench.ahead import Rows, pytest_collection_modifyitems, tell, told


class Benchmark:
    def __init__(self):
        self.extra_info, self.seconds = {}, None

    def pedantic(self, call, rounds):
        start = told()
        call()
        self.seconds = told() - start


def item(name, *, fixtures=("ahead",), row=None, marks=(), **params):
    return SimpleNamespace(
        name=name,
        fixturenames=fixtures,
        module=SimpleNamespace(row=row),
        callspec=SimpleNamespace(params=params),
        get_closest_marker=lambda mark: mark in marks or None,
    )


def config(markexpr="", gone=()):
    hook = SimpleNamespace(pytest_deselected=lambda items: gone.extend(items))
    return SimpleNamespace(getoption={"markexpr": markexpr}.get, hook=hook)


def test_seconds_of_a_row_are_the_benchmarks_time_and_the_rest_its_facts():
    benchmark = Benchmark()
    tell(benchmark, {"seconds": 0.25, "basis": "predicted"})
    assert benchmark.seconds == 0.25
    assert benchmark.extra_info == {"basis": "predicted"}


def test_a_refusal_has_no_time():
    benchmark = Benchmark()
    tell(benchmark, {"unsupported": "too large"})
    assert benchmark.seconds == 0
    assert benchmark.extra_info == {"unsupported": "too large"}


def test_the_same_row_is_made_once_for_all_who_ask():
    made = []

    def row(chip):
        made.append(chip)
        return {"chip": chip}

    items = [item("a", row=row, chip="v5p"), item("b", row=row, chip="v6e"), item("c", row=row, chip="v5p")]
    with ThreadPoolExecutor(1) as pool:
        rows = Rows([*items, item("timed", fixtures=())], pool)
        assert [rows.of(asked)["chip"] for asked in items] == ["v5p", "v6e", "v5p"]
    assert made == ["v5p", "v6e"]


def test_what_is_timed_comes_first_and_in_its_order():
    items = [item("predicted"), item("timed", fixtures=("benchmark",)), item("other"), item("late", fixtures=())]
    pytest_collection_modifyitems(config(), items)
    assert [found.name for found in items] == ["timed", "late", "predicted", "other"]


@pytest.mark.parametrize(("markexpr", "left"), [("", ["short"]), ("long", ["huge", "short"])])
def test_long_rows_are_left_out_aloud_unless_marks_are_asked_for(markexpr, left):
    gone = []
    items = [item("huge", marks=("long",)), item("short")]
    pytest_collection_modifyitems(config(markexpr, gone), items)
    assert [found.name for found in items] == left
    assert [found.name for found in gone] == ([] if markexpr else ["huge"])


def test_without_libtpu_the_row_is_skipped_with_the_reason(monkeypatch):
    monkeypatch.setattr(module, "has_libtpu", lambda: False)
    with pytest.raises(pytest.skip.Exception, match="libtpu is not installed: uv sync --extra tpu"):
        module.ahead.__wrapped__(SimpleNamespace())


def test_without_the_peer_its_row_is_skipped_with_the_reason(monkeypatch):
    def missing(chip):
        raise ModuleNotFoundError("tokamax is not installed: uv sync --extra peers")

    monkeypatch.setattr(module, "has_libtpu", lambda: True)
    asking = item("a", row=missing, chip="v6e")
    with ThreadPoolExecutor(1) as pool:
        rows = Rows([asking], pool)
        row = module.ahead.__wrapped__(SimpleNamespace(node=asking, getfixturevalue=lambda name: rows))
        with pytest.raises(pytest.skip.Exception, match="uv sync --extra peers"):
            row()
