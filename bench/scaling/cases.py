# SPDX-License-Identifier: Apache-2.0
"""Which steps are compiled: a model, a slice, and how its devices are split. The batch is the preset's throughout."""

from typing import Any, NamedTuple

from bench.plan.plan import changed
from grug_model.array_stacked.launch import PRESETS

VARIANT = "array_stacked"
# Topologies by the number of chips. A slice of v6e has at most 256.
SLICES = {
    "v5p": {4: "2x2x1", 16: "2x2x4", 64: "4x4x4", 256: "4x8x8", 1024: "8x8x16"},
    "v6e": {4: "2x2", 16: "4x4", 64: "8x8", 256: "16x16"},
    "tpu7x": {4: "2x2x1", 16: "2x2x4", 64: "4x4x4", 256: "4x8x8", 1024: "8x8x16"},
}


class Case(NamedTuple):
    """model, context, replica: devices along these axes of the mesh; "data" has the others."""

    preset: str
    chip: str
    chips: int
    model: int = 1
    context: int = 1
    replica: int = 1

    @property
    def topology(self) -> str:
        return f"{self.chip}:{SLICES[self.chip][self.chips]}"

    @property
    def split(self) -> str:
        """As the tables have it: "data", "model 4", "replica 2, model 2"."""
        shared = {"replica": self.replica, "model": self.model, "context": self.context}
        return ", ".join(f"{axis} {size}" for axis, size in shared.items() if size > 1) or "data"

    def config(self) -> Any:
        """The launch configuration.

        Raises ValueError for a preset that there is not.
        """
        if self.preset not in PRESETS:
            raise ValueError(f"no preset {self.preset!r}; there are {', '.join(PRESETS)}.")
        axes = {"replica_dcn": self.replica, "context_axis": self.context, "model_axis": self.model}
        return changed(PRESETS[self.preset], trainer=axes)


def _line(preset: str, chip: str, chips: tuple[int, ...], model=1, context=1, replica=1) -> list[Case]:
    return [Case(preset, chip, count, model, context, replica) for count in chips]


# The weights are split over "data": their widths and the vocabulary, 128256 = 256 x 501, let it be 256 at most. Larger
# slices need another axis, and so does a device without a row: there are 512, of 70B 1024.
SIZES = [
    *_line("130m", "v5p", (4, 16, 64, 256)),
    *_line("1b", "v5p", (4, 16, 64, 256)),
    *_line("7b", "v5p", (16, 64, 256)),
    *_line("7b", "v5p", (1024,), model=4),
    *_line("70b", "v5p", (64, 256, 1024), model=4),
    *_line("130m", "v6e", (4, 16, 64, 256)),
    *_line("1b", "v6e", (16, 64, 256)),
    *_line("7b", "v6e", (64, 256)),
    *_line("70b", "v6e", (256,), model=4),
    *_line("130m", "tpu7x", (4, 16, 64)),
    *_line("1b", "tpu7x", (4, 16, 64)),
    *_line("7b", "tpu7x", (16, 64)),
    *_line("7b", "tpu7x", (256,), model=2),
    *_line("70b", "tpu7x", (64, 256), model=4),
    *_line("70b", "tpu7x", (1024,), model=8),
]
# The same model on the same slice, split in other ways.
SPLITS = [
    *_line("7b", "v5p", (256,), model=4),
    *_line("7b", "v5p", (256,), context=2),
    *_line("7b", "v5p", (1024,), model=2, replica=2),
    *_line("7b", "v5p", (1024,), context=2, replica=4),
    *_line("70b", "v5p", (1024,), replica=4),
]
CASES = list(dict.fromkeys([*SIZES, *SPLITS]))
