# SPDX-License-Identifier: Apache-2.0
"""What `python -m train.plan` does once its flags are read."""

import dataclasses
import json
import logging
import warnings
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from bench import report
from bench.pictures import Picture
from bench.plan import clock
from bench.plan.candidates import Kept, groups
from bench.plan.frontier import best, table
from bench.plan.page import page, picture
from bench.plan.plan import changed, make_plan
from bench.plan.sweep import sweep
from bench.plan.text import text
from bench.tpu import schedule
from bench.tpu.topology import Topology, tpu_topology
from grug_kernels.chips import GIB
from train.rundir import as_dict, check_fit, flat, write_atomically

if TYPE_CHECKING:
    from train.plan import Options


def run(options: "Options", launch: Any, start: Any) -> int:
    """Prints what was found; returns the exit code, 0 where it fits and 1 where it, or all of a sweep, does not.

    start: where the flags that made `launch` started from.

    Raises:
      ValueError: a flag is wrong. ModuleNotFoundError: libtpu is not installed.
    """
    logging.getLogger(schedule.__name__).setLevel(logging.ERROR)  # the text has the notes,
    warnings.filterwarnings("ignore", message=".* refused, trying the next implementation")  # and the refusals
    launch = changed(
        launch,
        model={} if options.remat is None else {"remat": options.remat},
        trainer={} if options.batch is None else {"batch_size": options.batch},
    )
    if options.budget_gib is not None and options.budget_gib <= 0:
        raise ValueError(f"--budget-gib {options.budget_gib}: a device needs some memory; give GiB above 0.")
    topology = tpu_topology(options.tpu)
    budget = None if options.budget_gib is None else options.budget_gib * GIB
    if not options.sweep:
        return _one(options, launch, topology, budget)
    if options.levanter:
        raise ValueError("--levanter is for a single plan: leave it or --sweep out.")
    return _sweep(options, launch, start, topology, budget)


def _one(options: "Options", launch: Any, topology: Topology, budget: float | None) -> int:
    with clock.stages() as say:
        plan = make_plan(options.variant, launch, topology, budget_bytes=budget, levanter=options.levanter, say=say)
    print(text(plan))
    if options.json:
        options.json.write_text(json.dumps(plan.to_json(), indent=1))
    if options.picture and plan.prediction:
        options.picture.write_text(schedule.page({plan.variant: plan.prediction.schedule}, shown=5))
    return 0 if plan.fits else 1


def _sweep(options: "Options", launch: Any, start: Any, topology: Topology, budget: float | None) -> int:
    check_fit(launch)
    out = options.out or Path("plans") / f"{options.variant}-{topology.name.replace(':', '-')}"
    limits = {topology.chip.name: topology.available_hbm_bytes} | ({"budget": budget} if budget else {})
    limit = min(limits.values())
    found = groups(launch, topology, options.sweep_remat, options.sweep_batch, options.sweep_model)
    kept = Kept(out / "compiled", options.variant, launch, topology)
    outcomes = sweep(options.variant, launch, topology.name, found, kept, limit)
    print(table(outcomes, limit))
    chosen = best(outcomes, limit)
    if chosen is None:
        words = [f"none of {len(outcomes)} candidates fits", ""]
    else:
        remat, model, batch = chosen.candidate
        rate = f"{chosen.tokens_per_second_per_chip:,.0f} tokens/s per chip predicted"
        words = [
            f"best that fits: remat {remat}, model axis {model}, batch {batch}: {rate}",
            run_command(options, chosen.candidate.of(launch), start),
        ]
    print(*words, sep="\n")
    title = f"{options.variant} on {topology.name}"
    if any(outcome.step_seconds is not None for outcome in outcomes):
        svg = picture(title, outcomes, limits)
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "plan.html", page(title, outcomes, limits, svg, words))
        print(out / "plan.html", *report.write_pngs([Picture("plan", title, svg)], out), sep="\n")
    if options.json:
        facts = {"limits": limits, "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes]}
        options.json.write_text(json.dumps(facts, indent=1))
    return 0 if chosen else 1


def run_command(options: "Options", launch: Any, start: Any) -> str:
    """The command line that trains with `launch`, whose flags start from `start`."""
    parts = ["uv run python -m train.run", f"--variant {options.variant}", f"--preset {options.preset}"]
    parts += [f"--config {quote(str(options.config))}"] if options.config else []
    parts += [f"--resume {quote(str(options.resume))}"] if options.resume else []
    before, after = flat(as_dict(start)), flat(as_dict(launch))
    for name, value in after.items():
        if value != before.get(name):
            path, _, last = name.replace("_", "-").rpartition(".")
            flag = f"no-{last}" if value is False else last
            parts.append(f"--{path}.{flag}" if path else f"--{flag}")
            parts[-1] += "" if isinstance(value, bool) else f" {quote(str(value))}"
    return " ".join(parts)
