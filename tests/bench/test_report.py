# SPDX-License-Identifier: Apache-2.0
"""The page about a saved run, its pictures, and two runs compared."""

import math
import os
import re
import struct
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench import charts, report
from bench.pictures import pictures
from bench.results import read, row_of
from tests.bench.report_cases import GIB, UNITS, benchmark, compiled, everything, measured, predicted, saved, steps

ROOT = Path(__file__).parents[2]
HOSTILE = '<script>alert("1")</script>&"\''
needs_resvg = pytest.mark.skipif(find_spec("resvg_py") is None, reason="resvg_py is not installed: uv sync")


class Balanced(HTMLParser):
    """Fails where a tag is closed that is not the innermost open one; collects texts and tags."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.words = [], set(), []
        self.feed(page)
        assert self.open == ["html"] or self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_data(self, data):
        self.words.append(data)


def drawn(benchmarks):
    return {picture.name: picture.svg for picture in pictures([row_of(entry) for entry in benchmarks])}


def words(svg):
    """What is written in the picture, tips left out."""
    return [text.text for text in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def the_page(tmp_path, benchmarks, before=None):
    results = read(saved(tmp_path / "0002_after.json", benchmarks))
    earlier = read(saved(tmp_path / "0001_before.json", before)) if before else None
    return report.page(results, pictures(results.rows), earlier)


# Pictures


def test_every_kind_of_row_has_its_picture():
    assert list(drawn(everything())) == [
        "times-attention-measured",
        "times-attention-predicted",
        "times-train-step-measured",
        "mfu-train-step-measured",
        "kernels-attention-predicted",
        "hbm",
        "depth-depth-cpu-seconds-of-compiling-step-v5p-2x2x1-4-devices",
        "depth-depth-cpu-seconds-of-compiling-step-v6e-2x2x1-4-devices",
    ]


def test_measured_and_predicted_are_never_in_one_picture():
    found = drawn([*measured(), *predicted()])
    assert "1.20 ms · best" in words(found["times-attention-predicted"])
    assert not set(words(found["times-attention-predicted"])) & {"xla", "reference"}
    assert "pallas_tpu" not in words(found["times-attention-measured"])


def test_bars_are_as_long_as_their_times():
    bars = re.findall(r'<rect[^>]* width="([\d.]+)"', drawn(measured())["times-attention-measured"])
    xla, reference = map(float, bars)
    assert xla / reference == pytest.approx(0.0151 / 0.0741, rel=0.01)


def test_a_refused_row_has_a_word_and_no_bar():
    svg = drawn(predicted())["times-attention-predicted"]
    assert "unsupported" in words(svg)
    assert svg.count("<rect") == 6
    assert "2048x2048" not in "".join(filter(None, words(drawn(predicted())["kernels-attention-predicted"])))


def test_hbm_is_held_against_what_the_chip_has():
    svg = drawn(compiled())["hbm"]
    assert {"1.20 GiB available", "1.22 GiB · 101 %", "v5p:2x2x1 · of 95.7 GiB, the longest bar is 1.3 %"} <= set(
        words(svg)
    )
    assert "results" not in words(svg)  # all arguments are donated: none is left over


def test_compile_seconds_are_drawn_from_zero():
    svg = drawn(compiled())["depth-depth-cpu-seconds-of-compiling-step-v6e-2x2x1-4-devices"]
    assert {"0", "50", "100", "150", "base", "array_stacked", "layers"} <= set(words(svg))


def test_categories_that_are_new_are_drawn_under_their_own_name():
    (row,) = compiled()[:1]
    row["extra_info"] |= {"hbm/arguments/experts_bytes": GIB, "hbm/reserved_bytes": 3 * GIB}
    assert {"experts", "results"} <= set(words(drawn([row])["hbm"]))


def test_groups_that_share_their_programs_share_their_pictures():
    again = [row | {"group": "hbm", "fullname": row["fullname"] + "again"} for row in compiled()]
    assert drawn([*compiled(), *again]).keys() == drawn(compiled()).keys()
    assert drawn([*compiled(), *again])["hbm"] == drawn(compiled())["hbm"]


def test_the_parts_of_the_mfu_add_up_to_it():
    svg = drawn(steps())["mfu-train-step-measured"]
    (tip,) = (
        t.text for t in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}title") if t.text.startswith("base:")
    )
    parts = {name: float(share) for name, share in re.findall(r"^(.*) (\S+) %$", tip, re.M) if name[:4] != "base"}
    assert [*parts] == ["projections", "attention", "attention, masked out", "mlp", "head", "recomputed"]
    assert sum(share for name, share in parts.items() if name != "recomputed") == pytest.approx(18 / 0.41, rel=1e-3)
    assert sum(parts.values()) == pytest.approx(22.3 / 0.41, rel=1e-3)
    assert parts["attention"] == pytest.approx(parts["attention, masked out"], rel=1e-3)


def test_a_strip_is_as_wide_as_its_cycles_and_as_dark_as_its_use():
    halves = [0.0] * 32 + [1.0] * 32
    rows = [
        benchmark(
            f"bench_k[{cycles}]", "k", 1.0, basis="predicted", implementation=name, cycles=cycles, strip__MXU=halves
        )
        for name, cycles in (("long", 200), ("short", 100))
    ]
    rects = re.findall(
        r'<rect x="([\d.]+)"[^>]* width="([\d.]+)"[^>]* fill="var\(--c0\)"', drawn(rows)["kernels-k-predicted"]
    )
    (long_x, long_width), (short_x, short_width) = [(float(x), float(width)) for x, width in rects]
    assert long_width == pytest.approx(2 * short_width, abs=0.2)
    assert (long_x - 64, short_x - 64) == pytest.approx((long_width, short_width), abs=0.2)


@pytest.mark.parametrize("strip", [[], "text", None, [math.nan, 0.5], [7, -1], ["a"], {"a": 1}])
def test_strips_that_are_none_do_no_harm(strip):
    row = benchmark("bench_k", "k", 1.0, basis="predicted", cycles=10, strip__MXU=strip, strip__VALU=[0.5])
    assert UNITS[1] not in words(drawn([row])["kernels-k-predicted"])


# PNG files


@needs_resvg
def test_pictures_are_png_files_of_twice_their_size():
    for svg in drawn(everything()).values():
        _, _, width, height = map(float, re.findall(r'viewBox="([^"]*)"', svg)[0].split())
        png = charts.png(svg)
        assert png.startswith(b"\x89PNG\r\n\x1a\n")
        assert png.endswith(b"IEND\xaeB`\x82")
        assert struct.unpack(">II", png[16:24]) == (2 * (width + 2 * charts.MARGIN), 2 * (height + 2 * charts.MARGIN))


@needs_resvg
def test_png_files_have_the_colors_of_the_page():
    """resvg knows no variables of CSS: a picture whose variables were left in it would come out black."""
    square = '<svg class="plot" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9">{}</svg>'
    square = square.format('<rect width="9" height="9" fill="{}"/>')
    assert charts.png(square.format("var(--c1)")) == charts.png(square.format("#d9480f"))
    assert charts.png(square.format("var(--c1)")) != charts.png(square.format("#000"))


def test_without_resvg_there_is_a_page_and_a_word_about_it(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    html, pngs = report.write(read(saved(tmp_path / "a.json", measured())), tmp_path / "out")
    assert html.exists()
    assert pngs == []
    assert "no PNG files, resvg_py is not installed: uv sync" in caplog.text


@needs_resvg
def test_a_machine_without_fonts_is_told_so(tmp_path, monkeypatch, caplog):
    results = read(saved(tmp_path / "a.json", measured()))
    monkeypatch.setattr(charts, "has_fonts", lambda: False)
    _, pngs = report.write(results, tmp_path / "out")
    assert "the PNG files have no letters" in caplog.text
    assert all(png.exists() for png in pngs)


# The page


def test_the_page_says_what_was_measured_where(tmp_path):
    page = the_page(tmp_path, everything())
    for fact in ("A Processor @ 2.00GHz × 2, Linux 6.1, Python 3.12.1", "commit 0123456789+, 2026-11-21 13:00 UTC"):
        assert fact in page
    assert "25 rows, 1 unsupported" in page
    assert "v5p, v6e" in page


def test_the_page_is_self_contained_and_whole(tmp_path):
    page = the_page(tmp_path, everything(), measured())
    parsed = Balanced(page)
    assert not parsed.tags & {"script", "link", "img", "iframe"}
    assert not re.search(r"(?:src|href)=|url\(|@import", page)
    assert "prefers-color-scheme: dark" in page
    for svg in re.findall(r"<svg.*?</svg>", page, re.S):
        ET.fromstring(svg)


def test_names_are_text_wherever_they_are_shown(tmp_path):
    facts = (
        "op",
        "passes",
        "shape",
        "dtype",
        "chip",
        "variant",
        "implementation",
        "block_sizes",
        "commit",
        "peak_source",
    )
    rows = []
    for row in everything():
        hostile = {name: f"{row['extra_info'].get(name, '')}{HOSTILE}" for name in facts} | {HOSTILE: 1.5}
        rows.append(row | {"group": HOSTILE, "fullname": row["fullname"] + HOSTILE})
        rows[-1]["extra_info"] = row["extra_info"] | hostile
    rows[3]["extra_info"]["unsupported"] = HOSTILE
    content = saved(
        tmp_path / "a.json", rows, machine_info={"node": HOSTILE}, commit_info={"id": HOSTILE}, datetime=HOSTILE
    )
    results = read(content)
    page = report.page(results, pictures(results.rows), results)
    parsed = Balanced(page)
    assert "script" not in parsed.tags
    assert any(HOSTILE in text for text in parsed.words)
    assert all(re.fullmatch(r"[a-z0-9-]+", picture.name) for picture in pictures(results.rows))


@pytest.mark.parametrize("kind", range(4))
def test_any_fact_may_be_missing_or_odd(tmp_path, kind):
    row = (measured()[0], predicted()[0], compiled()[0], steps()[0])[kind]
    for odd in ("missing", None, math.nan, "text", -1, 0, [1], {}):
        for part in ("extra_info", "stats"):
            for name in row[part]:
                values = {key: value for key, value in row[part].items() if key != name or odd != "missing"}
                if odd != "missing":
                    values[name] = odd
                cases = [row_of(row | {part: values}), row_of(row), row_of(row | {"fullname": "another"})]
                for picture in pictures(cases):
                    ET.fromstring(picture.svg)
                report.tables(cases)
    for part in ("extra_info", "stats", "params", "group", "name", "fullname"):
        bare = {key: value for key, value in row.items() if key != part}
        Balanced(the_page(tmp_path, [bare, row | {part: None}, {}]))


# Two runs


def changed(row, *, times=1.0, **facts):
    return row | {
        "stats": row["stats"] | {"median": row["stats"]["median"] * times},
        "extra_info": row["extra_info"] | {key.replace("__", "/"): value for key, value in facts.items()},
    }


def cells(table, row):
    return [column.cells[row] for column in table.columns]


def compared(tmp_path, before, after, **overrides):
    old = read(saved(tmp_path / "0001_before.json", before, **overrides))
    return report.compare(old, read(saved(tmp_path / "0002_after.json", after)))


def test_two_runs_are_compared_row_by_row(tmp_path):
    before = [*measured(), *compiled()[:1]]
    after = [
        changed(before[0], times=0.5),
        changed(before[1], times=1.05),
        changed(before[2], times=2.0),
        changed(before[3], hbm__reserved_bytes=before[3]["extra_info"]["hbm/reserved_bytes"] + GIB // 2),
    ]
    times, compiles = compared(tmp_path, before, after)
    assert cells(times, 0) == ["bench_attention[laptop-xla]", "15.1", "7.55", "0.500×", "faster"]
    assert cells(times, 1)[3:] == ["1.050×", "within the spread"]  # which is 10 %
    assert cells(times, 2)[3:] == ["2.000×", "slower"]
    assert cells(compiles, 0)[3:] == ["1.000×", "the same", "0.304", "+0.500", "0.0300", "0"]


def test_rows_of_one_run_only_or_of_another_kind_are_named(tmp_path):
    first, second, third = measured()
    tables = compared(tmp_path, [first, second], [first, changed(second, basis="predicted"), third])
    assert tables[-1].notes == [
        f"only in 0002_after: {third['fullname']}",
        f"not compared, its time is of another kind: {second['fullname']}",
    ]
    (nothing,) = compared(tmp_path, [first], [third])
    assert nothing.notes[0] == "no row is in both runs"


def test_refusals_and_times_that_are_none_are_not_compared(tmp_path):
    first, second, _ = measured()
    refused = changed(first, unsupported="too large")
    (table,) = compared(tmp_path, [first, second], [refused, changed(second, times=math.nan)])
    assert cells(table, 0)[1:] == ["15.1", "unsupported", "–", ""]
    assert cells(table, 1)[1:] == ["74.1", "nan", "–", ""]
    assert table.notes == ["unsupported: bench_attention[laptop-xla]: too large"]


def test_two_machines_are_named_where_a_clock_was_read(tmp_path):
    machine = {"machine_info": {"processor": "another"}}
    (table,) = compared(tmp_path, measured(), measured(), **machine)
    assert "two machines: their times say little of the code. another; A Processor" in table.notes[0]
    (table,) = compared(tmp_path, predicted()[:2], predicted()[:2], **machine)
    assert table.notes == []


# The command


def run(tmp_path, *arguments):
    command = [sys.executable, "-m", "bench.report", *map(str, arguments)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})


def test_without_a_file_it_takes_the_newest_run(tmp_path):
    saved(tmp_path / ".benchmarks" / "machine" / "0001_mine.json", measured())
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == [
        "the run saved last: .benchmarks/machine/0001_mine.json",
        ".benchmarks/reports/0001_mine/report.html",
    ]
    assert all((tmp_path / line).is_file() for line in done.stdout.splitlines()[1:])


def test_errors_are_one_line_without_a_traceback(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    for arguments, message in (
        ([], "there is no saved run under .benchmarks/. Make one with `uv run pytest bench --benchmark-only"),
        (["broken.json"], "broken.json is not JSON"),
        (["a", "b", "c"], "3 files: give one to report on, or two to compare"),
    ):
        with pytest.raises(SystemExit):
            report.main(arguments)
        assert message in capsys.readouterr().err


def test_two_files_are_named_in_the_folder_and_compared_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = [saved(tmp_path / f"{name}.json", measured()) for name in ("before", "after")]
    report.main([str(file) for file in files])
    page = (tmp_path / ".benchmarks" / "reports" / "before-to-after" / "report.html").read_text()
    assert "<h1>before → after</h1>" in page
    assert page.index("before → after: measured") < page.index("attention: measured")
