# SPDX-License-Identifier: Apache-2.0
"""What each value of a compiled program is made of, followed through loops and fusions, and whose memory it has."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from bench.tpu import hlo
from bench.tpu.hlo import Instruction

_TAKES_A_PART = {"dynamic-slice", "slice", "gather"}
_COPIES = {"copy", "copy-done"}
_CALLS = {"fusion", "call", "async-start"}


@dataclass(frozen=True)
class Origin:
    """whole, parts: the followed arguments (by index) that it is made of, as they are or of a slice of them.
    other: made of another argument too. All empty: made of constants."""

    whole: frozenset[int] = frozenset()
    parts: frozenset[int] = frozenset()
    other: bool = False

    def __or__(self, added: "Origin") -> "Origin":
        return Origin(self.whole | added.whole, self.parts | added.parts, self.other or added.other)

    def __bool__(self) -> bool:
        return self.other or bool(self.followed)

    @property
    def followed(self) -> frozenset[int]:
        return self.whole | self.parts

    def sliced(self) -> "Origin":
        return Origin(parts=self.followed, other=self.other)


OTHER = Origin(other=True)
# One Origin, or a tuple of them for a value of tuple type whose elements are known apart.
Value = Any


class Origins:
    """of: computation -> name of an instruction -> Value. Called computations are in it with what they were last given.

    Raises ValueError where `followed`, paths such as "state.params.w", are no arguments of the program.
    """

    def __init__(self, module: hlo.Module, followed: list[str]):
        self.of: dict[str, dict[str, Value]] = {}
        self._computations = module.computations
        parameters = {
            instruction.parameter_number: instruction
            for instruction in module.computations[module.entry]
            if instruction.opcode == "parameter"
        }
        names = {parameter.op_name for parameter in parameters.values()}
        if missing := [name for name in followed if name not in names]:
            raise ValueError(
                f"origins: {missing[0]!r} is none of the program's {len(names)} arguments: {', '.join(sorted(names))}."
                " Name it as the function does whose argument it is part of; what is not read is no argument."
            )
        arguments: dict[int, Value] = {}
        for number, parameter in parameters.items():
            known = parameter.op_name in followed
            arguments[number] = Origin(frozenset([followed.index(parameter.op_name)])) if known else OTHER
        self._run(module.entry, arguments)

    def _run(self, computation: str, arguments: dict[int, Value]) -> Value:
        """The value of its root. Instructions are printed in an order in which they can run."""
        values = self.of[computation] = {}
        result: Value = Origin()
        for instruction in self._computations[computation]:
            if instruction.opcode == "parameter":
                value = arguments[instruction.parameter_number]
            else:
                operands = [values[name] for name in instruction.operands if name in values]
                value = self._value(instruction, operands)
            values[instruction.name] = value
            if instruction.is_root:
                result = value
        return result

    def _value(self, instruction: Instruction, operands: list[Value]) -> Value:
        opcode = instruction.opcode
        if opcode == "tuple":
            return tuple(operands)
        if opcode == "get-tuple-element" and isinstance(operands[0], tuple):
            return operands[0][hlo.element_index(instruction)]
        if opcode == "while":
            return self._looped(instruction.called("body")[0], operands[0])
        if opcode in _CALLS and (called := instruction.called("calls", "to_apply")):
            return self._run(called[0], dict(enumerate(operands)))
        if opcode == "conditional":
            for branch, operand in zip(instruction.branches(), operands[1:], strict=True):
                self._run(branch, {0: operand})
        origin = joined(operands)
        return origin.sliced() if opcode in _TAKES_A_PART else origin

    def _looped(self, body: str, state: Value) -> Value:
        """The loop's state when it ends: grown, round by round, until it grows no more."""
        while True:
            grown = _either(state, self._run(body, {0: state}))
            if grown == state:
                return state
            state = grown


def joined(values: Iterable[Value]) -> Origin:
    """All of them together, elements of tuples too."""
    origin = Origin()
    for value in values:
        origin |= joined(value) if isinstance(value, tuple) else value
    return origin


def _either(first: Value, second: Value) -> Value:
    if isinstance(first, tuple) and isinstance(second, tuple):
        return tuple(map(_either, first, second))
    return joined([first, second])


