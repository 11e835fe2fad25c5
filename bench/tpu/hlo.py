# SPDX-License-Identifier: Apache-2.0
"""The optimised HLO of a compiled function: computations, what calls what, and how often loops run."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath

import numpy as np

from bench.tpu import arrays

# Number of trips of loops whose bounds are computed at run time: part of the loop's scope or op_name -> trips.
Trips = Mapping[str, float]

_CARRIED = {"copy", "copy-start", "copy-done", "bitcast", "broadcast", "get-tuple-element"}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)", re.S)
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
_TABLE_ROW = re.compile(r"(\d+) (.*)")
# Files that pass calls on: a frame in one of them does not say what an operation is for.
_PASSES_ON = ("dispatch", "api", "array_stacked", "scan", "remat", "sharding", "settings")
# Folder -> what its operations are for: ours, and those of Levanter and JAX with kernels for the same.
_SCOPES = {
    "attention": "attention",
    "splash_attention": "attention",
    "cross_entropy": "cross_entropy",
    "fused_cross_entropy_loss": "cross_entropy",
}


@dataclass(frozen=True)
class Instruction:
    """shape: as printed, with its layout. operands: names. rest: what follows the operands' opening parenthesis."""

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    rest: str
    is_root: bool = False

    @property
    def is_pallas(self) -> bool:
        return 'custom_call_target="tpu_custom_call"' in self.rest

    @property
    def parameter_number(self) -> int:
        """Of an instruction whose opcode is "parameter": which argument of its computation it is."""
        return int(self.rest.split(")")[0])

    @property
    def op_name(self) -> str:
        """The path of JAX's names that the instruction comes from: jit(step)/while/body/dot_general."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1].replace("\\'", "'") if found else ""

    @property
    def estimated_cycles(self) -> int | None:
        """What XLA's own cost model says of a fusion."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(found[1]) if found else None

    def called(self, *attributes: str) -> list[str]:
        """Computations that these attributes name: "body", "calls", …"""
        return [name for attribute in attributes for name in re.findall(rf"\b{attribute}=%?([\w.\-]+)", self.rest)]

    def branches(self) -> list[str]:
        """Computations of a conditional."""
        if listed := re.search(r"branch_computations=\{([^}]*)\}", self.rest):
            return re.findall(r"%?([\w.\-]+)", listed[1])
        return self.called("true_computation", "false_computation")


