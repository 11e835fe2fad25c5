# SPDX-License-Identifier: Apache-2.0
"""`python -m train.run`: trains a variant.

python -m train.run --stacked                         the laptop preset of grug_model/array_stacked
python -m train.run --variant mine --preset 130m      another variant, another preset
python -m train.run --config run.yaml --steps 500     fields from a file; flags win over it
python -m train.run --resume runs/NAME                go on with a run that was stopped
python -m train.run --prove-resume --steps 40         train twice, once killed again and again: are both equal?
"""

import argparse
import dataclasses
import importlib
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml

from train import together
from train.command import exit_code_of
from train.distributed import DistributedConfig, join
from train.failure import ERROR
from train.knobs import only_the_knobs
from train.last_words import LOST, ends_together, lost
from train.rundir import from_dict, read_config, say_here
from train.stopping import catch_signals
from train.tpu_flags import set_up_libtpu

VARIANTS = Path(__file__).parent.parent / "grug_model"


@dataclass(frozen=True)
class Choose:
    """What to train. Everything below is a field of the variant's own launch configuration."""

    # A folder of grug_model/.
    variant: str = "base"
    # Short for --variant array_stacked: one scanned block, compiled once.
    stacked: bool = False
    # Where the fields start from: a key of PRESETS in the variant's launch.py.
    preset: str = "laptop"
    # A YAML file with fields of the launch configuration.
    config: Path | None = None
    # The folder of a stopped run: its own variant, unless one is named, its configuration and newest valid checkpoint.
    resume: Path | None = None


@dataclass(frozen=True)
class Options(Choose):
    """What to train, and how. Everything below is a field of the variant's own launch configuration."""

    # Train twice, undisturbed and with SIGKILL after SIGKILL, and compare the two: exit code 0 where they are equal.
    prove_resume: bool = False
    # SIGKILLs of --prove-resume.
    kills: int = 3
    # Of a run in one process nothing.
    distributed: DistributedConfig = field(default_factory=DistributedConfig)


def main(argv: list[str] | None = None, *, variant: str | None = None) -> None:
    """Parses the command line, then trains. `variant` is the one a variant's own launch.py names."""
    argv = sys.argv[1:] if argv is None else argv
    set_up_libtpu()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("train").setLevel(logging.INFO)
    with ends_together():
        try:
            chosen, start = choose(argv, Options(variant=variant or "base"))
            options, launch = parse(
                argv, chosen, start, prog="python -m train.run", description="Trains a variant of grug_model/."
            )
            join(options.distributed)
            with catch_signals():
                _train(options, launch)
        except Exception as error:
            if gone := lost(error):
                say_here(f"error: {gone}")
                raise SystemExit(LOST) from error
            code = exit_code_of(error)
            if code == ERROR.exit_code:
                raise
            say_here(f"error: {error}")
            raise SystemExit(code) from error
        except KeyboardInterrupt as stop:
            raise SystemExit(getattr(stop, "exit_code", 130)) from None


def _train(options: Options, launch: Any) -> None:
    if not options.prove_resume:
        importlib.import_module(f"grug_model.{options.variant}.launch").run(launch)
        return
    if (count := together.processes()) > 1:
        raise ValueError(f"--prove-resume starts and kills processes of its own, and this is one of {count}.")
    from train.prove_resume import prove

    raise SystemExit(0 if prove(options.variant, launch, options.kills) else 1)


def choose[C: Choose](argv: list[str], default: C) -> tuple[C, Any]:
    """The flags that decide where the others start from, and that start: preset, then file or stopped run."""
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--variant")
    flags.add_argument("--stacked", action="store_true")
    flags.add_argument("--preset", default=default.preset)
    flags.add_argument("--config", type=Path)
    flags.add_argument("--resume", type=Path)
    known, _ = flags.parse_known_args(argv)
    named = "array_stacked" if known.stacked else known.variant
    began, saved = read_config(known.resume) if known.resume else (default.variant, None)
    known.variant = named or began
    chosen = dataclasses.replace(default, **vars(known))
    presets = _launch(chosen.variant, argv).PRESETS
    if chosen.preset not in presets:
        raise ValueError(
            f"--preset {chosen.preset}: {chosen.variant} has no such preset. It has: {', '.join(presets)}."
        )
    start = presets[chosen.preset]
    if chosen.config:
        start = from_dict(start, _fields_in(chosen.config), str(chosen.config))
    if saved is not None:
        start = from_dict(start, saved | {"model": _shared(saved["model"], start.model)}, str(chosen.resume))
        load = dataclasses.replace(start.trainer, load_checkpoint=True)
        start = dataclasses.replace(start, trainer=load, output_path=str(known.resume))
    return chosen, start


def _shared(saved: dict[str, Any], model: Any) -> dict[str, Any]:
    """The saved model's fields without those that this variant's model lacks and that were off."""
    fields = {field.name for field in dataclasses.fields(model)}
    return {
        name: value for name, value in saved.items() if name in fields or (value is not False and value is not None)
    }


def _fields_in(file: Path) -> dict[str, Any]:
    try:
        return yaml.safe_load(file.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(
            f"--config {file} cannot be read: {error}. It is a YAML file with fields of the launch configuration, such"
            " as trainer: {steps: 500}."
        ) from error


def parse[C: Choose](argv: list[str], chosen: C, start: Any, *, prog: str, description: str) -> tuple[C, Any]:
    """`chosen` and the launch configuration `start` with every flag in `argv` applied."""
    everything = dataclasses.make_dataclass(
        "Everything",
        [
            ("choose", Annotated[type(chosen), tyro.conf.arg(name="")]),
            ("launch", Annotated[type(start), tyro.conf.arg(name="")]),
        ],
    )
    parsed = tyro.cli(everything, default=everything(chosen, start), args=argv, prog=prog, description=description)
    return parsed.choose, parsed.launch


def _launch(variant: str, argv: list[str]) -> Any:
    """The variant's launch module; for `--help` without its model, which takes jax two seconds to import."""
    there_are = sorted(folder.parent.name for folder in VARIANTS.glob("*/launch.py"))
    if variant not in there_are:
        raise ValueError(
            f"--variant {variant}: there is no grug_model/{variant}/launch.py. Variants: {', '.join(there_are)}."
        )
    if {"-h", "--help"} & set(argv):
        only_the_knobs(VARIANTS / variant / "model.py", f"grug_model.{variant}.model")
    return importlib.import_module(f"grug_model.{variant}.launch")


if __name__ == "__main__":
    main()
