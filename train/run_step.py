# SPDX-License-Identifier: Apache-2.0
"""What `python grug_model/<variant>/launch.py` does: trains the variant as a step of the executor.

Presets and flags are those of `train.run`. The run's folder is the step's, made of its name and of what is versioned in
the `step` of the variant's launch.py; a run that has finished is not begun again.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from train.command import errors_explained
from train.executor import PREFIX, execute
from train.run import Choose, choose, parse


@dataclass(frozen=True)
class Options(Choose):
    """What to train. Everything below is a field of the variant's own launch configuration."""

    # Folder in which the step has its own.
    prefix: str = PREFIX
    # Say what would run and why, and write nothing.
    dry_run: bool = False
    # Begin anew, where it has finished or failed; what is there is set aside.
    force_run: bool = False


def main(variant: str, argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    program = sys.modules["__main__"]
    if program.__spec__ is None:  # run by path. The step's process imports it, too, and as what it is: a module
        program.__spec__ = importlib.util.find_spec(f"grug_model.{variant}.launch")
    with errors_explained():
        chosen, start = choose(argv, Options(variant=variant))
        prog = f"python grug_model/{chosen.variant}/launch.py"
        options, launch = parse(argv, chosen, start, prog=prog, description="Trains it as a step of the executor.")
        if options.resume or launch.output_path:
            raise ValueError(
                "the folder of a step is made of its name and of what is versioned: --resume and --output-path are for"
                " `uv run python -m train.run`. The same command finds its step again; --prefix says where to look."
            )
        step = importlib.import_module(f"grug_model.{chosen.variant}.launch").step(launch)
        anew = [step.name] if options.force_run else []
        code = execute([step], prefix=options.prefix, dry_run=options.dry_run, force_run=anew)
    raise SystemExit(code)