@dataclass
class Module:
    """computations: name -> instructions, in the order of the schedule. frames: stack frame -> (file, line, function)
    of each caller, innermost first. notes: what was not known, filled while counting."""

    entry: str
    computations: dict[str, list[Instruction]]
    frames: dict[int, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    trips: Trips = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    used_trips: set[str] = field(default_factory=set)

    def trips_of(self, loop: Instruction) -> float | None:
        """How often a `while` runs: known to XLA, or its condition is "counter < constant", or given; else None."""
        if found := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(found[1])
        condition = self.computations[loop.called("condition")[0]]
        bounds = {i.name: i for i in condition if i.opcode == "constant"}
        root = next((i for i in condition if i.is_root), condition[-1])
        if root.opcode == "compare" and "direction=LT" in root.rest and root.operands[1] in bounds:
            return int(re.findall(r"-?\d+", bounds[root.operands[1]].rest)[0])  # JAX's loops count up from 0
        names = f"{loop.name} {loop.op_name} {self.scope(loop)}"
        given = [key for key in self.trips if key in names]
        self.used_trips.update(given)
        return self.trips[given[0]] if given else None

    def trips_or_one(self, loop: Instruction) -> float:
        """As `trips_of`; where that is not known once, and a note says so."""
        trips = self.trips_of(loop)
        if trips is not None:
            return trips
        self.notes.append(
            f"loop {loop.name} ({self.scope(loop)}): number of trips unknown, counted once. Pass"
            f" trips={{{loop.name!r}: number}}, or part of its scope or op_name."
        )
        return 1

    def scope(self, instruction: Instruction) -> str:
        """Where in the source it comes from: "attention", "cross_entropy", "model.MLP", "optimizer"; "other" if that
        is not known. Optax is the optimizer; of JAX's names only the source's tell, as scopes are seldom named."""
        found = re.search(r"stack_frame_id=(\d+)", instruction.rest)
        frames = self.frames.get(int(found[1]), ()) if found else ()
        for file, function in frames:
            path = PurePath(file)
            if "optax" in path.parts:
                return "optimizer"
            if scope := _SCOPES.get(path.parent.name):
                return scope
            if path.stem in _PASSES_ON or path.parent.name == "tpu" or "site-packages" in path.parts:
                continue
            if path.suffix == ".py":
                return f"model.{function.split('.')[0]}" if path.stem == "model" else path.stem
        return "other"

    def constants(self) -> dict[str, tuple[np.ndarray, str]]:
        """Integer arrays known at compile time: name -> (values, printed layout), followed through copies, broadcasts
        and loops that hand them on unchanged."""
        known: dict[str, tuple[np.ndarray, str]] = {}
        self._follow(self.entry, known)
        return known

    def _follow(self, computation: str, known: dict[str, tuple[np.ndarray, str]]) -> None:
        instructions = {instruction.name: instruction for instruction in self.computations[computation]}
        passed: dict[tuple[str, int], tuple[np.ndarray, str]] = {}  # elements of what a loop here returns
        for instruction in instructions.values():
            values = None
            if instruction.opcode == "constant":
                values = arrays.constant(instruction.shape, instruction.rest.split(")")[0])
            elif _is_element(instruction) and (instruction.operands[0], element_index(instruction)) in passed:
                known[instruction.name] = passed[instruction.operands[0], element_index(instruction)]
            elif instruction.opcode in _CARRIED and instruction.operands and instruction.operands[0] in known:
                values = arrays.reshaped(known[instruction.operands[0]][0], instruction.shape)
            if values is not None:
                known[instruction.name] = values, arrays.layout_of(instruction.shape)
            if instruction.opcode == "while":
                body = instruction.called("body")[0]
                start = instructions.get(instruction.operands[0])
                if start is not None and start.opcode == "tuple":
                    for index, name in self._handed_on(body):
                        if start.operands[index] in known:
                            known[name] = passed[instruction.name, index] = known[start.operands[index]]
                self._follow(body, known)
            for callee in (*instruction.called("to_apply"), *instruction.branches()):
                if instruction.opcode in ("call", "conditional"):
                    self._follow(callee, known)

    def _handed_on(self, body: str) -> list[tuple[int, str]]:
        """(index, name) of the elements of a loop's state that its body reads and returns as they are."""
        instructions = self.computations[body]
        elements = {i.name: element_index(i) for i in instructions if _is_element(i)}
        result = next((i for i in instructions if i.is_root), instructions[-1])
        unchanged = {index for index, name in enumerate(result.operands) if elements.get(name) == index}
        return [(index, name) for name, index in elements.items() if index in unchanged]


def _is_element(instruction: Instruction) -> bool:
    return instruction.opcode == "get-tuple-element"


def element_index(element: Instruction) -> int:
    found = re.search(r", index=(\d+)", element.rest)
    assert found is not None, element
    return int(found[1])


def parse(text: str, trips: Trips | None = None) -> Module:
    """text: a scheduled module, as `compiled.as_text()`; large constants printed where `constants` are wanted.

    Raises ValueError where there is no ENTRY.
    """
    computations: dict[str, list[Instruction]] = {}
    lines: list[str] = []
    entry = current = None
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = head[2]
            entry = current if head[1] else entry
            lines = []
        elif current and (line == "}" or line.startswith("}, execution_thread=")):
            computations[current] = list(_instructions(lines))
            current = None
        elif current and _INSTRUCTION.match(line):
            lines.append(line)
        elif lines:
            lines[-1] += "\n" + line  # metadata may hold line breaks
    if entry is None:
        raise ValueError(
            f"no ENTRY computation in {len(text)} characters of HLO. Pass compiled.as_text(), the optimised program,"
            " not lowered.as_text()."
        )
    return Module(entry, computations, _stack_frames(text), trips or {})


def _instructions(lines: list[str]) -> Iterator[Instruction]:
    for text in lines:
        match = _INSTRUCTION.match(text)
        assert match is not None
        root, name, shape, opcode, rest = match.groups()
        yield Instruction(name, opcode, shape, tuple(re.findall(r"%([\w.\-]+)", rest.split(")")[0])), rest, bool(root))


def _stack_frames(text: str) -> dict[int, tuple[tuple[str, str], ...]]:
    """The tables in front of the module: frame -> (file, function) from the innermost call outwards."""
    rows: dict[str, dict[int, str]] = {name: {} for name in _TABLES}
    table = None
    for line in text.splitlines():
        if line in rows:
            table = rows[line]
        elif line.startswith(("%", "ENTRY")):
            break
        elif table is not None and (row := _TABLE_ROW.match(line)):
            table[int(row[1])] = row[2]
    files, functions, locations, stack = rows.values()
    found: dict[int, tuple[tuple[str, str], ...]] = {}
    for frame in stack:
        names, at = [], frame
        while at:
            location = re.findall(r"(\w+)=(\d+)", locations[_field(stack[at], "file_location_id")])
            place = {key: int(value) for key, value in location}
            names.append((files[place["file_name_id"]].strip('"'), functions[place["function_name_id"]].strip('"')))
            at = _field(stack[at], "parent_frame_id") - 1  # printed one too high; 0 is no frame
        found[frame] = tuple(names)
    return found


def _field(row: str, name: str) -> int:
    found = re.search(rf"{name}=(\d+)", row)
    assert found is not None, row
    return int(found[1])
