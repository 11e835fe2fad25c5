# SPDX-License-Identifier: Apache-2.0
"""What pytest-benchmark has saved, as rows: times in seconds, and the facts that the benchmarks put beside them."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STORAGE = Path(".benchmarks")
HOW_TO_SAVE = "uv run pytest bench --benchmark-only --benchmark-save NAME"

# What a row's time is. The three are never compared with one another.
BASES = {
    "measured": "measured on this machine",
    "predicted": "predicted from the compiler's schedule, not measured",
    "compiled": "compiler's CPU seconds",
}
# Facts that rows of one comparison have in common, and facts in which its contenders differ.
SETTING = ("op", "shape", "passes", "dtype", "chip", "topology", "device", "devices", "hidden_dim", "num_layers")
DEPTH = "num_layers"
CONTENDER = ("variant", "remat", "implementation", "block_sizes")


class ResultsError(ValueError):
    """A file of results that cannot be used: says which, what was expected, and how to get one."""


@dataclass(frozen=True)
class Row:
    """One benchmark.

    name: tells it from every other of its file, and finds it again in another file.
    seconds: median; None where there is none, above all where the row was refused. NaN where the file says NaN.
    spread: distance of the quartiles over the median; None where it was timed once, or not by a clock.
    """

    name: str
    group: str
    basis: str
    seconds: float | None
    spread: float | None
    facts: Mapping[str, Any]

    @property
    def unsupported(self) -> str | None:
        """Why the row was refused."""
        sentence = self.facts.get("unsupported")
        return None if sentence is None else str(sentence) or "no reason given"

    @property
    def short_name(self) -> str:
        return self.name.rpartition("::")[2]

    def number(self, name: str) -> float | None:
        """A fact that is a number; None where it is missing or something else, and for every refused row."""
        return None if self.unsupported is not None else _number(self.facts.get(name))

    def finite(self, name: str) -> float | None:
        """The same, None where it is NaN or infinite: what can be drawn."""
        value = self.number(name)
        return value if value is not None and math.isfinite(value) else None

    def numbers(self, prefix: str) -> dict[str, float]:
        """The finite ones named `prefix/<name>`, by <name>; deeper ones are left out."""
        names = (name.removeprefix(f"{prefix}/") for name in self.facts if name.startswith(f"{prefix}/"))
        found = {name: self.finite(f"{prefix}/{name}") for name in names if "/" not in name}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Results:
    """One saved run. title: the file's name without its folder and ending."""

    title: str
    rows: tuple[Row, ...]
    machine: str
    commit: str
    date: str


def row_of(benchmark: Mapping[str, Any]) -> Row:
    """Of one entry of "benchmarks", as saved or as pytest-benchmark's session has it."""
    params = {
        name: value for name, value in (benchmark.get("params") or {}).items() if isinstance(value, str | int | float)
    }
    facts = {
        name: value
        for name, value in (params | (benchmark.get("extra_info") or {})).items()
        if not (isinstance(value, str) and value.startswith("UNSERIALIZABLE["))
    }
    stats = benchmark.get("stats") or {}
    name = str(benchmark.get("fullname") or benchmark.get("name") or "without a name")
    basis = str(facts.get("basis", "measured"))
    seconds = _number(stats.get("median")) if facts.get("unsupported") is None else None
    spread = _number(stats.get("iqr")) if basis == "measured" and (_number(stats.get("rounds")) or 0) > 1 else None
    return Row(
        name=name,
        group=str(benchmark.get("group") or name.rpartition("::")[2].split("[")[0].removeprefix("bench_")),
        basis=basis,
        seconds=seconds,
        spread=spread / seconds if spread is not None and seconds is not None and is_time(seconds) else None,
        facts=facts,
    )


