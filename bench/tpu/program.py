# SPDX-License-Identifier: Apache-2.0
"""The final program of a kernel, as libtpu prints it, parsed into bundles, scalar instructions and basic blocks.

A TPU core issues one bundle (a very long instruction word) per cycle. A line of `*-final_bundles.txt` reads

    0x16   : > { %45 = sbr.rel (%p192_p0) target = $region25  ;;  %s47_s8 = sld [smem:[#allocation10]] (!%p192_p0) }

address, one ">" per loop around it, and instructions between ";;". `%s47_s8` is value 47 of the compiler, held in
scalar register 8; `%p192_p0` is in predicate register 0. `(!%p…)` makes an instruction conditional. Comments mark where
regions begin, and branches name regions.

Only what the scalar unit does is parsed in full: vector instructions are scheduled statically and need no execution.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Register:
    """bank: "s" for scalars, "p" for predicates. number: of the physical register."""

    bank: str
    number: int


@dataclass(frozen=True, slots=True)
class Allocation:
    """The address of a named piece of VMEM, SMEM or of the semaphores."""

    name: str


# The terms of an operand are summed. No terms: no scalar (a vector register, a result's number).
Operand = tuple[Register | Allocation | int, ...]


@dataclass(frozen=True, slots=True)
class Guard:
    """The instruction takes effect only where `register` holds, or, `negated`, where it does not."""

    register: Register
    negated: bool


@dataclass(frozen=True, slots=True)
class Instruction:
    """opcode: as printed, or with what a comment adds: dma.hbm_to_vmem, shalt.BoundsCheck, sdivrem.kRem.

    operands: without the guard; of a division with the number of its result, by which it is popped. reads: every scalar
    and predicate register named, the guard's too.
    never: predicated off for good, "(0)". target: the region that a branch names, or its bundle, None for others.
    """

    opcode: str
    dest: Register | None
    operands: tuple[Operand, ...]
    guard: Guard | None
    reads: tuple[Register, ...]
    never: bool = False
    target_region: int | None = None
    target_address: int | None = None

    @property
    def is_branch(self) -> bool:
        return self.opcode.startswith("sbr")


@dataclass(frozen=True, slots=True)
class Bundle:
    """loop_depth: how many loops are around it."""

    instructions: tuple[Instruction, ...]
    loop_depth: int


@dataclass(frozen=True, slots=True)
class Block:
    """Bundles start ≤ address < stop, entered at start only and left at stop only.

    branch: address of the branch that leaves at stop, having issued its delay slots, or None; it may lie in a block
    before this one. target: position of the block that it goes to; the number of blocks means the end of the kernel.
    fill: cycles that the last bundle takes beyond its own: empty, it stands for so many more delay slots.
    """

    start: int
    stop: int
    branch: int | None
    target: int | None
    fill: int = 0


@dataclass(frozen=True)
class Program:
    """bundles: by address. regions: number of a region -> address where it begins. ends: address -> regions that end
    there.

    A region without a marker of its own is empty: it lies behind the end of the one numbered before it, whose body a
    branch to it skips. That may be the end of the program.
    """

    bundles: tuple[Bundle, ...]
    regions: dict[int, int]
    ends: dict[int, list[int]]


_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2}[ ,]*)*:\s*((?:>\s*)*)\{", re.M)
_COMMENT = re.compile(r"/\*.*?\*/", re.S)
# What only a comment tells: the direction of a general DMA, what a halt checks, what a division is asked for.
_NOTE = re.compile(r"/\* (\w+-to-\w+) \*/|/\* (BoundsCheck|scheckeq|kRem)\b")
_REGION_START = re.compile(r"Start(?:/End empty)? region (\d+)")
_REGION_END = re.compile(r"End region (\d+)")
_RESULT = re.compile(r"^(?:%(\w+) = )?(\S+)\s*(.*)$", re.S)
_GUARD = re.compile(r"\((!?)(%p\d+_p\d+)(?:, %\w+)?\)")
_REGISTER = re.compile(r"%?([sp])\d+_[sp](\d+)")
_TERM = re.compile(r"%?\b([sp])\d+_[sp](\d+)\b|#(\w+)|\$0x([0-9a-f]+)|(?<![\w$])(-?\d+)\b")
_PARAMETER = re.compile(r"index: (\d+), kind:")
_REGION = re.compile(r"target = \$region(\d+)")
_ADDRESS = re.compile(r"bundleno = (\d+)")


def parse(text: str) -> Program:
    """The program in `text`, the contents of a `*-final_bundles.txt`.

    Raises ValueError where bundles are missing or none is found.
    """
    heads = list(_BUNDLE.finditer(text))
    if not heads:
        raise ValueError("no bundle found: expected lines such as '0x16   : > { %45 = sbr.rel … }'.")
    bundles: list[Bundle] = []
    starts: dict[int, int] = {}
    behind: dict[int, int] = {}
    ends: dict[int, list[int]] = {}
    for address, head in enumerate(heads):
        if int(head[1], 16) != address:
            raise ValueError(f"bundle {address:#x} is missing: {head[1]} is printed in its place.")
        stop = heads[address + 1].start() if address + 1 < len(heads) else len(text)
        body = text[head.end() : stop]
        starts |= {int(region): address for region in _REGION_START.findall(body)}
        ends[address] = [int(region) for region in _REGION_END.findall(body)]
        behind |= {region + 1: address + 1 for region in ends[address]}
        bundles.append(Bundle(tuple(_instructions(body)), head[2].count(">")))
    return Program(tuple(bundles), behind | starts, ends)


def _instructions(body: str) -> Iterable[Instruction]:
    """`body`: what follows the opening brace of a bundle, to the next bundle."""
    body = _COMMENT.sub(_note, body)
    body = body[: body.rfind("}")]
    for text in body.split(";;"):
        if text.strip():
            yield _instruction(text.strip())


def _note(comment: re.Match[str]) -> str:
    """The comment's note, after the "@" by which `_instruction` finds it, or nothing."""
    found = _NOTE.match(comment[0])
    return f"@{(found[1] or found[2]).replace('-', '_')}" if found else ""


