# SPDX-License-Identifier: Apache-2.0
"""Copies of whole stacks of layers in a compiled step: of parameters, or of gradients beyond the one buffer each needs.

    python -m bench.tpu.stack_copies array_stacked v5p:2x2x1

exits with 1 where there is one. A scan needs none: it reads a layer's parameters where they lie, and writes a layer's
gradient into the one buffer that all layers share.
"""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax

from bench.tpu import arrays, hlo, step
from bench.tpu.hlo import Instruction
from bench.tpu.origins import Origins, Scope, scopes
from bench.tpu.topology import Topology, tpu_topology
from grug_kernels.stacked import ArrayStacked
from train.run import VARIANTS

# They name memory that is there already. An asynchronous operation counts where it ends.
_NAMES_ONLY = {
    *("parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "optimization-barrier"),
    *("dynamic-update-slice", "copy-start", "async-start", "async-update", "all-gather-start", "all-reduce-start"),
}

_CAST = "The stack is cast outside the scan: cast one layer, in the body. XLA does the same to what is only ever cast."
_GATHERED = "All layers are gathered before the scan: gather one layer, in the body."
_LAID_OUT = "The stack is laid out anew in front of the scan: use a layer's parameters in the order they are kept in."
_DERIVED = "Parameters of all layers go through an operation outside the scan: apply it to one layer, in the body."
_KEPT = (
    "The scan keeps something made of each layer's parameters alone (a cast, or a layer that the body takes out of"
    " the stack itself) for its backward pass: pass the stack as the scan's xs, and have the body make it again."
)
_CARRIED = "The stack is in the scan's carry, or summed up in it: each round writes all layers. Pass it as xs."
_SECOND_GRADIENT = (
    "There is one more buffer like it than there are parameters: a gradient is summed from two places, as where the"
    " body takes its layer out of a stack that it closes over. Use the stack in one scan, as its xs."
)
_WHOLE_GRADIENT = "Every device holds all of this gradient: sum it onto the shards in the body, a layer at a time."
_UPDATE = "Neither gradient nor result: a part of the optimizer that does not fuse, or a gradient laid out anew."


@dataclass(frozen=True)
class StackedLeaf:
    """A parameter of all layers. name: its path from the step's arguments, "state.params.blocks.stacked.mlp.w_up".
    shape: [num_layers, ...]. shard: what one device has of it."""

    name: str
    shape: tuple[int, ...]
    shard: tuple[int, ...]


@dataclass(frozen=True)
class Finding:
    """An array of (at least) all layers of `leaf`. shape: as printed, with its layout. size_bytes: of one device, tiles
    padded. op_name: the path of JAX's names, "" for what XLA put in itself. cause: what it usually is."""

    leaf: str
    instruction: str
    opcode: str
    shape: str
    size_bytes: int
    op_name: str
    cause: str

    def __str__(self) -> str:
        of = f" ({self.op_name})" if self.op_name else ""
        return (
            f"{self.size_bytes / 2**20:.2f} MiB: {self.shape} {self.opcode} %{self.instruction}{of}\n"
            f"  all layers of {self.leaf}. {self.cause}"
        )


def stacked_leaves(root: str, tree: Any) -> list[StackedLeaf]:
    """Of every `ArrayStacked` in `tree`, arrays or shapes with shardings. root: what the step calls `tree`."""

    def is_stack(node: Any) -> bool:
        return isinstance(node, ArrayStacked)

    found = []
    for path, stack in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_stack):
        for rest, leaf in jax.tree_util.tree_leaves_with_path(stack) if is_stack(stack) else ():
            name = root + jax.tree_util.keystr((*path, *rest))
            found.append(StackedLeaf(name, leaf.shape, leaf.sharding.shard_shape(leaf.shape)))
    return found


def stack_copies(module: hlo.Module, leaves: list[StackedLeaf]) -> list[Finding]:
    """Largest first. Empty: all layers of a parameter are only where the arguments have them, and all layers of its
    gradient in one buffer that the loop writes layer by layer.

    Where an array comes from is followed through the program, so what is made of parameters alone is found in any
    dtype and order of axes. Of what is made of other things too, that is a gradient (or an update) which has the
    extents of a parameter in any order. Activations of those extents look the same: choose batch and seq_len unlike
    the sizes of parameters. Copies into VMEM and back are not counted.

    Raises:
      ValueError: a leaf is no argument of the program.
    """
    linter = _Linter(module, leaves)
    return sorted(linter.findings(), key=lambda finding: -finding.size_bytes)


