# SPDX-License-Identifier: Apache-2.0
"""What devices send each other in one run of a compiled program: counts, bytes, and seconds at published bandwidth.

Instructions in loops count as often as the loop runs, where that is known; otherwise once, and
`loops_of_unknown_length` says that there are such. Of branches, every one is counted.
"""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from bench.tpu import arrays, hlo, sparse_core
from bench.tpu.topology import Topology

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclass
class Kind:
    """count: instructions run. payload_bytes: of one device, what goes in or what comes out, whichever is more."""

    count: float = 0
    payload_bytes: float = 0


@dataclass
class Collectives:
    """loops_of_unknown_length: of those that hold collectives."""

    kinds: dict[str, Kind] = field(default_factory=lambda: defaultdict(Kind))
    loops_of_unknown_length: int = 0

    @property
    def count(self) -> float:
        return sum(kind.count for kind in self.kinds.values())


@dataclass(frozen=True)
class Collective:
    """members: positions in the device assignment of one group, () for all devices or where pairs are listed."""

    kind: str
    payload_bytes: int
    members: tuple[int, ...]


def collectives(module: hlo.Module) -> Collectives:
    found = Collectives()
    _count(module, module.entry, 1, found)
    return found


def _count(module: hlo.Module, computation: str, times: float, found: Collectives) -> None:
    """Adds what `times` runs of the computation send."""
    for instruction in module.computations[computation]:
        if collective := collective_of(module, computation, instruction):
            found.kinds[collective.kind].count += times
            found.kinds[collective.kind].payload_bytes += times * collective.payload_bytes
        length = module.trips_of(instruction) if instruction.opcode == "while" else 1
        before = found.count
        applied = instruction.called("to_apply") if instruction.opcode in ("call", "call-start") else []
        for callee in (*instruction.called("calls", "body"), *applied, *instruction.branches()):
            _count(module, callee, times * (1 if length is None else length), found)
        if length is None and found.count > before:
            found.loops_of_unknown_length += 1


def collective_of(module: hlo.Module, computation: str, instruction: hlo.Instruction) -> Collective | None:
    """What the instruction itself sends, done where it starts; None where it sends nothing."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    # XLA:TPU writes a reduce-scatter as a fusion around an all-reduce, of which each device keeps its part.
    if computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    shapes = {other.name: other.shape for other in module.computations[computation]}
    goes_in = sum(arrays.all_bytes_of(shapes[name]) for name in instruction.operands)
    comes_out = arrays.all_bytes_of(instruction.shape)
    if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start":
        comes_out -= goes_in  # the result of starting holds the operands too
    return Collective(kind, max(goes_in, comes_out), _first_group(instruction.rest))


def within(module: hlo.Module, computation: str, instruction: hlo.Instruction) -> list[Collective]:
    """What the instruction sends itself or in what it calls: a fusion, an asynchronous start, a SparseCore."""
    own = collective_of(module, computation, instruction)
    on_sparse_core = sparse_core.begun(module, computation, instruction)
    called = [
        collective
        for callee in (*instruction.called("calls"), *([on_sparse_core] if on_sparse_core else []))
        for inner in module.computations[callee]
        for collective in within(module, callee, inner)
    ]
    return ([own] if own else []) + called


def _first_group(rest: str) -> tuple[int, ...]:
    """Of replica_groups={{0,1},{2,3}}, =[2,2]<=[4] (perhaps transposed) or =mesh['a'=2,'b'=2] {'b'}."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return tuple(int(number) for number in listed[1].split(","))
    if tiled := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        groups, sizes, order = ([int(n) for n in part.split(",")] if part else [] for part in tiled.groups())
        numbers = np.arange(math.prod(sizes)).reshape(sizes)
        return tuple(numbers.transpose(order or None).reshape(groups)[0].tolist())
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        within_axes = re.findall(r"'([^']+)'", named[2])
        numbers = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        first = tuple(slice(None) if name in within_axes else 0 for name in sizes)
        return tuple(numbers[first].ravel().tolist())
    return ()


def seconds(collective: Collective, topology: Topology, devices: Sequence[int]) -> float:
    """At published bandwidth over the links that the group spans; see `links`. A bound from below: no latency.

    Of n devices and B bytes, a ring sends (n - 1) / n B, an all-reduce twice that, a permutation B to one neighbour.
    An all-to-all is counted like an all-gather, which is more than it takes.

    devices: ids in the order of the assignment, as `dump.Lowered.devices`.
    """
    total = topology.chip.ici_bytes_per_second
    assert total is not None, f"{topology.chip.name} has no interconnect"
    link_bytes_per_second = total / topology.links_per_chip
    if collective.kind == "collective-permute":
        return collective.payload_bytes / link_bytes_per_second
    members = collective.members or tuple(range(len(devices)))
    if len(members) < 2:
        return 0.0
    share = (len(members) - 1) / len(members) * (2 if collective.kind == "all-reduce" else 1)
    return share * collective.payload_bytes / link_bytes_per_second / links(members, topology, devices)


def links(members: Sequence[int], topology: Topology, devices: Sequence[int]) -> int:
    """Links out of a chip that a group can use at once: along each axis of the chips that it spans one, or two where
    that axis closes into a ring. Of a group within one chip (two devices of a TPU7x), one."""
    by_id = {device.id: device.coords for device in topology.devices}
    spans = [len(set(axis)) for axis in zip(*(by_id[devices[member]] for member in members), strict=True)]
    return max(1, sum(1 + closes for size, closes in zip(spans, rings(topology, spans), strict=True) if size > 1))


def rings(topology: Topology, spans: Sequence[int]) -> list[bool]:
    """Axes along which `spans` chips close into a ring: whole axes of multiples of 4 chips in three dimensions, of 16
    in two (docs.cloud.google.com/tpu/docs: v4 and v5p cubes, v6e pods)."""
    sizes = [len(set(axis)) for axis in zip(*(device.coords for device in topology.devices), strict=True)]
    multiple = 4 if topology.links_per_chip == 6 else 16
    return [span == size and size % multiple == 0 for span, size in itertools.zip_longest(spans, sizes)]
