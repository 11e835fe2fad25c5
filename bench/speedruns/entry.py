# SPDX-License-Identifier: Apache-2.0
"""What an entry does: plans, trains its seeds by the variants' own `launch.run`, says how it stands, adds its rows."""

import argparse
import dataclasses
import importlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

from bench.speedruns import leaderboard, ledger
from bench.speedruns.ledger import Row
from bench.speedruns.tracks import Track
from bench.timing import commit as commit_here
from grug_model.score.card import p_text, plus_minus
from grug_model.score.runs import SeedRun, in_turn, named, train
from grug_model.score.stats import difference
from train.checkpoint_files import read_metadata
from train.command import errors_explained
from train.executor import ExecutorStep, execute
from train.history import History, read_history
from train.mesh import quiet_libtpu
from train.rundir import check_fit, hash_of, say
from train.summary import SUMMARY_FILE, clock, si


@dataclass(frozen=True)
class Entry:
    """configs: launch configurations by their variants, each of its variant's own class. track: None where no target
    was set; then no row is added. on_laptop: False: without an accelerator it is planned, and not trained."""

    name: str
    configs: Mapping[str, Any]
    track: Track | None
    seeds: int = 4
    on_laptop: bool = False


def main(entry: Entry, argv: list[str] | None = None) -> None:
    options = _options(entry, argv)
    quiet_libtpu()
    with errors_explained():
        for config in entry.configs.values():
            check_fit(config)
            if entry.track:
                entry.track.check(config)
        if options.plan:
            return _plan(entry, options.tpu)
        _check(entry, options)
        if options.executor:
            raise SystemExit(execute(steps(entry, range(options.seeds)), dry_run=options.dry_run))
        commit = ledger.commit_of_clean_tree() if options.submit else commit_here()
        found = _train(entry, range(options.seeds))
        _compare(found)
        if entry.track:
            rows = [_row(entry, variant, runs, commit, options.note) for variant, runs in found.items()]
            _tell(rows, submit=options.submit)


def _options(entry: Entry, argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=f"{entry.name}: {', '.join(entry.configs)}. docs/recipes/speedrun.md")
    parser.add_argument("--seeds", type=int, default=entry.seeds, help=f"default {entry.seeds}")
    parser.add_argument("--submit", action="store_true", help="add a row to bench/speedruns/results.json")
    parser.add_argument(
        "--note", default="", help="what a reader of the row should know, such as a machine that is busy"
    )
    parser.add_argument("--plan", action="store_true", help="compile for a TPU instead: does it fit, how fast is it?")
    parser.add_argument("--tpu", default="v5p:2x2x1", help="for --plan; default v5p:2x2x1")
    parser.add_argument(
        "--executor",
        action="store_true",
        help="train the seeds as steps of the executor, each in a process of its own; they make no row",
    )
    parser.add_argument("--dry-run", action="store_true", help="for --executor: say what would run")
    return parser.parse_args(argv)


def steps(entry: Entry, seeds: Sequence[int]) -> list[ExecutorStep]:
    """The entry's runs as steps of the executor: each the `step` of its variant's launch.py, under the entry's name."""
    made = []
    for variant, seed in in_turn(list(entry.configs), seeds):
        config = entry.configs[variant]
        trainer = dataclasses.replace(config.trainer, seed=seed)
        run = dataclasses.replace(config, trainer=trainer, run_id=f"{entry.name}-{variant}-seed{seed}")
        made.append(importlib.import_module(f"grug_model.{variant}.launch").step(run))
    return made


def _check(entry: Entry, options: argparse.Namespace) -> None:
    if options.seeds < 1:
        raise ValueError(f"--seeds {options.seeds}: choose 1 or more; a row counts with 2 or more.")
    if options.executor and options.submit:
        raise ValueError("--submit: a row is made of runs that this program trained itself. Leave --executor out.")
    if options.dry_run and not options.executor:
        raise ValueError("--dry-run: it is for --executor; without that, the seeds would be trained. Add --executor.")
    if options.submit and entry.track is None:
        raise ValueError(f"{entry.name} has no track, as nobody has set a target yet: leave --submit out.")
    if not (entry.on_laptop or options.dry_run) and _backend(in_a_process_of_its_own=options.executor) == "cpu":
        config = next(iter(entry.configs.values()))
        flops = config.model.flops_per_token(config.trainer.seq_len).training * _tokens(config)
        raise ValueError(
            f"{entry.name}: {si(flops)} FLOPs a seed are not for a CPU. --plan says what it takes on a TPU; or train"
            " where there is one."
        )


