# SPDX-License-Identifier: Apache-2.0
"""What a training step's temporaries are for, read off the names that JAX gave the operations that make them."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.tpu import arrays, hlo
from bench.tpu.buffers import Buffer, Layout, Value
from bench.tpu.hbm import CATEGORIES
from bench.tpu.record import LaidOut

GRADIENTS = "gradients"
KEPT = "kept for the backward pass"
WEIGHTS = "weights gathered or cast"
WORK = "one layer at work"
LOSS = "loss"
OPTIMIZER = "optimizer at work"
OTHER = "other"
GAPS = "gaps between them"
KINDS = (GRADIENTS, KEPT, WEIGHTS, WORK, LOSS, OPTIMIZER, OTHER, GAPS)

_BACKWARD = "transpose("
_STORES = "dynamic_update_slice"
_COPIES_IN_A_ROW = 4
_MAKES = {"fusion", "custom-call", "while", "convolution", "dot"}
_COPIES = {"all-gather", "all-gather-start", "all-gather-done", "convert", "copy", "copy-start", "copy-done", "bitcast"}
# Of JAX's paths what says how a thing is called and not what it is.
_NOISE = re.compile(
    r"jit\((train_step|dynamic_update_index_in_dim)\)|dynamic_update_slice|while|body|closed_call|eval_jaxpr|checkpoint"
    r"|rematted_computation|shard_map|pallas_call"
)


@dataclass(frozen=True)
class Held:
    """One temporary. shape: without its layout. kind: of `KINDS`. where: the scope that made it."""

    size: int
    shape: str
    kind: str
    where: str


def held(laid_out: LaidOut, axes: Sequence[int]) -> list[Held]:
    """The temporaries in use where most of the heap is, the largest first; what lies unused between them comes last.

    axes: sizes of the mesh's axes over which weights are split: gathered, a weight is that many times as long.
    """
    module, layout = laid_out
    makers = Makers(module)
    weights = weight_shapes(module, axes)
    begins = _backward_begins(layout, makers)
    _, buffers = layout.fullest()
    found = [_classified(buffer, makers, weights, begins) for buffer in buffers]
    gaps = layout.heap_bytes - sum(buffer.size for buffer in buffers)
    return [*found, Held(gaps, "", GAPS, "")]


def by_kind(temporaries: Iterable[Held]) -> dict[str, int]:
    """Bytes of each kind that there is, in the order of `KINDS`."""
    sizes: Counter[str] = Counter()
    for one in temporaries:
        sizes[one.kind] += one.size
    return {kind: sizes[kind] for kind in KINDS if sizes[kind]}


class Makers:
    """Which instruction made a value: what loops hand on is followed to the one that makes it inside."""

    def __init__(self, module: hlo.Module):
        self._module = module
        self._instructions = {i.name: i for block in module.computations.values() for i in block}
        self._loop_of: dict[str, hlo.Instruction] = {}  # parameter of a loop's body or condition -> the loop
        for loop in [i for i in self._instructions.values() if i.opcode == "while"]:
            for computation in loop.called("body", "condition"):
                parameters = (i.name for i in module.computations[computation] if i.opcode == "parameter")
                self._loop_of |= dict.fromkeys(parameters, loop)

    def of(self, value: str) -> hlo.Instruction | None:
        """value: as in `buffers.Value`, "while.103{1}"."""
        name, _, index = value.rstrip("}").partition("{")
        made = self._loop_of.get(name) or self._instructions.get(name)
        if made is None or made.opcode != "while" or not index.isdigit():
            return made
        body = self._module.computations[made.called("body")[0]]
        root = next((i for i in body if i.is_root), body[-1])
        inside = self._instructions.get(root.operands[int(index)]) if root.opcode == "tuple" else None
        if inside and inside.op_name.endswith(_STORES):  # of all layers, what one adds
            stored = (self._instructions[name] for name in inside.operands if name in self._instructions)
            inside = next((i for i in stored if i.opcode in _MAKES and not i.op_name.endswith(_STORES)), inside)
        return inside if inside and inside.op_name else made

    def path(self, value: str) -> str:
        """The names on the way to what made the value, or what that copies; "" where there are none."""
        made = self.of(value)
        for _ in range(_COPIES_IN_A_ROW):
            if made is None or made.op_name or not made.operands:
                break
            made = self._loop_of.get(made.operands[0]) or self._instructions.get(made.operands[0])
        return made.op_name if made else ""

    def scope(self, value: str) -> str:
        made = self.of(value)
        return self._module.scope(made) if made else "other"


def weight_shapes(module: hlo.Module, axes: Sequence[int]) -> set[tuple[int, ...]]:
    """Extents over 1, sorted, of each weight: this device's part and whole, of all layers and of one."""
    found: set[tuple[int, ...]] = set()
    grown = [1, *axes, math.prod(axes)]
    for parameter in module.computations[module.entry]:
        names = set(re.findall(r"\w+", parameter.op_name))
        if parameter.opcode != "parameter" or not names & {
            name for name, is_ in CATEGORIES.items() if is_ == "parameters"
        }:
            continue
        part = arrays.extents_of(parameter.shape)
        for factors in itertools.product(grown, repeat=len(part)):
            if math.prod(factors) in grown:
                whole = [extent * factor for extent, factor in zip(part, factors, strict=True)]
                found |= {_canonical(whole), _canonical(whole[1:])}
    return {shape for shape in found if len(shape) > 1}  # a vector is a norm's scale, and as long as much else


