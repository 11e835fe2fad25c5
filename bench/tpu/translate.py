# SPDX-License-Identifier: Apache-2.0
"""Scalar instructions of a bundle, written as Python: what `scalar.py` compiles, one function per basic block.

In the generated code S and P are the scalar and predicate registers, `memory` is scalar memory by word, M a `Machine`.
Scalars are Python integers that stand for int32; addresses of operands are larger (POINTER), so that an access can be
told from a number. Adding does not wrap: no program has been seen whose sums of int32 overflow.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from bench.tpu.program import Allocation, Block, Instruction, Operand, Program, Register

# Cycles from issue until another instruction may use the result; 1 for those not named. Found by comparing counts with
# libtpu's own simulator, which they match to 1 %.
PREDICATE_LATENCY, LOAD_LATENCY, MULTIPLY_LATENCY, POP_LATENCY = 2, 4, 4, 2

POINTER = 1 << 60  # + operand index << 40 + granules
_OPERAND_SHIFT = 40
_ALLOCATION_STRIDE = 1 << 20

HELPERS = f"""
def wrap(x):
    return ((x + 0x80000000) & 0xffffffff) - 0x80000000

def shift_left(x, n):
    return x << n if x >= {POINTER} else wrap(x << n)

def unsigned(x):
    return x & 0xffffffff
