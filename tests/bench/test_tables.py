# SPDX-License-Identifier: Apache-2.0
"""The tables at the end of a run of the benchmarks, and what they are made of."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.results import ResultsError, comparisons, newest, read, row_of
from bench.tables import WIDTH, number_text, tables, text, time_unit
from tests.bench.report_cases import benchmark, compiled, everything, measured, predicted, saved, steps

ROOT = Path(__file__).parents[2]


def rows(benchmarks):
    return [row_of(entry) for entry in benchmarks]


def texts(benchmarks, **options):
    return [text(table) for table in tables(rows(benchmarks), **options)]


def line_of(words, table):
    return next(line for line in table.splitlines() if words in line)


# Tables


def test_the_title_says_what_the_time_is():
    titles = [table.splitlines()[0] for table in texts(everything())]
    assert [title.strip("─ ") for title in titles] == [
        "attention: measured on this machine",
        "attention: predicted from the compiler's schedule, not measured",
        "depth: compiler's CPU seconds",
        "train_step: measured on this machine",
    ]


def test_a_row_without_a_basis_is_measured():
    (table,) = texts(steps())
    assert "measured on this machine" in table
    assert line_of("levanter_base", table).split()[:4] == ["levanter_base", "520", "0", "1.27×"]


def test_the_fastest_of_a_setting_is_the_best_and_the_others_are_held_against_it():
    (table,) = texts(measured()[::-1])
    assert line_of("15.1", table).split() == ["laptop", "xla", "15.1", "10.0", "best", "8.16"]
    assert line_of("74.1", table).split() == ["reference", "74.1", "10.0", "4.91×", "8.16"]
    assert line_of("75.0", table).split() == ["1x2048", "xla", "75.0", "10.0", "8.16"]  # alone: nothing to compare


def test_what_all_rows_share_is_said_once():
    (table,) = texts(measured())
    assert table.splitlines()[1] == "attention · forward · float32 · cpu · 1 device"
    assert "float32" not in "".join(table.splitlines()[2:])


def test_a_refusal_is_a_word_in_place_of_each_number_and_a_sentence_below():
    (table,) = texts(predicted())
    assert line_of("2048x2048", table).split() == ["pallas_tpu", "2048x2048", "unsupported", "–", "–", "–", "–"]
    assert table.splitlines()[-1] == (
        "unsupported: bench_attention_tpu[v6e-big]: VMEM: 18 MiB needed, 16 allowed; try block_q=512"
    )


def test_a_refused_row_is_never_the_best_nor_what_others_are_held_against():
    refused = benchmark("bench_a[x]", "a", 1e-9, implementation="x", unsupported="no")
    (table,) = texts([benchmark("bench_a[y]", "a", 2.0, implementation="y"), refused])
    assert "best" not in table
    assert comparisons(rows([refused]))[0][0].seconds is None


def test_depths_ascend_and_what_does_not_fit_is_named():
    (table,) = texts(compiled()[::-1])
    lines = [line.split() for line in table.splitlines() if line.startswith(("v5p", "v6e"))]
    assert [line[:2] for line in lines] == [[f"{c}:2x2x1", d] for c in ("v6e", "v5p") for d in ("12", "24", "48")]
    assert "does not fit: bench_depth[v6e-base-48]: 0.0159 GiB more than a device has" in table


def test_unknown_numbers_are_shown_under_their_own_name_and_families_are_not():
    (table,) = texts([benchmark("bench_a", "a", 1.0, loop_adds_percent=1.5, slots__VALU=0.5, strip__MXU=[0.1])])
    assert "loop_adds_percent" in table
    assert "VALU" not in table


def test_no_line_is_wider_than_a_terminal_and_columns_left_out_are_named():
    wide = {f"a_number_with_a_long_name_{i}": 1.5 for i in range(12)}
    cases = [benchmark("bench_a", "a", 1.0, unsupported="word " * 100), benchmark("bench_b", "a", 1.0, **wide)]
    (table,) = texts(cases)
    assert max(map(len, table.splitlines())) <= WIDTH
    assert table.endswith("a_number_with_a_long_name_11.")
    assert all(len(line) <= WIDTH for table in texts(everything()) for line in table.splitlines())


def test_names_with_line_breaks_and_of_any_length_stay_in_their_line():
    long = benchmark("bench_a[x]", "a" * 300, 1.0, implementation="two\nlines" + "!" * 300, shape="s" * 300)
    (table,) = texts([long, long | {"fullname": "other"}, benchmark("bench_a", "a" * 300, 2.0, implementation="y")])
    assert max(map(len, table.splitlines())) <= WIDTH
    assert line_of("two lines!", table)


def test_an_earlier_run_is_a_column():
    before = {measured()[0]["fullname"]: 0.0302}
    (table,) = texts(measured(), before={"0001_before": before})
    heads = [line.split() for line in table.splitlines()[2:4]]
    assert heads == [
        ["shape", "implementation", "time", "spread", "against", "against", "temporary"],
        ["ms", "%", "the", "best", "0001_before", "MiB"],
    ]
    assert line_of("15.1", table).split() == ["laptop", "xla", "15.1", "10.0", "best", "0.50×", "8.16"]


@pytest.mark.parametrize("seconds", [math.nan, math.inf, 0.0, -1.0])
def test_a_time_that_is_none_is_shown_and_not_compared(seconds):
    odd = benchmark("bench_a[x]", "a", seconds, implementation="x")
    (table,) = texts([odd, *(benchmark(f"bench_a[{i}]", "a", i, implementation=str(i)) for i in (2.0, 3.0))])
    assert line_of("2.0", table).split()[-1] == "best"
    assert line_of("x ", table).split()[:2] == ["x", number_text(seconds)]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"), (0.0, "0"), (7, "7"), (1234567, "1.23M"), (0.012, "0.0120"), (0.9999, "1.00"), (1.234, "1.23"),
        (12.34, "12.3"), (123.4, "123"), (99_999.9, "100,000"), (math.nan, "nan"), (None, "–"), (-0.5, "-0.500"),
    ],
)  # fmt: skip
def test_numbers_have_three_digits(value, expected):
    assert number_text(value) == expected


def test_the_unit_is_that_of_the_middle_time():
    assert time_unit([2e-6, 3e-3, 4e-3]) == ("ms", 1e-3)
    assert time_unit([2e-6]) == ("µs", 1e-6)
    assert time_unit([None, math.nan]) == ("s", 1.0)


# Files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON: Expecting value"),
        ("{", "is not JSON"),
        ("[]", 'has no list "benchmarks"'),
        ('{"benchmarks": 3}', 'has no list "benchmarks"'),
        ('{"benchmarks": ["a"]}', 'has no list "benchmarks"'),
        ('{"benchmarks": []}', "holds no benchmarks"),
    ],
)
def test_a_file_that_is_none_of_ours_is_refused_with_the_command_that_makes_one(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ResultsError, match=message) as error:
        read(tmp_path / "a.json")
    assert "uv run pytest bench --benchmark-only --benchmark-save NAME" in str(error.value)


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path):
    with pytest.raises(ResultsError, match="cannot be read: No such file"):
        read(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ResultsError, match="is not JSON"):
        read(tmp_path / "binary.json")


def test_the_newest_run_is_the_one_saved_last(tmp_path):
    with pytest.raises(ResultsError, match=r"no saved run under .*Make one with `uv run pytest bench"):
        newest(tmp_path)
    first = saved(tmp_path / "machine" / "0002_a.json", measured())
    last = saved(tmp_path / "machine" / "0001_b.json", measured())
    os.utime(first, (1, 1))
    assert newest(tmp_path) == last


def test_a_run_says_where_and_when_it_was_made(tmp_path):
    results = read(saved(tmp_path / "0001_a.json", measured()))
    assert results.title == "0001_a"
    assert results.machine == "A Processor @ 2.00GHz × 2, Linux 6.1, Python 3.12.1, host here"
    assert (results.commit, results.date) == ("0123456789+", "2026-11-21 13:00")
    bare = read(saved(tmp_path / "b.json", measured(), machine_info=None, commit_info=None))
    assert (bare.machine, bare.commit) == ("unknown processor", "unknown")


# The end of a run

BENCH = """
import pytest

