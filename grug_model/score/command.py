# SPDX-License-Identifier: Apache-2.0
"""`python -m grug_model.score`: does a variant win, and what does it cost?

python -m grug_model.score base mine                   three seeds of 60 steps of the laptop preset; v5p's compiler
python -m grug_model.score base mine theirs --seeds 5  each against the first
python -m grug_model.score base mine -- --optimizer.name muon     flags of train.run, for all of them

Stopped and started again it goes on; what is there already is not done again. Exit code: 0 scored, 1 a run or a
contract test failed, 2 something in the command is wrong.
"""

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from train.command import errors_explained
from train.run import Choose, choose, parse
from train.rundir import check_fit, hash_of, say
from train.stopping import catch_signals
from train.tpu_flags import set_up_libtpu

from . import contract, cost, runs
from .card import Card, Row
from .ledger import keep
from .text import card_text

# Flags of train.run that a score sets itself.
OURS = (
    "variant",
    "stacked",
    "resume",
    "preset",
    "steps",
    "trainer.steps",
    "trainer.seed",
    "run-id",
    "output-path",
)


def main(argv: list[str] | None = None) -> None:
    options, flags = _options(sys.argv[1:] if argv is None else argv)
    set_up_libtpu()
    with errors_explained():
        card = score(options, flags)
        page = keep(card)
        print(card_text(card), page, sep="\n")
    raise SystemExit(0 if card.is_sound else 1)


def _options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """What stands before `--`, and what after."""
    parser = argparse.ArgumentParser(
        prog="python -m grug_model.score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "variants", nargs="+", metavar="variant", help="folders of grug_model/; the first is the baseline"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each; default 3")
    parser.add_argument("--steps", type=int, default=60, help="of each run; default 60")
    parser.add_argument("--preset", default="laptop", help="what is trained; default laptop")
    parser.add_argument(
        "--tpu", default="v5p", help="CHIP or CHIP:AxB[xC] to compile for, such as v6e; none: leave it out"
    )
    parser.add_argument("--tpu-preset", default="130m", help="what is compiled for it; default 130m")
    parser.add_argument("--no-tests", action="store_true", help="leave the contract tests out, and say so")
    at = argv.index("--") if "--" in argv else len(argv)
    return parser.parse_args(argv[:at]), list(argv[at + 1 :])


def score(options: argparse.Namespace, flags: list[str]) -> Card:
    """Checks everything, then measures it: costs, contract tests, runs.

    Raises:
      ValueError: something in the options is wrong; nothing has been run.
    """
    from bench.timing import commit

    configs = _configurations(options, flags)
    made_with = commit()  # before anything is edited while it runs
    topology = _topology(options.tpu)
    with catch_signals():  # what it waits for in another process ends with this one
        costs = {variant: _cost(variant, options, flags, topology) for variant in options.variants}
        tests = _tests(options)
    found = _train(configs, options.seeds)
    return Card(
        rows=tuple(
            Row(
                variant=variant,
                config_hash=hash_of(variant, config),
                parameters=cost.count_parameters(variant, config),
                runs=tuple(found[variant]),
                contract=tests[variant],
                cost=costs[variant],
            )
            for variant, config in configs.items()
        ),
        preset=options.preset,
        steps=options.steps,
        seeds=tuple(range(options.seeds)),
        flags=tuple(flags),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=made_with,
    )


def _configurations(options: argparse.Namespace, flags: list[str]) -> dict[str, Any]:
    """The launch configuration of each variant. Raises ValueError for all that can be known to be wrong."""
    variants = options.variants
    if len(variants) < 2 or len(set(variants)) < len(variants):
        raise ValueError(
            f"score {' '.join(variants)}: name a baseline and what is held against it, each once: score base mine."
        )
    if options.seeds < 2:
        raise ValueError(
            f"--seeds {options.seeds}: how far runs of one variant are apart is what a difference is held against."
            " Choose 2 or more; 3 is the least that says much."
        )
    for flag in flags:
        name = flag.split("=")[0].removeprefix("--").replace("_", "-")
        if flag.startswith("--") and name in OURS:
            raise ValueError(
                f"-- {flag}: this is for the score to set. Name variants, --preset and --steps before the --."
            )
    configs = {variant: _configuration(variant, options.preset, options.steps, flags) for variant in variants}
    for variant, config in configs.items():
        _compiled(variant, options, flags)
        check_fit(config)
        config.optimizer.schedule(config.trainer.steps)
    return configs


def _configuration(variant: str, preset: str, steps: int | None, flags: Sequence[str]) -> Any:
    argv = ["--variant", variant, "--preset", preset, *flags]
    argv += ["--steps", str(steps)] if steps is not None else []
    chosen, start = choose(argv, Choose())
    return parse(argv, chosen, start, prog="python -m grug_model.score ... --", description="Flags of train.run.")[1]


def _compiled(variant: str, options: argparse.Namespace, flags: list[str]) -> tuple[Any, list[str]]:
    """The launch configuration that is compiled for the TPU, and its flags: where it is the preset that is trained, the
    same; another one is compiled as it is."""
    flags = flags if options.tpu_preset == options.preset else []
    return _configuration(variant, options.tpu_preset, None, flags), flags


def _topology(tpu: str) -> str | None:
    """The topology's whole name; None where there is no compiler for it, or none is wanted.

    Raises ValueError where there is no such thing.
    """
    if tpu == "none":
        return None
    from bench.tpu.topology import tpu_topology

    try:
        return tpu_topology(tpu).name
    except ModuleNotFoundError:  # libtpu; said below
        return None


def _cost(variant: str, options: argparse.Namespace, flags: list[str], topology: str | None) -> cost.Cost:
    preset = options.tpu_preset
    config, flags = _compiled(variant, options, flags)
    if topology is not None:
        say(f"score: compiling {variant}, preset {preset}, for {topology}")
        return cost.measure(variant, preset, config, topology, flags)
    why = "left out with --tpu none" if options.tpu == "none" else cost.NOT_COMPILED
    say(f"score: {variant} is not compiled for a TPU: {why}")
    return cost.Cost(options.tpu, preset, cost.count_parameters(variant, config), not_measured=why)


def _tests(options: argparse.Namespace) -> dict[str, contract.Contract]:
    if options.no_tests:
        return dict.fromkeys(options.variants, contract.Contract(not_run="left out with --no-tests"))
    say(f"score: contract tests of {', '.join(options.variants)}")
    return contract.contracts(options.variants)


def _train(configs: dict[str, Any], seeds: int) -> dict[str, list[runs.SeedRun]]:
    """Every variant with every seed, those of a variant in order."""
    found: dict[str, list[runs.SeedRun]] = {variant: [] for variant in configs}
    order = list(runs.in_turn(list(configs), range(seeds)))
    for i, (variant, seed) in enumerate(order, start=1):
        config = runs.named(variant, configs[variant], seed)
        state = ", finished before" if runs.is_finished(config) else ""
        say(f"score: run {i} of {len(order)}: {variant}, seed {seed}, in {config.output_path}{state}")
        run = runs.train(variant, config)
        found[variant].append(run)
        say(f"score: {variant}, seed {seed}: " + (f"failed: {run.failure}" if run.failure else f"loss {run.loss:.4f}"))
    return found
