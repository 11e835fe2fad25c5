# SPDX-License-Identifier: Apache-2.0
"""The optimised HLO of a compiled function: which kernels run how often, and the constants they read as scalars."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

# Printed types -> NumPy's. Floats are left out: nothing that decides control flow is one.
_DTYPES = {
    "pred": np.bool_,
    "s8": np.int8,
    "u8": np.uint8,
    "s16": np.int16,
    "u16": np.uint16,
    "s32": np.int32,
    "u32": np.uint32,
}
_CARRIED = {"copy", "copy-start", "copy-done", "bitcast", "broadcast", "get-tuple-element"}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)", re.S)
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")


@dataclass(frozen=True)
class Instruction:
    """shape: as printed, with its layout. operands: names. rest: what follows the operands' opening parenthesis."""

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    rest: str

    @property
    def is_pallas(self) -> bool:
        return 'custom_call_target="tpu_custom_call"' in self.rest


@dataclass(frozen=True)
class Call:
    """times: how often one run of the function comes by, loops multiplied out."""

    instruction: Instruction
    times: int


@dataclass
class Module:
    """computations: name -> instructions, in the order of the schedule."""

    entry: str
    computations: dict[str, list[Instruction]]
    notes: list[str] = field(default_factory=list)

    def calls(self) -> list[Call]:
        """Everything that one run executes; a loop of unknown length counts once, with a note in `notes`."""
        return list(self._calls(self.entry, 1))

    def _calls(self, computation: str, times: int) -> Iterator[Call]:
        for instruction in self.computations[computation]:
            if instruction.opcode == "while":
                yield from self._calls(_named("body", instruction), times * self._trips(instruction))
            elif instruction.opcode == "call":
                yield from self._calls(_named("to_apply", instruction), times)
            elif instruction.opcode == "conditional":
                self.notes.append(f"conditional {instruction.name}: counted as if its last branch were taken")
                yield from self._calls(_branches(instruction)[-1], times)
            else:
                yield Call(instruction, times)

    def _trips(self, loop: Instruction) -> int:
        if found := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(found[1])
        condition = self.computations[_named("condition", loop)]
        bounds = {i.name: i for i in condition if i.opcode == "constant"}
        root = condition[-1]
        if root.opcode == "compare" and "direction=LT" in root.rest and root.operands[1] in bounds:
            return int(re.findall(r"-?\d+", bounds[root.operands[1]].rest)[0])  # JAX's loops count up from 0
        self.notes.append(f"loop {loop.name}: number of trips unknown, counted once")
        return 1

    def constants(self) -> dict[str, tuple[np.ndarray, str]]:
        """Integer arrays known at compile time: name -> (values, printed layout), copies and broadcasts followed."""
        known: dict[str, tuple[np.ndarray, str]] = {}
        for instructions in self.computations.values():
            for instruction in instructions:
                values = _constant(instruction) if instruction.opcode == "constant" else None
                if instruction.opcode in _CARRIED and instruction.operands and instruction.operands[0] in known:
                    values = _reshaped(known[instruction.operands[0]][0], instruction.shape)
                if values is not None:
                    known[instruction.name] = values, layout_of(instruction.shape)
        return known


def parse(text: str) -> Module:
    """`text`: a scheduled module with large constants printed. Raises ValueError where there is no ENTRY."""
    computations: dict[str, list[Instruction]] = {}
    lines: list[str] = []
    entry = current = None
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = head[2]
            entry = current if head[1] else entry
            lines = []
        elif line == "}" and current:
            computations[current] = [i for i in map(_instruction, lines) if i]
            current = None
        elif current and _INSTRUCTION.match(line):
            lines.append(line)
        elif lines:
            lines[-1] += "\n" + line  # metadata may hold line breaks
    if entry is None:
        raise ValueError(f"no ENTRY computation in {len(text)} characters of HLO.")
    return Module(entry, computations)


def _instruction(text: str) -> Instruction | None:
    match = _INSTRUCTION.match(text)
    if not match:
        return None
    name, shape, opcode, rest = match.groups()
    return Instruction(name, opcode, shape, tuple(re.findall(r"%([\w.\-]+)", rest.split(")")[0])), rest)


def _named(attribute: str, instruction: Instruction) -> str:
    found = re.search(rf"{attribute}=%?([\w.\-]+)", instruction.rest)
    assert found is not None, f"{instruction.name} has no {attribute}"
    return found[1]


def _branches(conditional: Instruction) -> list[str]:
    if listed := re.search(r"branch_computations=\{([^}]*)\}", conditional.rest):
        return re.findall(r"%?([\w.\-]+)", listed[1])
    return [_named("false_computation", conditional), _named("true_computation", conditional)]


