# SPDX-License-Identifier: Apache-2.0
"""One TensorCore as the schedule reader sees it: clock, matrix units, HBM, and how a branch behaves."""

from dataclasses import dataclass

from grug_kernels import chips


@dataclass(frozen=True)
class Core:
    """chip: the published figures of the JAX device that the core is in.

    num_matrix_units, matrix_width: the systolic arrays, matrix_width x matrix_width each.
    rows_per_cycle: rows of 16-bit numbers that one matrix unit takes in per cycle.
    branch_delay_slots: bundles that still issue after a branch, whichever way it goes; read off the region markers.
    fills_slots: whether one empty bundle stands for all the slots that are left.
    """

    chip: chips.Chip
    num_matrix_units: int
    matrix_width: int
    rows_per_cycle: int
    branch_delay_slots: int
    fills_slots: bool

    @property
    def flops_per_cycle(self) -> int:
        """bf16, a multiply and an add counted as two."""
        return 2 * self.num_matrix_units * self.matrix_width**2 * self.rows_per_cycle

    @property
    def clock_hz(self) -> float:
        """Published peak over FLOPs per cycle: 1.50 GHz for v5e, 1.75 for v5p and v6e, 2.20 for TPU7x.

        Google publishes 1.5 GHz for v5e and 1.75 GHz for v5p; no clock is published for the others.
        """
        return self.chip.peak_bf16_flops / self.cores_per_device / self.flops_per_cycle

    @property
    def hbm_bytes_per_second(self) -> float:
        """This core's share, all cores of the device being busy."""
        return self.chip.hbm_bytes_per_second / self.cores_per_device

    @property
    def cores_per_device(self) -> int:
        assert self.chip.cores is not None, f"{self.chip.name} is no TPU"
        return self.chip.cores


_TPUS = {chip.name: chip for chip in chips.TPUS}

# Geometry: jax-ml.github.io/scaling-book (four 128 x 128 units up to v5p, two 256 x 256 from v6e on). A 256-wide unit
# takes two rows per cycle: with one, 918 TFLOP/s would need a clock of 3.5 GHz.
CORES = {
    #                chip         units width rows branch slots, filled
    "v4": Core(_TPUS["v4"], 4, 128, 1, 4, False),
    "v5e": Core(_TPUS["v5e"], 4, 128, 1, 4, False),
    "v5p": Core(_TPUS["v5p"], 4, 128, 1, 4, False),
    "v6e": Core(_TPUS["v6e"], 2, 256, 2, 4, False),
    "tpu7x": Core(_TPUS["tpu7x"], 2, 256, 2, 6, True),
}


def core_of(chip: str) -> Core:
    """The core of a chip by its name in `CORES`."""
    if chip not in CORES:
        raise ValueError(f"no TPU is called {chip!r}; the schedule reader knows {', '.join(CORES)}.")
    return CORES[chip]
