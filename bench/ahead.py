# SPDX-License-Identifier: Apache-2.0
"""Rows compiled for a TPU that is not there: two at a time, in processes of their own, after all that is timed.

A benchmark asks for `ahead`, with the module-level function `row` that makes its row, for its own parameters:

    @pytest.mark.benchmark(timer=told)
    @pytest.mark.parametrize("chip", CHIPS)
    def bench_something(benchmark, ahead, chip):
        tell(benchmark, ahead())          # row(chip=chip) -> {"seconds": …, "basis": "predicted", …}

Its seconds stand where pytest-benchmark keeps times, so that they are saved and compared as times are; `basis` says
what they are. Import `ahead` and `pytest_collection_modifyitems` in a `conftest.py`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest

from bench.tpu.topology import LIBTPU_IS_MISSING, has_libtpu, stay_on_cpu

WORKERS = 2

_now = 0.0


def told() -> float:
    """The clock of rows whose seconds are told: it moves only by `tell`."""
    return _now


def tell(benchmark: Any, row: Mapping[str, Any]) -> None:
    """Makes `row` the benchmark's: its "seconds" (none: unsupported) as the time, everything else as `extra_info`."""
    facts = dict(row)
    seconds = facts.pop("seconds", 0.0)

    def pass_time() -> None:
        global _now
        _now += seconds

    benchmark.extra_info |= facts
    benchmark.pedantic(pass_time, rounds=1)


def every(*always: Any, long: Sequence[Any] = ()) -> list[Any]:
    """What to parametrize over: `always`, and `long` with `-m long` only."""
    return [*always, *(_long(value) for value in long)]


def _long(value: Any) -> Any:
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.long)


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """What is timed comes first: compiling beside it would slow it. What is long is left to `-m long`."""
    items.sort(key=lambda item: "ahead" in getattr(item, "fixturenames", ()))
    long = [item for item in items if item.get_closest_marker("long")]
    if long and not config.getoption("markexpr"):
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


class Rows:
    """What `row` gives for each of the items that ask, submitted in their order; the same call is made once."""

    def __init__(self, items: list[Any], pool: Executor):
        self._futures: dict[Any, Future] = {}
        for item in items:
            if "ahead" in getattr(item, "fixturenames", ()):
                key = self._key(item)
                if key not in self._futures:
                    self._futures[key] = pool.submit(item.module.row, **item.callspec.params)

    def of(self, item: Any) -> dict[str, Any]:
        return self._futures[self._key(item)].result()

    @staticmethod
    def _key(item: Any) -> Any:
        return item.module.row, tuple(sorted(item.callspec.params.items()))


@pytest.fixture(scope="session")
def rows(request: Any) -> Iterator[Rows]:
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn"), initializer=stay_on_cpu) as pool:
        yield Rows(request.session.items, pool)
        pool.shutdown(cancel_futures=True)


@pytest.fixture
def ahead(request: Any) -> Callable[[], dict[str, Any]]:
    """The item's row. Skips it, saying so, without libtpu or without the peer that it is of."""
    if not has_libtpu():
        pytest.skip(LIBTPU_IS_MISSING)
    found = request.getfixturevalue("rows")

    def row() -> dict[str, Any]:
        try:
            return found.of(request.node)
        except ModuleNotFoundError as missing:
            pytest.skip(str(missing))

    return row