def layout_of(shape: str) -> str:
    """The layout of the first array in a printed shape, "{}" where none is printed."""
    match = _ARRAY.search(shape)
    return (match[3] if match else None) or "{}"


def moved_bytes(copy: Instruction) -> int:
    """What a copy, or the start of an asynchronous one, reads from HBM and writes to it, without the padding of tiles.

    Printed as the destination, or as (destination, source, …) of a copy-start, or as ((operands), result, …) of all
    others; a slice moves no more than its result. VMEM is memory space 1.
    """
    arrays = [match for match in _ARRAY.finditer(copy.shape) if match[2]]
    if not arrays:
        return 0
    destination = arrays[0] if copy.opcode in ("copy", "copy-start") else arrays[-1]
    ends = arrays[:2] if len(arrays) > 1 else arrays * 2
    return _bytes(destination) * sum("S(1)" not in (end[3] or "") for end in ends)


def _bytes(match: re.Match[str]) -> int:
    bits = int((re.findall(r"\d+", match[1]) or ["8"])[0])
    return int(np.prod([int(extent) for extent in match[2].split(",") if extent], dtype=np.int64)) * bits // 8


def _constant(instruction: Instruction) -> np.ndarray | None:
    match = _ARRAY.match(instruction.shape)
    if not match or match[1] not in _DTYPES or "..." in instruction.rest:
        return None
    numbers = re.findall(r"-?\d+|true|false", instruction.rest.split(")")[0])
    values = np.array([{"true": 1, "false": 0}.get(n) if n.isalpha() else int(n) for n in numbers])
    return _reshaped(values.astype(_DTYPES[match[1]]), instruction.shape)


def _reshaped(values: np.ndarray, shape: str) -> np.ndarray | None:
    """`values` in a printed shape; a single number fills it. None where the sizes disagree."""
    match = _ARRAY.search(shape)
    extents = tuple(int(extent) for extent in match[2].split(",") if extent) if match else ()
    if values.size == int(np.prod(extents)):
        return values.reshape(extents)
    return np.broadcast_to(values.reshape(()), extents) if values.size == 1 else None


def pack_words(values: np.ndarray, layout: str) -> np.ndarray:
    """`values` as the int32 words that lie in memory under a printed layout such as "{2,1,0:T(8,128)(2,1)}".

    The layout says: dimensions from the fastest to the slowest; tiles, padded with zeros; within a tile, how many rows
    of a narrow type share one word, "(2,1)".
    """
    values = np.asarray(values)
    order, tiles = _parse_layout(layout, values.ndim)
    values = values.transpose(order[::-1]) if values.ndim else values.reshape(1)
    if tiles and len(tiles[0]) == 2:
        values = _tiled(np.atleast_2d(values), tiles[0], tiles[1][0] if len(tiles) > 1 else 1)
    elif tiles:
        values = _pad(values, (tiles[0][0],))
        if len(tiles) > 2:  # T(512)(128)(4,1): 512 numbers are 4 rows of 128, and the rows share words
            values = values.reshape(-1, tiles[2][0], tiles[1][0]).swapaxes(-2, -1)
    raw = np.ascontiguousarray(values).tobytes()
    return np.frombuffer(raw + bytes(-len(raw) % 4), np.int32)


def _tiled(values: np.ndarray, tile: tuple[int, ...], rows_per_word: int) -> np.ndarray:
    rows, columns = tile
    values = _pad(values, tile)
    *lead, height, width = values.shape
    values = values.reshape(*lead, height // rows, rows, width // columns, columns).swapaxes(-3, -2)
    values = values.reshape(*values.shape[:-2], rows // rows_per_word, rows_per_word, columns)
    return values.swapaxes(-2, -1)


def _pad(values: np.ndarray, multiples: tuple[int, ...]) -> np.ndarray:
    """The last dimensions filled with zeros to `multiples`."""
    untouched = [(0, 0)] * (values.ndim - len(multiples))
    last = [(0, -n % m) for n, m in zip(values.shape[values.ndim - len(multiples) :], multiples, strict=True)]
    return np.pad(values, untouched + last)


def _parse_layout(layout: str, ndim: int) -> tuple[list[int], list[tuple[int, ...]]]:
    order, _, details = layout.strip("{}").partition(":")
    tiles = re.search(r"T((?:\([\d,]+\))+)", details)
    return (
        [int(dimension) for dimension in order.split(",") if dimension] or list(range(ndim))[::-1],
        [tuple(map(int, tile.split(","))) for tile in re.findall(r"\(([\d,]+)\)", tiles[1])] if tiles else [],
    )
