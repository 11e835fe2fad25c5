# SPDX-License-Identifier: Apache-2.0
"""What devices send each other in one run of a compiled program, counted in its optimised HLO.

Instructions in loops count as often as the loop runs, where its condition compares with a constant, as `lax.scan`
makes it; otherwise once, and `loops_of_unknown_length` says that there are such. Of branches, every one is counted.
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass, field

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%(?P<name>\S+) \(.*\{$")
_INSTRUCTION = re.compile(
    r"\s+(?P<root>ROOT )?%(?P<name>\S+) = (?P<result>.+?) (?P<op>[a-z][a-z0-9-]*)\((?P<operands>[^()]*)\)(?P<rest>.*)"
)
_ARRAY = re.compile(r"(?P<dtype>[a-z][a-z0-9]*)\[(?P<shape>[0-9,]*)\](?P<layout>\{[^{}]*\})?")
_NAME = re.compile(r"%([^\s,(){}]+)")
_CALLED = re.compile(r"(?:calls|body|true_computation|false_computation)=%([^\s,]+)|branch_computations=\{([^}]*)\}")
_BITS = re.compile(r"\d+")


@dataclass
class Kind:
    """count: instructions run. payload_bytes: of one device, what goes in or what comes out, whichever is more; an
    all-reduce of n devices sends about 2 (n - 1) / n times that over the links, the others (n - 1) / n times."""

    count: int = 0
    payload_bytes: int = 0


@dataclass
class Collectives:
    """loops_of_unknown_length: of those that hold collectives."""

    kinds: dict[str, Kind] = field(default_factory=lambda: defaultdict(Kind))
    loops_of_unknown_length: int = 0

    @property
    def count(self) -> int:
        return sum(kind.count for kind in self.kinds.values())


@dataclass(frozen=True)
class _Instruction:
    name: str
    op: str
    result: str
    operands: str
    rest: str
    is_root: bool


Program = dict[str, list[_Instruction]]


def collectives(hlo: str) -> Collectives:
    """hlo: `compiled.as_text()`.

    Raises:
      ValueError: the text has no ENTRY computation.
    """
    program, entry = _parse(hlo)
    found = Collectives()
    _count(program, entry, 1, found)
    return found


def _parse(hlo: str) -> tuple[Program, str]:
    """Each computation's instructions, and the name of the one that runs."""
    program: Program = {}
    entry, current = None, None
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            current = program.setdefault(header["name"], [])
            entry = header["name"] if header["entry"] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            parts = (found[part] for part in ("name", "op", "result", "operands", "rest"))
            current.append(_Instruction(*parts, is_root=bool(found["root"])))
    if entry is None:
        raise ValueError(
            f"collectives: no ENTRY computation in {len(hlo)} characters of HLO. Pass compiled.as_text(), the optimised"
            " program, not lowered.as_text()."
        )
    return program, entry


def _count(program: Program, name: str, times: int, found: Collectives) -> None:
    """Adds what `times` runs of the computation `name` send."""
    instructions = program[name]
    results = {instruction.name: instruction.result for instruction in instructions}
    # XLA:TPU writes a reduce-scatter as a fusion around an all-reduce, of which each device keeps its part.
    is_reduce_scatter = name.startswith("all-reduce-scatter")
    for instruction in instructions:
        kind = instruction.op.removesuffix("-start")
        if kind in KINDS:
            kind = "reduce-scatter" if is_reduce_scatter else kind
            found.kinds[kind].count += times
            found.kinds[kind].payload_bytes += times * _payload_bytes(instruction, results)
        length = _loop_length(program, instruction) if instruction.op == "while" else 1
        before = found.count
        for called, branches in _CALLED.findall(instruction.rest):
            for callee in [called] if called else _NAME.findall(branches):
                _count(program, callee, times * (length or 1), found)
        if length is None and found.count > before:
            found.loops_of_unknown_length += 1


def _loop_length(program: Program, loop: _Instruction) -> int | None:
    """How often a loop runs whose condition is "counter < constant"; jax counts from 0. None where it is another."""
    condition = re.search(r"condition=%([^\s,]+)", loop.rest)
    assert condition, f"a while without a condition: {loop}"
    instructions = {instruction.name: instruction for instruction in program[condition[1]]}
    root = next(instruction for instruction in instructions.values() if instruction.is_root)
    limit = instructions.get(_NAME.findall(root.operands)[-1]) if root.op == "compare" else None
    if limit is None or limit.op != "constant" or "direction=LT" not in root.rest:
        return None
    return int(limit.operands)


def _payload_bytes(instruction: _Instruction, results: dict[str, str]) -> int:
    goes_in = sum(_bytes(results[name]) for name in _NAME.findall(instruction.operands))
    comes_out = _bytes(instruction.result)
    if instruction.op.endswith("-start") and instruction.op != "all-reduce-start":
        comes_out -= goes_in  # the result of starting holds the operands too
    return max(goes_in, comes_out)


def _bytes(result: str) -> int:
    """Of all arrays in a type such as (bf16[8,64]{1,0:T(8,128)(2,1)}, f32[]), semaphores left out."""
    return sum(
        math.prod(int(size) for size in array["shape"].split(",") if size) * _bits(array["dtype"]) // 8
        for array in _ARRAY.finditer(result)
        if "S(2)" not in (array["layout"] or "")
    )


def _bits(dtype: str) -> int:
    """f8e4m3fn is 8 and bf16 16 bits wide; pred, which has no number, takes a byte."""
    width = _BITS.search(dtype)
    return int(width[0]) if width else 8
