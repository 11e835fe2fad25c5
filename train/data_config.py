# SPDX-License-Identifier: Apache-2.0
"""The knobs of the data, and what follows from them alone: which components there are, and in which shares."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from train.batches import skipped_ranges
from train.corpus import COMPONENTS
from train.mixture import Stages, Weights, as_stages, check_stages

# One sequence in eight is prose: it is a twentieth of the text, and is read through almost three times as often.
PYTHON_WEIGHTS = {"prose": 0.125, "code": 0.875}

# What else is said below eval/, or in `PreparedData.baselines`.
_TAKEN = {*COMPONENTS, "python", "ema", "macro", "overall"}

Packing = Literal["stream", "documents"]


@dataclass(frozen=True)
class DataConfig:
    """What is read, and in which proportions."""

    # Where corpus, tokenizer and token caches are kept. None: $GRUG_CACHE_DIR, or else ~/.cache/grug.
    cache_dir: str | None = None
    # Component -> its texts: a file or glob (.jsonl, .gz, .zst, .parquet, or a document per file), the folder of a
    # Levanter cache, or hf:org/name. None: Python's own texts, the components "prose" and "code".
    sources: dict[str, str] | None = None
    # Component -> the like to evaluate on. Where none is named, one document in `hold_out_every` is held out.
    held_out: dict[str, str] | None = None
    hold_out_every: int = 50
    # Component -> the field or column that holds its texts, where that is not "text".
    text_fields: dict[str, str] | None = None
    # Share of each component in the sequences trained on; or stages of (first step, shares), the first from step 0.
    # None: of one source everything; of Python's own texts 1/8 prose.
    weights: Weights | Stages | None = None
    # Directory of any tokenizer with tokenizer.json. None: a byte-level BPE of `vocab_size` tokens of the texts.
    tokenizer: str | None = None
    vocab_size: int = 4096
    # stream: documents end to end, cut into sequences. documents: whole ones in each sequence, the rest of it padding.
    packing: Packing = "stream"
    # Sequences within which the shares hold exactly; stages begin at multiples of it.
    mixture_block_size: int = 64
    # Batches that no step is trained on, by number ("57") or range ("100-120"). May change between two starts of a run.
    skip_batches: tuple[str, ...] = ()

    def __post_init__(self):
        if isinstance(self.skip_batches, str | int):
            raise ValueError(f"DataConfig.skip_batches: {self.skip_batches!r} is no list; write [{self.skip_batches}].")
        object.__setattr__(self, "skip_batches", tuple(map(str, self.skip_batches)))
        object.__setattr__(self, "weights", _typed(self.weights))
        skipped_ranges(self.skip_batches)
        if self.packing not in get_args(Packing):
            raise ValueError(f"DataConfig: packing={self.packing!r}; choose stream or documents.")
        if self.hold_out_every < 2:
            raise ValueError(f"DataConfig: hold_out_every={self.hold_out_every}; it is at least 2.")
        for name in ("held_out", "text_fields"):
            if unknown := sorted(set(getattr(self, name) or {}) - set(self.sources or {})):
                raise ValueError(f"DataConfig.{name}: {', '.join(unknown)}: data.sources names no such component.")
        for name in self.sources or {}:
            others = {other for other in self.sources or {} if other != name}
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", name) or name.split("/")[0] in _TAKEN:
                raise ValueError(
                    f"DataConfig.sources: a component cannot be called {name!r}. Its name is a tag in the metrics:"
                    f" letters, digits, _ . - and / between them, and not {', '.join(sorted(_TAKEN))}."
                )
            if below := sorted(other for other in others if other.startswith(f"{name}/")):
                raise ValueError(
                    f"DataConfig.sources: {name} is a component and also the group of {', '.join(below)}, whose mean"
                    f" would have its name in the metrics. Call it {name}/something."
                )


def _typed(weights: Any) -> Weights | Stages | None:
    """YAML and JSON write 1 for 1.0, and know no tuples."""
    try:
        if weights is None or isinstance(weights, dict):
            return weights and {name: float(share) for name, share in weights.items()}
        return [(int(step), {name: float(share) for name, share in shares.items()}) for step, shares in weights]
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"DataConfig.weights: {weights!r} is neither shares, such as {{web: 0.7, books: 0.3}}, nor stages of them,"
            " such as [[0, {web: 1}], [64, {web: 0.5, books: 0.5}]]."
        ) from error


def weight_stages(cfg: DataConfig) -> Stages:
    """`cfg.weights` as stages of (first step, shares).

    Raises:
      ValueError: a name that is no component, shares that are negative or all zero, stages not in order from step 0;
        several sources and no weights.
    """
    weights = cfg.weights
    if weights is None:
        weights = dict.fromkeys(cfg.sources, 1.0) if cfg.sources else PYTHON_WEIGHTS
        if len(cfg.sources or {}) > 1:
            example = " ".join(f"{name} {1 / len(weights):.2g}" for name in weights)
            raise ValueError(
                f"DataConfig.weights: there are {len(weights)} sources; say in which shares they are mixed, such as"
                f" --data.weights {example}."
            )
    return check_stages(weights, tuple(dict.fromkeys(components_of(cfg) + COMPONENTS)))


def components_of(cfg: DataConfig) -> tuple[str, ...]:
    """Names of what is tokenized and evaluated: the sources, and Python's own texts where nothing else or `weights` is.

    The order is one of names, not of the configuration, since each component's shuffling depends on its place.
    """
    named = {name for _, shares in as_stages(cfg.weights or {}) for name in shares}
    built_in = tuple(name for name in COMPONENTS if not cfg.sources or name in named)
    return built_in + tuple(sorted(cfg.sources or {}))


def tag_of(component: str) -> str:
    """A component's name in the metrics: eval/python/prose/loss, whose parent is "python"; eval/web/loss."""
    return f"python/{component}" if component in COMPONENTS else component


def cache_directory(cfg: DataConfig) -> Path:
    return Path(cfg.cache_dir or os.environ.get("GRUG_CACHE_DIR") or "~/.cache/grug").expanduser()
