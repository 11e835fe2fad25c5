# SPDX-License-Identifier: Apache-2.0
"""Every score that was made, runs/scores/<date>-<variants>.json with its page beside it, and what they say last."""

import json
import logging
from pathlib import Path
from typing import Any

from train.rundir import write_atomically

from .card import MIB, Card
from .page import card_page

SCORES = Path("runs") / "scores"
log = logging.getLogger(__name__)


def keep(card: Card, folder: Path = SCORES) -> Path:
    """Writes the card as JSON and as a page; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = "-".join([card.date[:19].replace(":", ""), *(row.variant for row in card.rows)])
    page = folder / f"{stem}.html"
    write_atomically(page, card_page(card))
    write_atomically(folder / f"{stem}.json", json.dumps(card.to_json() | {"page": str(page)}, indent=1) + "\n")
    return page


def last_scores(folder: Path = SCORES) -> dict[str, dict[str, Any]]:
    """Of each variant that was ever scored the newest row: date, commit, preset, steps, seeds, loss, loss_half_width,
    bits_per_byte, bits_per_byte_half_width, verdict, step_ms, hbm_mib, compile_cpu_seconds, parameters, tpu, page.

    None stands for what is not known, and the verdict of a baseline is None.
    """
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.glob("*.json")):
        try:
            score = json.loads(file.read_text())
            rows = {variant: _row(score, variant) for variant in score["rows"]}
        except (ValueError, KeyError, TypeError) as error:
            log.warning("%s left out: it is no score (%s: %s)", file, type(error).__name__, error)
            continue
        for variant, row in rows.items():
            if variant not in found or row["date"] >= found[variant]["date"]:
                found[variant] = row
    return found


def _row(score: dict[str, Any], variant: str) -> dict[str, Any]:
    row, cost = score["rows"][variant], score["rows"][variant]["cost"]
    loss, bits = row["loss"] or {}, row["bits_per_byte"] or {}
    return {
        **{name: score[name] for name in ("date", "commit", "preset", "steps", "seeds", "page")},
        "loss": loss.get("value"),
        "loss_half_width": loss.get("half_width"),
        "bits_per_byte": bits.get("value"),
        "bits_per_byte_half_width": bits.get("half_width"),
        "verdict": score["verdicts"].get(variant),
        "step_ms": cost["step_seconds"] and cost["step_seconds"] * 1e3,
        "hbm_mib": cost["hbm_bytes"] and cost["hbm_bytes"] / MIB,
        "compile_cpu_seconds": cost["compile_cpu_seconds"],
        "parameters": row["parameters"],
        "tpu": cost["tpu"],
    }