def _backend(*, in_a_process_of_its_own: bool) -> str:
    """Asked here, jax takes the accelerator for this process: not what the executor's steps would find then."""
    if not in_a_process_of_its_own:
        return jax.default_backend()
    asked = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    return subprocess.check_output(asked, text=True).split()[-1]


def _plan(entry: Entry, tpu: str) -> None:
    from bench.plan import clock as stage_clock
    from bench.plan.plan import make_plan
    from bench.plan.text import text
    from bench.tpu.topology import stay_on_cpu, tpu_topology

    stay_on_cpu()
    topology = tpu_topology(tpu)
    for variant, config in entry.configs.items():
        with stage_clock.stages() as stage:
            plan = make_plan(variant, config, topology, say=stage)
        print(text(plan))
        if plan.prediction:
            steps = config.trainer.steps
            print(f"{steps} steps, {si(_tokens(config))} tokens: {clock(steps * plan.prediction.seconds)} predicted\n")


def _train(entry: Entry, seeds: Sequence[int]) -> dict[str, list[SeedRun]]:
    found: dict[str, list[SeedRun]] = {variant: [] for variant in entry.configs}
    for variant, seed in in_turn(list(found), seeds):
        say(f"{entry.name}: {variant}, seed {seed} of {len(seeds)}")
        run = train(variant, named(variant, entry.configs[variant], seed, prefix=entry.name))
        if run.failure:
            raise RuntimeError(f"{entry.name}: {variant}, seed {seed} failed: {run.failure}. See {run.path}.")
        found[variant].append(run)
    return found


def _compare(found: Mapping[str, Sequence[SeedRun]]) -> None:
    """The others against the first, where there are seeds enough."""
    (base, its_runs), *others = found.items()
    for variant, runs in others if len(its_runs) > 1 else ():
        before, after = ([run.loss for run in one if run.loss is not None] for one in (its_runs, runs))
        apart = difference(before, after, comparisons=len(others))
        size = plus_minus(apart.mean, apart.half_width, sign=True)
        print(f"{variant} minus {base}: {size} nats per token ({apart.seeds} seeds, {p_text(apart.p)})")


def _row(entry: Entry, variant: str, runs: Sequence[SeedRun], commit: str, note: str) -> Row:
    assert entry.track
    config = entry.configs[variant]
    paths = [Path(run.path) for run in runs]
    saved = json.loads((paths[0] / SUMMARY_FILE).read_text())["checkpoint"]
    return Row(
        entry=entry.name,
        track=entry.track.name,
        variant=variant,
        commit=commit,
        config_hash=hash_of(variant, config),
        device=device(),
        texts=read_metadata(saved)["tokenizer_sha256"][:8],
        seeds=tuple(run.seed for run in runs),
        losses=tuple(run.loss for run in runs if run.loss is not None),
        target=entry.track.target,
        steps=config.trainer.steps,
        tokens=_tokens(config),
        training_seconds=tuple(round(training_seconds(read_history(path), path), 3) for path in paths),
        wall_seconds=tuple(round(json.loads((path / SUMMARY_FILE).read_text())["wall_seconds"], 3) for path in paths),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        note=note,
    )


def training_seconds(history: History, path: Path) -> float:
    """Of all steps; what was done between them is not counted.

    Raises:
      ValueError: the run was stopped and gone on with: some steps were taken twice.
    """
    if start := history.summary["run/start_step"]:
        raise ValueError(
            f"{path} was stopped and went on after step {start}: its time is not that of one run. Delete the folder,"
            " and start again."
        )
    total, before = 0.0, 0
    for step, seconds in history.series("throughput/duration"):
        total += seconds * (step - before)
        before = step
    return total


def _tell(rows: Sequence[Row], *, submit: bool) -> None:
    for row in rows:
        seconds, loss = row.time
        mean = f"loss {loss:.4f} in {clock(seconds)} of training"
        stands = f"does not count: {row.why_not}" if row.why_not else "counts" if submit else "would count"
        print(f"{row.entry} ({row.variant}): {mean}, target {row.target:g} ({p_text(row.p)}): it {stands}")
        if submit:
            ledger.add(row)
    if submit:
        leaderboard.write()
        print(f"added to {ledger.RESULTS}; the page is {ledger.PAGE}. Commit both.")


def _tokens(config: Any) -> int:
    return config.trainer.steps * config.trainer.batch_size * config.trainer.seq_len


def device() -> str:
    """Kind and number: of CPUs the model, as jax calls them all alike."""
    kind, count = jax.devices()[0].device_kind, jax.device_count()
    if jax.default_backend() != "cpu":
        return f"{count} × {kind}"
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    return f"{os.cpu_count()} cores of {model[1] if model else platform.machine()}"