def read(path: Path) -> Results:
    """Raises ResultsError where there is no such file, or it is not one that pytest-benchmark saved."""
    expected = f"Expected a file that `{HOW_TO_SAVE}` or `--benchmark-json FILE` has written."
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(f"{path} cannot be read: {error.strerror}. {expected}") from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise ResultsError(f"{path} is not JSON: {error}. {expected}") from error
    benchmarks = saved.get("benchmarks") if isinstance(saved, dict) else None
    if not isinstance(benchmarks, list) or not all(isinstance(entry, dict) for entry in benchmarks):
        raise ResultsError(f'{path} has no list "benchmarks". {expected}')
    if not benchmarks:
        raise ResultsError(f"{path} holds no benchmarks: was every one skipped, or the run stopped? {expected}")
    return Results(
        title=path.stem,
        rows=tuple(map(row_of, benchmarks)),
        machine=_machine(saved.get("machine_info") or {}),
        commit=_commit(saved.get("commit_info") or {}),
        date=str(saved.get("datetime", "unknown date"))[:16].replace("T", " "),
    )


def newest(storage: Path = STORAGE) -> Path:
    """The file that was saved last. Raises ResultsError where there is none."""
    files = list(storage.glob("*/*.json")) if storage.is_dir() else []
    if not files:
        raise ResultsError(f"there is no saved run under {storage}/. Make one with `{HOW_TO_SAVE}`.")
    return max(files, key=lambda file: (file.stat().st_mtime, file.name))


def by_table(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by (group, basis), in the order in which they ran: what is measured and what is predicted stay apart."""
    tables: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        tables.setdefault((row.group, row.basis), []).append(row)
    return tables


def comparisons(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows of one setting together, fastest first, refused ones last; settings as they ran, but depths ascending."""
    series: dict[tuple[Any, ...], dict[float, list[Row]]] = {}
    for row in rows:
        depths = series.setdefault((row.basis, *(str(row.facts.get(name)) for name in SETTING if name != DEPTH)), {})
        depths.setdefault(_depth(row), []).append(row)
    return [sorted(found, key=_time_or_last) for depths in series.values() for _, found in sorted(depths.items())]


def varying(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """Those of the facts `names` in which the rows differ."""
    found = [name for name in names if len({str(row.facts.get(name)) for row in rows}) > 1]
    said = "topology" in found and all(row.facts.get("topology") for row in rows)
    return [name for name in found if not (said and name == "chip")]  # "v5p:2x2x1" says v5p


def shared(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """Those of the facts `names` in which the rows agree."""
    return [name for name in names if not varying(rows, [name])]


def describe(row: Row, names: Iterable[str]) -> str:
    """These facts in words, where the row has them: "1x2048 · forward · 12 layers"."""
    given = {name: str(row.facts[name]) for name in names if row.facts.get(name) not in (None, "")}
    if "topology" in given:
        given.pop("chip", None)
    counted = {"num_layers": "layer", "devices": "device"}
    words = (f"{value} {_plural(counted[name], value)}" if name in counted else value for name, value in given.items())
    return " · ".join(words)


def best(contenders: Iterable[Row]) -> float | None:
    """The shortest time of a comparison; None where fewer than two can be compared."""
    times = [row.seconds for row in contenders if row.seconds is not None and is_time(row.seconds)]
    return min(times) if len(times) > 1 else None


def is_time(seconds: float | None) -> bool:
    return seconds is not None and math.isfinite(seconds) and seconds > 0


def _plural(noun: str, count: str) -> str:
    return noun if count == "1" else f"{noun}s"


def _depth(row: Row) -> float:
    depth = _number(row.facts.get(DEPTH))
    return depth if depth is not None and math.isfinite(depth) else 0


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _time_or_last(row: Row) -> tuple[bool, float]:
    return (False, row.seconds) if row.seconds is not None and is_time(row.seconds) else (True, 0.0)


def _machine(info: Mapping[str, Any]) -> str:
    cpu = info.get("cpu") or {}
    processor = cpu.get("brand_raw") or info.get("processor") or info.get("machine") or "unknown processor"
    parts = [
        f"{processor} × {cpu['count']}" if cpu.get("count") else str(processor),
        " ".join(str(info[key]) for key in ("system", "release") if info.get(key)),
        f"Python {info['python_version']}" if info.get("python_version") else "",
        f"host {info['node']}" if info.get("node") else "",
    ]
    return ", ".join(part for part in parts if part)


def _commit(info: Mapping[str, Any]) -> str:
    if not info.get("id"):
        return "unknown"
    return str(info["id"])[:10] + ("+" if info.get("dirty") else "")
