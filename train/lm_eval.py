# SPDX-License-Identifier: Apache-2.0
"""`python -m train.lm_eval`: EleutherAI's lm-eval on a checkpoint, without exporting it anywhere.

python -m train.lm_eval --checkpoint runs/NAME --tasks grug_continuation,grug_held_out
python -m train.lm_eval --checkpoint runs/NAME --tasks mine --include my_tasks --json result.json

Needs `uv sync --extra eval`. Exit code: 0, or 2 where something is wrong; the message says what.
"""

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from train.command import errors_explained
from train.harness import HarnessConfig, build_harness, check_installed, metrics_of
from train.mesh import batch_shards
from train.rundir import say, write_atomically


@dataclass(frozen=True)
class Options:
    """Which model, on what."""

    # A run's folder, or one of its checkpoints: the newest below it is taken.
    checkpoint: str
    # Names with commas between them: grug_continuation, grug_held_out, those of --include, lm-eval's own.
    tasks: str
    # A folder with tasks of your own, YAML files as lm-eval reads them.
    include: str | None = None
    # The weights that were trained, or their moving average.
    weights: Literal["current", "ema"] = "current"
    # Solved examples before each question, in place of what the task says.
    num_fewshot: int | None = None
    # Documents of each task, its first; all if not given.
    limit: int | None = None
    # Rows that are run at once, each as long as the run's sequences; 8 if not given, or as many as there are devices.
    batch_size: int | None = None
    # Write the metrics there, with what they were measured on.
    json: Path | None = None


def main(argv: list[str] | None = None) -> None:
    with errors_explained():
        run(tyro.cli(Options, args=argv, prog="python -m train.lm_eval", description="Runs lm-eval on a checkpoint."))


def run(options: Options) -> None:
    """Prints lm-eval's table and writes the metrics, named as a run logs them.

    Raises:
      ValueError, OSError: as `open_saved` and `build_harness`; the file cannot be written.
    """
    cfg = HarnessConfig(options.tasks, 1, options.limit, options.num_fewshot, options.include)
    check_installed(cfg)
    if options.batch_size is not None and options.batch_size < 1:
        raise ValueError(f"--batch-size {options.batch_size}: it is at least 1.")
    if options.json and not options.json.absolute().parent.is_dir():
        raise ValueError(f"--json {options.json}: there is no folder {options.json.parent}. Make it first.")
    from train.saved import open_saved

    saved = open_saved(options.checkpoint, weights=options.weights)
    shards = batch_shards(saved.mesh)
    batch_size, seq_len = options.batch_size or -(-8 // shards) * shards, saved.config.trainer.seq_len
    variant = importlib.import_module(f"grug_model.{saved.variant}.train")
    harness = build_harness(cfg, saved.data, seq_len, batch_size, saved.mesh, variant.per_token_scores)
    assert harness is not None  # cfg names tasks
    results = harness.results(saved.params)
    from lm_eval.utils import make_table

    print(make_table(results))
    if options.json:
        about = {"checkpoint": saved.path, "step": saved.step, "weights": options.weights, "seq_len": seq_len}
        about |= {name: results[name] for name in ("versions", "n-shot", "n-samples")}
        remarks = [f"{count} requests of {task} {what}" for (task, what), count in harness.remarks.items()]
        about |= {"remarks": remarks, "metrics": metrics_of(results)}
        write_atomically(options.json, json.dumps(about, indent=2) + "\n")
        say(f"written: {options.json}")


if __name__ == "__main__":
    main()