"""

_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}

# {0}, {1}, {2}: operands. By opcode without its type.
_EXPRESSIONS = {
    "smov": "{0}",
    "sadd": "{0} + {1}",
    "scalar_lea": "{0} + {1}",
    "ssub": "{0} - {1}",
    "smul": "wrap({0} * {1})",
    "smulhi.u32": "wrap(unsigned({0}) * unsigned({1}) >> 32)",
    "sand": "{0} & {1}",
    "sor": "{0} | {1}",
    "sxor": "{0} ^ {1}",
    "sshll": "shift_left({0}, {1})",
    "sshllo.u32": "wrap(shift_left({0}, {1}) | shift_left(1, {1}) - 1)",  # ones move in
    "sshra": "{0} >> {1}",
    "sshrl": "unsigned({0}) >> {1}",
    "smax": "max({0}, {1})",
    "smin": "min({0}, {1})",
    "smax.u32": "wrap(max(unsigned({0}), unsigned({1})))",
    "smin.u32": "wrap(min(unsigned({0}), unsigned({1})))",
    "scalar_select": "{1} if {0} else {2}",
    "pmov": "bool({0})",
    "pneg": "not {0}",
    "pand": "{0} and {1}",
    "por": "{0} or {1}",
    "pxor": "{0} != {1}",
    "pnand": "not ({0} and {1})",
    "pnor": "not ({0} or {1})",
}

_DIRECTIONS = {
    f"{source}_to_{destination}" for source in ("hbm", "vmem", "smem") for destination in ("hbm", "vmem", "smem")
}


def operand_of_pointer(pointer: int) -> tuple[int, int] | None:
    """(index of the kernel's operand, granules into it), or None for what does not point into an operand."""
    if pointer < POINTER:
        return None
    if pointer >= POINTER << 4:  # int_to_ptr takes addresses shifted left by four
        pointer >>= 4
    return (pointer - POINTER) >> _OPERAND_SHIFT, pointer & ((1 << _OPERAND_SHIFT) - 1)


@dataclass(frozen=True)
class _Set:
    dest: Register
    expression: str
    latency: int


@dataclass(frozen=True)
class _Do:
    """timed: looks at the clock, or moves it."""

    statement: str
    timed: bool = False


class Translator:
    """Translates the blocks of one program: the addresses of its allocations are shared between them.

    unknown: scalar instructions that are not understood, and whose results are taken as 0, by opcode.
    spaces: memory that each operand of the kernel is in, by index: "hbm", "vmem", …
    """

    def __init__(self):
        self.unknown: Counter[str] = Counter()
        self.spaces: dict[int, str] = {}
        self._allocations: dict[str, int] = {}

    def block(self, program: Program, block: Block, position: int, matrix_stalls: Mapping[int, int]) -> tuple[str, int]:
        """Source of the function `block_<position>`, which returns the position of the next block; interlock cycles.

        The function moves the clock by the block's static cycles, in pieces where a DMA wants to know the time.
        """
        lines: list[str] = []
        ready: dict[Register, int] = {}
        cycle = told = interlock = 0
        for address in range(block.start, block.stop):
            instructions = program.bundles[address].instructions
            needed = max((ready.get(r, 0) for instruction in instructions for r in instruction.reads), default=0)
            interlock += max(0, needed - cycle)
            cycle = max(cycle, needed) + matrix_stalls.get(address, 0)
            sets, effects = self._bundle(instructions, address)
            for _, assignment in sets:
                ready[assignment.dest] = cycle + assignment.latency
            if any(effect.timed for _, effect in effects):
                lines.append(f"M.cycle += {cycle - told}")
                told = cycle
            lines += _statements(sets, effects)
            cycle += 1
        interlock, cycle = interlock + block.fill, cycle + block.fill
        lines.append(f"M.cycle += {cycle - told}")
        if block.branch is not None:
            lines += [f"if M.pending == {block.branch}:", "    M.pending = -1", f"    return {block.target}"]
        lines.append(f"return {position + 1}")
        head = f"def block_{position}(S, P, M):"
        return "\n    ".join([head, "memory = M.memory", *lines]) + "\n", interlock

    def _bundle(self, instructions: Iterable[Instruction], address: int):
        """What the bundle assigns and what else it does, each with its guard as an expression or None."""
        sets: list[tuple[str | None, _Set]] = []
        effects: list[tuple[str | None, _Do]] = []
        for instruction in instructions:
            guard = None
            if instruction.guard:
                guard = ("not " if instruction.guard.negated else "") + _register(instruction.guard.register)
            match self._instruction(instruction, address):
                case _Set() as assignment:
                    sets.append((guard, assignment))
                case _Do() as effect:
                    effects.append((guard, effect))
        return sets, effects

    def _instruction(self, instruction: Instruction, address: int) -> _Set | _Do | None:
        opcode = instruction.opcode
        if instruction.never or opcode == "sphi" or opcode.startswith("v") or _renames(instruction):
            return None
        if instruction.is_branch:
            # A branch in the delay slots of a taken one does nothing: it belongs to the path not taken.
            return _Do(f"M.pending = {address} if M.pending < 0 else M.pending")
        if opcode == "shalt.scheckeq":
            # The two cores of a chip compare a constant that went through the vector unit. They agree: one popped
            # scalar less that matters.
            self.unknown["spop"] -= 1
            return None
        if opcode == "shalt.BoundsCheck":
            return _Do(f"M.fail_check({address})")
        values = [self._value(operand) for operand in instruction.operands]
        if opcode.startswith("dma.done.wait"):
            return _Do(f"M.wait({values[0]}, {values[1]})", timed=True)
        if opcode.startswith("dma."):
            return self._dma(opcode, values)
        if opcode == "sdivrem.kRem":
            return _Do(f"M.remainders[{values[2]}] = unsigned({values[0]}) % ({values[1]})")
        if opcode.startswith("sdivrem"):
            self.unknown[opcode] += 1
            return None
        if opcode == "sst":
            return _Do(f"memory[{values[0]}] = {values[1]}")
        if instruction.dest is None:
            return None
        return _Set(instruction.dest, self._expression(instruction, values), _latency(instruction))

    def _dma(self, opcode: str, values: list[str]) -> _Do:
        direction = opcode.removeprefix("dma.")
        if direction not in {*_DIRECTIONS, "general"} or len(values) < 4:
            self.unknown[opcode] += 1
            return _Do("pass")
        source, granules, destination, semaphore = values[:4]
        return _Do(f"M.start_dma({direction!r}, {source}, {granules}, {destination}, {semaphore})", timed=True)

    def _expression(self, instruction: Instruction, values: list[str]) -> str:
        opcode, base = instruction.opcode, instruction.opcode.split(".")[0]
        if opcode == "sld":
            return f"memory.get({values[0]}, 0)"
        if opcode == "spop.drf":
            return f"M.remainders.get({values[0]}, 0)"  # a division that was not done has a result that nobody reads
        if opcode == "reloc" or base == "int_to_ptr":
            return values[0]
        if base == "inlined_call_operand":
            # One without memory is a number, and arrives in the register itself.
            index = int(values[0])
            if opcode.endswith("<no"):
                return f"M.scalar_operand({index})"
            self.spaces[index] = opcode.split(".")[1]
            return str(POINTER + (index << _OPERAND_SHIFT))
        is_float = ".f32" in opcode or ".bf16" in opcode
        if base == "scmp" and not is_float:
            _, comparison, kind = opcode.split(".")[:3]
            left, right = (f"unsigned({v})" if kind.startswith("u") else f"({v})" for v in values)
            return f"{left} {_COMPARISONS[comparison]} {right}"
        template = _EXPRESSIONS.get(".".join(opcode.split(".")[:2])) or _EXPRESSIONS.get(base)
        if template is None or is_float or "" in values:
            self.unknown[opcode] += 1
            return "0"
        return template.format(*(f"({value})" for value in values))

    def _value(self, operand: Operand) -> str:
        """Empty for what is no scalar."""
        return " + ".join(self._term(term) for term in operand)

    def _term(self, term: Register | Allocation | int) -> str:
        match term:
            case Register():
                return _register(term)
            case Allocation(name):
                next_address = (len(self._allocations) + 1) * _ALLOCATION_STRIDE
                return str(self._allocations.setdefault(name, next_address))
            case _:
                return str(term)


def _renames(instruction: Instruction) -> bool:
    """A change of type, from a register to itself; its operand may be computed in the very same bundle."""
    return instruction.opcode.startswith("int_to_ptr") and instruction.operands == ((instruction.dest,),)


def _register(register: Register) -> str:
    return f"{register.bank.upper()}[{register.number}]"


def _latency(instruction: Instruction) -> int:
    base = instruction.opcode.split(".")[0]
    if instruction.dest is not None and instruction.dest.bank == "p":
        return PREDICATE_LATENCY
    return {"sld": LOAD_LATENCY, "smul": MULTIPLY_LATENCY, "spop": POP_LATENCY}.get(base, 1)


def _statements(sets: list[tuple[str | None, _Set]], effects: list[tuple[str | None, _Do]]) -> list[str]:
    """All instructions of a bundle read the state before it: first read, then act, then write."""
    reads, writes = [], []
    for number, (guard, assignment) in enumerate(sets):
        dest = _register(assignment.dest)
        expression = assignment.expression if guard is None else f"({assignment.expression}) if {guard} else {dest}"
        if len(sets) + len(effects) == 1:
            return [f"{dest} = {expression}"]
        reads.append(f"x{number} = {expression}")
        writes.append(f"{dest} = x{number}")
    acts = [effect.statement if guard is None else f"if {guard}: {effect.statement}" for guard, effect in effects]
    return reads + acts + writes
