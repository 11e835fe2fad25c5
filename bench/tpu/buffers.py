# SPDX-License-Identifier: Apache-2.0
"""Where a compiled program's temporaries lie in HBM, and from when to when: read off XLA's dump of its buffers.

XLA writes the dump before it refuses a program that is too large, so that this can be asked of one too.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_ALLOCATION = re.compile(r"allocation \d+: size (\d+), (?:color (\d+), )?page \d+, (.*)")
_VALUE = re.compile(r" value: <\d+ (\S+)(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\): (.*)")
_RANGE = re.compile(r"    (\S+\{[\d,]*\}):(\d+)-(\d+)")
_HOST = 5  # XLA's number of the host's memory; HBM has none


@dataclass(frozen=True)
class Value:
    """Of the HLO module. name: with its place in a tuple, "while.103{1}". shape: as printed. start, end: the first and
    the last place in the schedule at which it is in use."""

    name: str
    shape: str
    start: int
    end: int


@dataclass(frozen=True)
class Buffer:
    """values: that lie in it, one after the other or under several names: what a loop is given, what that is called
    inside, and what it returns."""

    size: int
    values: tuple[Value, ...]

    def at(self, place: int) -> "Buffer | None":
        """With only what is in use at that place of the schedule, None where nothing is."""
        alive = tuple(value for value in self.values if value.start <= place <= value.end)
        return Buffer(self.size, alive) if alive else None


@dataclass(frozen=True)
class Layout:
    """Bytes that are set aside in HBM: heap_bytes for temporaries, results_bytes for results that took no argument's
    place. host_bytes: of temporaries in the host's memory. buffers: in the heap, all of the program."""

    heap_bytes: int
    results_bytes: int
    host_bytes: int
    buffers: tuple[Buffer, ...]

    def fullest(self) -> tuple[int, list[Buffer]]:
        """(place in the schedule, what is in use there, the largest first) where most of the heap is in use."""
        change: defaultdict[int, int] = defaultdict(int)
        for buffer in self.buffers:
            change[min(value.start for value in buffer.values)] += buffer.size
            change[max(value.end for value in buffer.values) + 1] -= buffer.size
        used = most = place = 0
        for at in sorted(change):
            used += change[at]
            if used > most:
                most, place = used, at
        alive = (found for buffer in self.buffers if (found := buffer.at(place)))
        return place, sorted(alive, key=lambda buffer: -buffer.size)


def read_layout(directory: Path) -> Layout | None:
    """directory: what XLA dumped into. None where it had not come to its buffers."""
    ranges_file = next(directory.glob("*live-range.txt"), None)
    assignment_file = next(directory.glob("*buffer-assignment.txt"), None)
    if ranges_file is None or assignment_file is None:
        return None
    found = (_RANGE.fullmatch(line) for line in ranges_file.read_text().splitlines())
    ranges = {match[1]: (int(match[2]), int(match[3])) for match in found if match}
    return parse_layout(assignment_file.read_text(), ranges)


def parse_layout(assignment: str, ranges: dict[str, tuple[int, int]]) -> Layout:
    """assignment: XLA's `buffer-assignment.txt`. ranges: (first, last) place in the schedule of each value."""
    heap_bytes = results_bytes = host_bytes = 0
    placed: defaultdict[tuple[int, int], list[Value]] = defaultdict(list)
    in_heap = False
    for line in assignment.splitlines():
        if allocation := _ALLOCATION.match(line):
            size, color, kind = int(allocation[1]), int(allocation[2] or 0), allocation[3]
            in_heap = not color and kind.startswith("preallocated-temp")
            heap_bytes += size * in_heap
            host_bytes += size * (color == _HOST and kind.startswith("preallocated-temp"))
            results_bytes += size * (not color and "maybe-live-out" in kind and not kind.startswith("parameter"))
        elif in_heap and (value := _VALUE.match(line)):
            name = value[1] if value[1].endswith("}") else f"{value[1]}{{}}"
            placed[int(value[3]), int(value[2])].append(Value(name, value[4], *ranges[name]))
    return Layout(heap_bytes, results_bytes, host_bytes, tuple(_buffers(placed)))


def _buffers(placed: dict[tuple[int, int], list[Value]]) -> Iterator[Buffer]:
    """placed: values by (place in the heap, size). Those whose times touch share a buffer."""
    for (_, size), values in placed.items():
        values.sort(key=lambda value: value.start)
        together, end = [values[0]], values[0].end
        for value in values[1:]:
            if value.start > end:
                yield Buffer(size, tuple(together))
                together = []
            together.append(value)
            end = max(end, value.end)
        yield Buffer(size, tuple(together))