class Scope:
    """A computation that runs by itself, not in a fusion: the entry, a loop's body, a branch."""

    def __init__(self, module: hlo.Module, name: str, origins: Origins, is_loop: bool):
        self.is_loop = is_loop
        self.instructions = {i.name: i for i in module.computations[name]}
        self._module, self._values = module, origins.of[name]
        self._position = {name: position for position, name in enumerate(self.instructions)}
        self._last_use: dict[str, int] = {}
        for position, instruction in enumerate(self.instructions.values()):
            for operand in instruction.operands:
                self._last_use[self._memory(operand)] = position
        self._filled = self._loop_buffers()
        root = next(i for i in self.instructions.values() if i.is_root)
        returned = root.operands if root.opcode == "tuple" else (root.name,)
        self._results = set() if is_loop else {self._source(name) for name in returned}

    def origin(self, instruction: Instruction, index: int) -> Origin:
        value = self._values[instruction.name]
        return joined([value[index] if isinstance(value, tuple) else value])

    def filled_with(self, buffer: Instruction) -> Origin:
        """What loops write into it; something else where no loop takes it."""
        return self._filled.get(buffer.name, OTHER)

    def crosses_vmem(self, instruction: Instruction) -> bool:
        """It copies into VMEM, memory space 1, or from there."""
        if instruction.opcode not in _COPIES:
            return False
        source = self.instructions.get(instruction.operands[0])
        return "S(1)" in instruction.shape + (source.shape if source else "")

    def is_written_in_place(self, instruction: Instruction, index: int) -> bool:
        """A fusion whose result is one of its operands with a slice written over."""
        if instruction.opcode != "fusion":
            return False
        fused = {i.name: i for i in self._module.computations[instruction.called("calls")[0]]}
        result = next(i for i in fused.values() if i.is_root)
        if result.opcode == "tuple":
            result = fused[result.operands[index]]
        while result.opcode == "bitcast":
            result = fused[result.operands[0]]
        return result.opcode == "dynamic-update-slice"

    def is_result(self, instruction: Instruction, index: int) -> bool:
        return bool({(instruction.name, None), (instruction.name, index)} & self._results)

    def can_reuse_operand(self, instruction: Instruction, array: str) -> bool:
        """It may write over an operand of the same layout that nobody needs afterwards."""
        if self.is_loop or instruction.opcode in _COPIES:
            return False
        here = self._position[instruction.name]
        for operand in map(self.instructions.get, instruction.operands):
            if operand and operand.opcode != "parameter" and _outside_vmem(operand.shape) == _outside_vmem(array):
                spare = self._last_use[self._memory(operand.name)] <= here
                if spare:
                    return True
        return False

    def _memory(self, name: str) -> str:
        """Of which instruction a value has the memory; a copy in VMEM counts as what it is a copy of."""
        instruction = self.instructions.get(name)
        while instruction and (instruction.opcode in ("bitcast", "copy-start") or self.crosses_vmem(instruction)):
            name = instruction.operands[0]
            instruction = self.instructions.get(name)
        return name

    def _source(self, name: str) -> tuple[str, int | None]:
        """(instruction, element of its tuple) that makes a value."""
        name = self._memory(name)
        instruction = self.instructions[name]
        if instruction.opcode != "get-tuple-element":
            return name, None
        return instruction.operands[0], hlo.element_index(instruction)

    def _loop_buffers(self) -> dict[str, Origin]:
        """What a loop's state is made of in the end, by the instruction that it starts from."""
        filled: dict[str, Origin] = {}
        for loop in self.instructions.values():
            start = self.instructions.get(loop.operands[0]) if loop.opcode == "while" else None
            if start and start.opcode == "tuple":
                for name, value in zip(start.operands, self._values[loop.name], strict=True):
                    buffer = self._memory(name)
                    filled[buffer] = filled.get(buffer, Origin()) | joined([value])
        return filled


def scopes(module: hlo.Module, origins: Origins, name: str = "", is_loop: bool = False) -> Iterator[Scope]:
    """The entry and what it runs, each once."""
    yield Scope(module, name or module.entry, origins, is_loop)
    for instruction in module.computations[name or module.entry]:
        if instruction.opcode == "while":
            yield from scopes(module, origins, instruction.called("body")[0], True)
        elif instruction.opcode in ("call", "conditional"):
            for called in (*instruction.called("to_apply"), *instruction.branches()):
                yield from scopes(module, origins, called, is_loop)


def _outside_vmem(shape: str) -> str:
    return shape.replace("S(1)", "")