def _instruction(text: str) -> Instruction:
    match = _RESULT.match(text)
    assert match is not None
    result, opcode, arguments = match.groups()
    arguments, _, note = arguments.partition("@")
    if note.strip():
        opcode = f"{opcode.split('.')[0]}.{note.strip()}"
    # A phi names one physical register throughout: nothing moves, and nothing is waited for.
    reads = () if opcode == "sphi" else tuple(Register(b, int(n)) for b, n in _REGISTER.findall(arguments))
    guard = None
    if found := _GUARD.search(arguments):
        guard = Guard(_register(found[2]), negated=bool(found[1]))
        arguments = arguments[: found.start()] + arguments[found.end() :]
    arguments = arguments.replace("[thread:$0]", "").strip(" ,\n")
    region, address = _REGION.search(arguments), _ADDRESS.search(arguments)
    operands = _operands(opcode, arguments)
    if opcode.startswith("sdivrem") and result:
        operands += ((int(result),),)
    return Instruction(
        opcode=opcode,
        dest=_register(result) if result and _REGISTER.fullmatch(result) else None,
        operands=operands,
        guard=guard,
        reads=reads,
        never=arguments.startswith("(0)"),
        target_region=int(region[1]) if region else None,
        target_address=int(address[1]) if address else None,
    )


def _register(text: str) -> Register:
    match = _REGISTER.fullmatch(text)
    assert match is not None, text
    return Register(match[1], int(match[2]))


def _operands(opcode: str, arguments: str) -> tuple[Operand, ...]:
    if opcode.startswith("v"):
        return ()
    if opcode.startswith("inlined_call_operand"):
        index = _PARAMETER.search(arguments)
        return ((int(index[1]),),) if index else ()
    arguments = re.sub(r"\[resolvable:[^\]]*\]\s*", "", arguments)
    if opcode == "sst":  # sst [smem:[address]] value: no comma between the two
        address, _, value = arguments.rpartition("]] ") if "]] " in arguments else arguments.rpartition("] ")
        return _operand(address), _operand(value)
    # An allocation after an address only says what the address points into.
    arguments = re.sub(r"(%[sp]\d+_[sp]\d+|\d+) \[#\w+\]", r"\1", arguments)
    return tuple(_operand(part) for part in re.split(r",(?![^\[]*\])", arguments)) if arguments else ()


def _operand(text: str) -> Operand:
    return tuple(_term(match) for match in _TERM.finditer(text.replace("smem:", "")))


def _term(match: re.Match[str]) -> Register | Allocation | int:
    bank, number, allocation, hexadecimal, decimal = match.groups()
    if bank:
        return Register(bank, int(number))
    if allocation:
        return Allocation(allocation)
    if hexadecimal:
        return int(hexadecimal, 16)
    value = int(decimal)
    return value - 2**32 if value >= 2**31 else value  # printed unsigned, meant as two's complement


def basic_blocks(program: Program, branch_delay_slots: int, filled: bool = False) -> list[Block]:
    """The program cut where branches arrive and where, `branch_delay_slots` bundles after a branch, they leave.

    filled: an empty bundle may stand for all the slots that are left.
    """
    end = len(program.bundles)
    branches = {
        address: _target(program, address, instruction)
        for address, bundle in enumerate(program.bundles)
        for instruction in bundle.instructions
        if instruction.is_branch
    }
    leaving: dict[int, tuple[int, int]] = {}  # stop -> branch, fill
    for address in sorted(branches, reverse=True):
        whole = address + branch_delay_slots
        last = _last_slot(program, address, branch_delay_slots) if filled else whole
        stop, fill = last + 1, whole - last
        while stop in leaving:  # branches share the bundle that fills their slots: the earlier ones leave before it
            stop, fill = stop - 1, 0
        leaving[stop] = address, fill
    starts = sorted(start for start in {0, *branches.values(), *leaving} if start < end)
    index = {start: position for position, start in enumerate(starts)} | {end: len(starts)}
    return [
        Block(start, stop, branch, target=None if branch is None else index[branches[branch]], fill=fill)
        for start, stop in zip(starts, [*starts[1:], end], strict=True)
        for branch, fill in [leaving.get(stop, (None, 0))]
    ]


def _last_slot(program: Program, branch: int, slots: int) -> int:
    """Of the bundles that still issue after the branch: the first that is empty, alone, and behind which no region ends
    that the branch is in; an empty bundle before that waits for a register."""
    last = min(branch + slots, len(program.bundles) - 1)
    empty = [not bundle.instructions for bundle in program.bundles[branch : last + 2]] + [False]
    around = [
        address
        for address in range(branch + 1, last + 1)
        for region in program.ends[address]
        if program.regions.get(region, 0) <= branch
    ]
    for address in range(max(around, default=branch + 1), last):
        before, here, after = empty[address - branch - 1 : address - branch + 2]
        if here and not before and not after:
            return address
    return branch + slots


def _target(program: Program, address: int, branch: Instruction) -> int:
    if branch.target_region in program.regions:
        return program.regions[branch.target_region]
    if branch.target_address is not None:
        return branch.target_address
    raise ValueError(f"the branch at {address:#x} goes to region {branch.target_region}, which the program lacks.")