def _canonical(sizes: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(size for size in sizes if size > 1))


def _backward_begins(layout: Layout, makers: Makers) -> int:
    """The place in the schedule of the first thing that the backward pass makes."""
    starts = (
        value.start
        for buffer in layout.buffers
        for value in buffer.values
        if (made := makers.of(value.name)) and made.opcode in _MAKES and _BACKWARD in made.op_name
    )
    return min(starts, default=0)


def _classified(buffer: Buffer, makers: Makers, weights: set[tuple[int, ...]], begins: int) -> Held:
    value = next((value for value in buffer.values if makers.path(value.name)), buffer.values[0])
    kind = _kind(value, buffer, makers, weights, begins)
    return Held(buffer.size, value.shape.partition("{")[0], kind, where(makers.path(value.name), value.name))


def _kind(value: Value, buffer: Buffer, makers: Makers, weights: set[tuple[int, ...]], begins: int) -> str:
    path, scope, made = makers.path(value.name), makers.scope(value.name), makers.of(value.name)
    of_loss = scope == "cross_entropy" or "cross_entropy" in path
    if "/optimizer/" in path or scope == "optimizer":
        return OPTIMIZER
    found = arrays.printed_arrays(value.shape)  # none: an empty tuple, which programs for TPU7x have
    if found and _canonical(arrays.extents_of(found[0])) in weights:
        copied = made is not None and made.opcode in _COPIES
        return GRADIENTS if (_BACKWARD in path or of_loss or value.start >= begins) and not copied else WEIGHTS
    if of_loss:
        return LOSS
    if min(one.start for one in buffer.values) < begins <= max(one.end for one in buffer.values):
        return KEPT
    return WORK if re.search(r"layer|mlp|attention|norm", path) or scope.startswith(("model.", "attention")) else OTHER


def where(path: str, name: str) -> str:
    """ "jit(train_step)/transpose(jvp(stacked_layers))/while/body/mlp/mul" as "backward: stacked_layers/mlp/mul"."""
    parts = re.sub(r"transpose\(jvp\((.*?)\)\)|jvp\((.*?)\)", lambda match: match[1] or match[2] or "", path).split("/")
    kept = [part for part in parts if part and not _NOISE.fullmatch(part)]
    short = "/".join(dict.fromkeys(kept)) or name
    return f"backward: {short}" if _BACKWARD in path else short
