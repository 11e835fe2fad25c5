# SPDX-License-Identifier: Apache-2.0
"""`python -m train.plan`: what a run is going to take on a TPU, before it is launched and without one.

python -m train.plan --stacked --tpu v5p:4x4x4       the 130M template: memory, predicted step time, MFU; does it fit?
python -m train.plan --config run.yaml --batch 256   any flag of train.run: the same configuration
python -m train.plan --stacked --sweep               what to keep for the backward pass, which batch, which mesh

Exit code: 0 it fits, 1 it does not or was refused, 2 something in the command is wrong, 4 the disk cannot be written.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from train.command import errors_explained
from train.run import Choose, choose, parse


@dataclass(frozen=True)
class Options(Choose):
    """What to compile, for what, and what to make of it. Below it, as for train.run, the launch configuration."""

    # Where the fields start from: a key of PRESETS in the variant's launch.py.
    preset: str = "130m"
    # CHIP or CHIP:AxB[xC]: v5p:4x4x4 is 64 chips.
    tpu: str = "v5p:2x2x1"
    # Short for --trainer.batch-size: sequences per step, over all devices.
    batch: int | None = None
    # Short for --model.remat.
    remat: str | None = None
    # GiB that a device may use, in place of all that the chip has.
    budget_gib: float | None = None
    # Write everything that was found there.
    json: Path | None = None
    # Write a page there, of where the time goes.
    picture: Path | None = None
    # With Levanter's attention, loss and stack in place of ours.
    levanter: bool = False
    # Compile candidates, each combination of the three below, and say which is best.
    sweep: bool = False
    # Remat policies to try; all of the variant's if none is named.
    sweep_remat: tuple[str, ...] = ()
    # Batches to try; 1, 2 and 4 times the configured one if none is named.
    sweep_batch: tuple[int, ...] = ()
    # Sizes of the mesh's axis "model" to try; of 1, 2 and 4 those that the model can take if none is named.
    sweep_model: tuple[int, ...] = ()
    # Folder of a sweep: its page, its picture and what is compiled already; plans/VARIANT-TPU if not given.
    out: Path | None = None


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs here: jax should not look for an accelerator, nor wait for one
    with errors_explained():
        chosen, start = choose(argv, Options())
        options, launch = parse(
            argv, chosen, start, prog="python -m train.plan", description="Says what a run takes on a TPU."
        )
        from bench.plan import command  # imports jax, which --help should not wait for

        raise SystemExit(command.run(options, launch, start))


if __name__ == "__main__":
    main()
