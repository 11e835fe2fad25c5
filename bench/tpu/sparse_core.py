# SPDX-License-Identifier: Apache-2.0
"""Calls to SparseCores, as HLO prints them.

    %start = ((), (), s32[]) call-start(), async_execution_thread="sparsecore", to_apply=%called
    %update = ((bf16[8]), bf16[64]) call-update(%start, %operand)
    %done = bf16[64] call-done(%update)

What is called begins where its operands are given: at call-update, or at call-start where that has them. It sends what
`collectives.within` says of the same instruction, and moves what is said here.
"""

from bench.tpu import arrays, hlo


def begun(module: hlo.Module, computation: str, instruction: hlo.Instruction) -> str | None:
    """What a SparseCore runs from this instruction of `computation` on; None where it is given nothing to run."""
    start = instruction
    if instruction.opcode == "call-update":
        start = next(other for other in module.computations[computation] if other.name == instruction.operands[0])
    elif instruction.opcode != "call-start":
        return None
    given_here = bool(start.operands) == (start is instruction)
    return start.called("to_apply")[0] if given_here else None


def moved_bytes(module: hlo.Module, computation: str) -> int | None:
    """What a run of it reads from HBM and writes to it; None where it neither copies nor gathers nor scatters.

    A gather reads rows and writes them; a scatter reads its updates, and reads and writes the rows that they are added
    to. Their indices are left out.
    """
    inside = (_moved(module, instruction) for instruction in module.computations[computation])
    return sum(part for part in inside if part) or None


def _moved(module: hlo.Module, instruction: hlo.Instruction) -> int | None:
    opcode = instruction.opcode
    if opcode == "copy":
        return arrays.moved_bytes(opcode, instruction.shape)
    if opcode == "call-start":
        return moved_bytes(module, instruction.called("to_apply")[0])
    if opcode != "fusion":
        return None
    fused = {inner.name: inner for inner in module.computations[instruction.called("calls")[0]]}
    for inner in fused.values():
        if inner.opcode == "scatter":
            return 3 * arrays.all_bytes_of(fused[inner.operands[2]].shape)
    gathers = any(inner.opcode == "gather" for inner in fused.values())
    return 2 * arrays.all_bytes_of(instruction.shape) if gathers else None