@pytest.mark.parametrize("implementation", ["fast", "slow", "refused"])
def bench_waiting(benchmark, implementation):
    benchmark.group = "waiting"
    benchmark.extra_info |= {"implementation": implementation}
    if implementation == "refused":
        benchmark.extra_info["unsupported"] = "it does not wait"
    benchmark.pedantic(lambda: sum(range(10 if implementation == "fast" else 100_000)), rounds=3)

@pytest.mark.parametrize("chip", [1, 2])
@pytest.mark.skip(reason="libtpu is not installed")
def bench_chip(benchmark, chip):
    pass
"""


def test_a_run_ends_with_our_table_in_place_of_theirs(tmp_path):
    file = tmp_path / "bench_waiting.py"
    file.write_text(BENCH)
    command = [sys.executable, "-m", "pytest", str(file), "-p", "bench.conftest", "-p", "no:cacheprovider"]
    command += ["-o", "python_functions=bench_*", "--benchmark-only", f"--benchmark-storage={tmp_path / 'saved'}"]

    def run(*options):
        # Or else it takes itself for one of several processes, in which it would not time anything.
        env = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
        return subprocess.run([*command, *options], cwd=ROOT, env=env, capture_output=True, text=True, check=True)

    first = run("--benchmark-save=before")
    assert "waiting: measured on this machine" in first.stdout
    assert line_of("fast", first.stdout).split()[3] == "best"
    assert "unsupported: bench_waiting[refused]: it does not wait" in first.stdout
    assert "2 rows skipped: libtpu is not installed" in first.stdout
    assert "Outliers" not in first.stdout
    assert "Saved benchmark data in" in first.stderr + first.stdout
    second = run("--benchmark-compare", "--benchmark-verbose")
    assert "0001_before" in line_of("the best", second.stdout)
    assert "Outliers" in second.stdout  # theirs, asked for