class _Linter:
    def __init__(self, module: hlo.Module, leaves: list[StackedLeaf]):
        self.leaves = leaves
        self.origins = Origins(module, [leaf.name for leaf in leaves])
        self.scopes = list(scopes(module, self.origins))
        # One gradient of each parameter; parameters of the same extents share the allowance.
        self.gradients_left = Counter(_unordered(leaf.shard) for leaf in leaves)

    def findings(self) -> Iterator[Finding]:
        for scope in self.scopes:
            for instruction in scope.instructions.values():
                if instruction.opcode in _NAMES_ONLY or scope.crosses_vmem(instruction):
                    continue
                for index, array in enumerate(arrays.printed_arrays(instruction.shape)):
                    if not scope.is_written_in_place(instruction, index) and (
                        verdict := self._verdict(scope, instruction, index, array)
                    ):
                        leaf, cause = verdict
                        size, name = arrays.padded_bytes_of(array), instruction.name
                        yield Finding(leaf.name, name, instruction.opcode, array, size, instruction.op_name, cause)

    def _verdict(
        self, scope: Scope, instruction: Instruction, index: int, array: str
    ) -> tuple[StackedLeaf, str] | None:
        """(whose layers it has, why), or None where it is no copy of a stack."""
        if scope.is_result(instruction, index):
            return None
        extents, origin = arrays.extents_of(array), scope.origin(instruction, index)
        if origin.whole and not origin.other:
            leaf = self._covered(origin.whole, extents)
            return leaf and (leaf, _cause_of_copy(instruction))
        if not origin:  # a buffer that a loop fills
            filled = scope.filled_with(instruction)
            if filled.followed and not filled.other:
                leaf = self._covered(filled.followed, extents)
                return (leaf, _KEPT) if leaf and leaf.shape[0] in extents else None
            return self._gradient(extents)
        leaf = self._like(extents)
        if not leaf or scope.can_reuse_operand(instruction, array):
            return None
        return leaf, _CARRIED if scope.is_loop else _UPDATE

    def _gradient(self, extents: tuple[int, ...]) -> tuple[StackedLeaf, str] | None:
        leaf, key = self._like(extents), _unordered(extents)
        if leaf is None:
            return None
        if key not in self.gradients_left:
            return leaf, _WHOLE_GRADIENT
        self.gradients_left[key] -= 1
        return (leaf, _SECOND_GRADIENT) if self.gradients_left[key] < 0 else None

    def _covered(self, followed: frozenset[int], extents: tuple[int, ...]) -> StackedLeaf | None:
        """The largest of these leaves whose shard is not larger than the array."""
        smaller = [leaf for leaf in map(self.leaves.__getitem__, followed) if _size(leaf.shard) <= _size(extents)]
        return max(smaller, key=lambda leaf: (_size(leaf.shard), leaf.name), default=None)

    def _like(self, extents: tuple[int, ...]) -> StackedLeaf | None:
        """The first leaf with these extents on one device or on all together, in any order."""
        key = _unordered(extents)
        return next((leaf for leaf in self.leaves if key in (_unordered(leaf.shard), _unordered(leaf.shape))), None)


def _cause_of_copy(instruction: Instruction) -> str:
    what = f"{instruction.opcode} {instruction.name}"
    if "all-gather" in what:
        return _GATHERED
    if "convert" in what:
        return _CAST
    return _LAID_OUT if instruction.opcode in ("copy", "copy-done", "transpose") else _DERIVED


def _unordered(extents: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(extent for extent in extents if extent != 1))


def _size(extents: tuple[int, ...]) -> int:
    return math.prod(extents)


def of_step(variant: str, config: Any, topology: Topology) -> list[Finding]:
    """Of the variant's step, compiled for `topology`; see `step.step_record`.

    Raises:
      ValueError: the variant has no stack, or was refused.
    """
    mesh = step.mesh_of(config.trainer, topology)
    with topology.targeted(mesh):
        leaves = stacked_leaves("state.params", step.abstract_state(variant, config, mesh).params)
    if not leaves:
        raise ValueError(f"stack_copies: {variant} has no ArrayStacked among its parameters; try array_stacked.")
    with step.compiling_step(variant, config, topology, levanter=False, schedules=False) as (record, program):
        if program is None:
            raise ValueError(f"stack_copies: {variant} does not compile for {topology.name}: {record.refusal}")
        return stack_copies(program.module, leaves)


def main() -> None:
    parser = argparse.ArgumentParser(description="Find copies of whole stacks in the 130M template's training step.")
    parser.add_argument("variant", choices=sorted(file.parent.name for file in VARIANTS.glob("*/launch.py")))
    parser.add_argument("topology", help="such as v6e or v5p:4x4x4")
    parser.add_argument("--num-layers", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--remat", default="full")
    options = parser.parse_args()
    config = step.template(
        options.variant,
        model={"num_layers": options.num_layers, "remat": options.remat},
        trainer={"batch_size": options.batch_size, "seq_len": options.seq_len},
    )
    try:
        findings = of_step(options.variant, config, tpu_topology(options.topology))
    except (ValueError, ModuleNotFoundError) as error:
        parser.error(str(error))
    print(*findings or ["no copies of whole stacks"], sep="\n")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
