# SPDX-License-Identifier: Apache-2.0
"""The command behind `python -m train.evaluate`: how good a saved model is, tag by tag.

python -m train.evaluate --checkpoint runs/NAME                           as the run evaluated itself
python -m train.evaluate --checkpoint runs/NAME --max-examples all        on all held-out text
python -m train.evaluate --checkpoint runs/NAME --weights both --json eval.json
"""

import dataclasses
import importlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from train import lev
from train.command import aligned, errors_explained
from train.data import cache_directory
from train.evaluate import build_tagged_evaluator
from train.mesh import batch_shards
from train.progress import phase
from train.rundir import say, write_atomically
from train.saved import Saved, Weights, load_weights, open_saved

_COLUMNS = ("loss", "perplexity", "bpb", "bpb_compat", "tokens")


@dataclass(frozen=True)
class Options:
    """Which checkpoint, and on how much of the held-out text."""

    # A run's folder, its checkpoints folder, or one directory step-<n>.
    checkpoint: str
    # The weights that were trained, their moving average, or one after the other.
    weights: Literal["current", "ema", "both"] = "current"
    # Sequences of each validation set, a fixed sample of it, or "all". None: as many as the run evaluated on.
    max_examples: int | Literal["all"] | None = None
    # Sequences at a time, over all devices. None: as the run had it. Only bpb_compat depends on it.
    batch_size: int | None = None
    # Write what was found there as well.
    json: Path | None = None


def main(argv: list[str] | None = None) -> None:
    with errors_explained():
        options = tyro.cli(
            Options, args=argv, prog="python -m train.evaluate", description="Evaluates a saved model on held-out text."
        )
        if options.json is not None and not options.json.absolute().parent.is_dir():
            raise FileNotFoundError(f"--json {options.json}: there is no folder {options.json.parent}. Make it first.")
        lev.import_in_background()
        found = evaluate(options)
        print(as_text(found))
        if options.json is not None:
            write_atomically(options.json, json.dumps(found, indent=2) + "\n")
            say(f"written to {options.json}")


def evaluate(options: Options) -> dict[str, Any]:
    """What goes into the JSON file: where it is from, tokens by tag, and metrics under the names that runs log.

    Raises:
      FileNotFoundError, NoUsableCheckpointError, ValueError: as `open_saved` and `build_tagged_evaluator`.
    """
    wanted: tuple[Weights, ...] = ("current", "ema") if options.weights == "both" else (options.weights,)
    saved = open_saved(options.checkpoint, weights=wanted[0])
    from train.compiled import keep_compiled_programs

    keep_compiled_programs(cache_directory(saved.config.data))
    limit = saved.config.eval.max_examples_per_dataset if options.max_examples is None else options.max_examples
    cfg = dataclasses.replace(saved.config.eval, max_examples_per_dataset=None if limit == "all" else limit)
    batch_size = options.batch_size or _batch_size(saved)
    evaluator = build_tagged_evaluator(
        saved.data,
        saved.config.data,
        cfg,
        saved.config.trainer.seq_len,
        batch_size,
        saved.mesh,
        importlib.import_module(f"grug_model.{saved.variant}.train").per_token_losses,
    )
    metrics, params = {}, saved.params
    for weights in wanted:
        if weights != wanted[0]:
            params = load_weights(saved.path, saved.variant, saved.config, saved.mesh, weights=weights)
        with phase(f"evaluating {weights} weights") as detail:
            prefix = "eval" if weights == "current" else "eval/ema"
            metrics |= evaluator(params, prefix, lambda done, total, show=detail: show(f"batch {done} of {total}"))
    return {
        "checkpoint": saved.path,
        "step": saved.step,
        "variant": saved.variant,
        "seq_len": saved.config.trainer.seq_len,
        "batch_size": batch_size,
        "max_examples_per_dataset": cfg.max_examples_per_dataset,
        "tokens": evaluator.tokens,
        "metrics": metrics,
    }


def _batch_size(saved: Saved) -> int:
    """That of the run, or the next above it that this machine's devices can share."""
    asked, shards = saved.config.trainer.batch_size, batch_shards(saved.mesh)
    batch_size = -(-asked // shards) * shards
    if batch_size != asked:
        say(f"batches of {batch_size} sequences, where the run had {asked}: {shards} devices share them here")
    return batch_size


def as_text(found: Mapping[str, Any]) -> str:
    """A table for each of the weights: a row for each tag, for each group of tags, and for all."""
    limit = found["max_examples_per_dataset"]
    amount = "all sequences" if limit is None else f"at most {limit} sequences"
    parts = [
        f"{found['checkpoint']}: {found['variant']}, step {found['step']}",
        f"{amount} of each set, {found['seq_len']} tokens long, in batches of {found['batch_size']}",
    ]
    for prefix, weights in (("eval", "current weights"), ("eval/ema", "averaged weights")):
        if f"{prefix}/loss" in found["metrics"]:
            parts += ["", *_table(found["metrics"], found["tokens"], prefix, weights)]
    return "\n".join(parts)


def _table(metrics: Mapping[str, float], tokens: Mapping[str, int], prefix: str, title: str) -> list[str]:
    def row(name: str, where: str, loss: str, macro: str, count: int) -> tuple[str, ...]:
        nats, *bits = (metrics[f"{prefix}/{where}{kind}"] for kind in (loss, f"{macro}bpb", f"{macro}bpb_compat"))
        perplexity = f"{math.exp(nats):,.2f}" if nats < 100 else f"e^{nats:.0f}"
        return name, f"{nats:.4f}", perplexity, *(f"{bpb:.4f}" for bpb in bits), f"{count:,}"

    rows = [(title, *_COLUMNS)]
    rows += [row(tag, f"{tag}/", "loss", "", count) for tag, count in tokens.items()]
    groups = sorted({tag[:at] for tag in tokens for at, letter in enumerate(tag) if letter == "/"} - tokens.keys())
    for group in groups:
        count = sum(count for tag, count in tokens.items() if tag.startswith(f"{group}/"))
        rows.append(row(f"{group}/*", f"{group}/", "micro_loss", "", count))
        if len(tokens) > 1:
            rows.append(row(f"{group}/*, tags alike", f"{group}/", "macro_loss", "macro_", count))
    total = sum(tokens.values())
    rows.append(row("all", "", "loss", "", total))
    if len(tokens) > 1:
        rows.append(row("all, tags alike", "", "macro_loss", "macro_", total))
    lines = aligned(rows, numbers=range(1, len(rows[0])))
    seconds, waiting = metrics[f"{prefix}/total_time"], metrics[f"{prefix}/loading_time"]
    return [*lines, f"{seconds:.1f} s, compiling included; {waiting:.1f} s of them waiting for data"]
