# SPDX-License-Identifier: Apache-2.0
"""A training step's HBM on one device by what it is for, fitting or refused, beside what the compiler says of it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.plan.holders import Held, by_kind, held
from bench.tpu.dump import Refusal
from bench.tpu.hbm import arguments_by_category
from bench.tpu.record import LaidOut, Record

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
_SIZE = r"([\d.]+)([KMG]?)"
# The two checks that XLA makes, before and after it has made the code.
_REFUSALS = (rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)", rf"Used {_SIZE} of {_SIZE} hbm")


@dataclass(frozen=True)
class Memory:
    """Bytes of one device. total_bytes is the compiler's own figure of what it sets aside, and decides whether the step
    fits; the others are what it is for, and `rest_bytes` is what they leave unexplained.

    arguments: see `hbm.CATEGORIES`. temporaries: by kind, see `holders.KINDS`, where most of them is in use.
    code_bytes: of a refused step 0, it is in the rest. in_use_bytes: at most, arguments included.
    on_host: arguments that live in the host's memory, by category. host_bytes: temporaries there. Neither is in HBM.
    """

    total_bytes: int
    arguments: dict[str, int]
    temporaries: dict[str, int]
    results_bytes: int
    code_bytes: int
    in_use_bytes: int
    on_host: dict[str, int]
    host_bytes: int = 0
    largest: Sequence[Held] = field(default=(), repr=False)

    @property
    def rest_bytes(self) -> int:
        known = sum(self.arguments.values()) + sum(self.temporaries.values()) + self.results_bytes + self.code_bytes
        return self.total_bytes - known


def memory(record: Record, axes: Sequence[int], shown: int = 5) -> Memory | None:
    """None where a step was refused before its buffers were laid out. axes: see `holders.held`."""
    if record.laid_out is None:
        return None
    layout = record.laid_out.layout
    temporaries = held(record.laid_out, axes)
    in_use = sum(one.size for one in temporaries[:-1])  # the last are the gaps
    common = {"host_bytes": layout.host_bytes, "temporaries": by_kind(temporaries), "largest": temporaries[:-1][:shown]}
    if hbm := record.hbm:
        results = hbm.outputs_bytes - hbm.donated_bytes
        in_use += hbm.arguments_bytes
        return Memory(
            hbm.reserved_bytes,
            hbm.arguments,
            results_bytes=results,
            code_bytes=hbm.code_bytes,
            in_use_bytes=in_use,
            on_host=hbm.on_host,
            **common,
        )
    return _of_refused(record.laid_out, needed(record.refusal), in_use, common)


def _of_refused(laid_out: LaidOut, figures: tuple[int, int] | None, in_use: int, common: dict) -> Memory:
    """The compiler says what it needs to a hundredth of its unit: where the parts are more, theirs counts."""
    (arguments, on_host), layout = arguments_by_category(laid_out.module), laid_out.layout
    known = sum(arguments.values()) + layout.heap_bytes + layout.results_bytes
    total = max(known, figures[0]) if figures else known
    in_use += sum(arguments.values())
    results = layout.results_bytes
    return Memory(total, arguments, results_bytes=results, code_bytes=0, in_use_bytes=in_use, on_host=on_host, **common)


def needed(refusal: Refusal | None) -> tuple[int, int] | None:
    """(bytes needed, bytes available) of a refusal for want of HBM; None of any other."""
    if refusal is None:
        return None
    for pattern in _REFUSALS:
        if found := re.search(pattern, refusal.sentence):
            size, unit, has, has_unit = found.groups()
            return int(float(size) * _UNITS[unit]), int(float(has) * _UNITS[has_unit])
    return None
