# SPDX-License-Identifier: Apache-2.0
"""Programs are compiled anew in every benchmark: what `bench_loop` has kept must not be found by another's clock.

A run ends with our tables in place of pytest-benchmark's, whose minimum and outliers say little of a prediction, and
which knows nothing of refusals. `--benchmark-verbose` shows its own as well.
"""

import os
from collections import Counter
from pathlib import Path

import pytest

os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

from bench.ahead import ahead, pytest_collection_modifyitems, rows

__all__ = ["ahead", "pytest_collection_modifyitems", "rows"]


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark's own, which shows nothing where `quiet` is set
def pytest_terminal_summary(terminalreporter, config):
    from bench import tables
    from bench.results import row_of

    session = config.pluginmanager.getplugin("pytest-benchmark")
    if session.quiet:  # --benchmark-quiet
        return
    session.quiet = not session.verbose
    rows = [row_of(entry.as_dict(include_data=False)) for entry in session.benchmarks if not entry.has_error]
    before = {
        path.stem: {name: entry["stats"]["median"] for name, entry in entries.items()}
        for path, entries in session.compared_mapping.items()
    }
    for table in tables.tables(rows, before=before):
        terminalreporter.write_line("")
        terminalreporter.write_line(tables.text(table))
    for reason, count in skipped(terminalreporter.stats.get("skipped", ())).items():
        terminalreporter.write_line(f"\n{count} rows skipped: {reason}")


def skipped(reports) -> Counter[str]:
    """Reasons of the skipped benchmarks, and how many gave each."""
    reasons = Counter()
    for report in reports:
        file, _, reason = report.longrepr
        if Path(file).name.startswith("bench_"):
            reasons[reason.removeprefix("Skipped: ")] += 1
    return reasons
