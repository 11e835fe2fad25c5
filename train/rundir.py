# SPDX-License-Identifier: Apache-2.0
"""One run's name, folder and configuration on disk. No jax here."""

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import tempfile
import types
import typing
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train import together
from train.batches import data_offset, skipped_ranges
from train.store_metrics import store_metrics_every

# What may differ between two starts of the same run: where things are kept, and how often they are looked at.
UNVERSIONED = (
    "run_id",
    "output_path",
    "tracker",
    "checkpoint",
    "eval",
    "profile",
    "watch",
    "data.cache_dir",
    "trainer.log_every",
    "trainer.load_checkpoint",
    "trainer.load_checkpoint_path",
    "trainer.peak_tflops",
    "trainer.require_kernels",
    "trainer.stall_minutes",
)


@dataclass(frozen=True)
class RunDir:
    """`path` holds checkpoints/, metrics.jsonl, config.json, sharding.json, summary.json, report.html, the traces in
    profiler/, and a folder in failures/ for each time it failed. Process 0 writes, but for arrays and traces."""

    run_id: str
    path: Path
    variant: str
    config_hash: str

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def profiler(self) -> Path:
        return self.path / "profiler"

    @property
    def failures(self) -> Path:
        return self.path / "failures"

    def describe(self, config: Any, data: Any) -> Callable[[int], dict[str, Any]]:
        """What a checkpoint after `step` steps says of its run: enough for `train/saved.py` to open a copy of it."""
        batch_size, skipped = config.trainer.batch_size, skipped_ranges(config.data.skip_batches)
        return lambda step: {
            "run_id": self.run_id,
            "variant": self.variant,
            "config_hash": self.config_hash,
            "data_offset": data_offset(step, batch_size, skipped),
            "config": as_dict(config),
            "tokenizer_sha256": data.tokenizer.digest,
        }

    @property
    def is_summarised(self) -> bool:
        return together.from_first("summary.json", (self.path / "summary.json").is_file())

    def write_config(self, config: Any) -> None:
        """What `--resume` reads, written once the run is known to be able to start."""
        began = {"run_id": self.run_id, "variant": self.variant, "config": as_dict(config)}
        if together.is_first():
            write_atomically(self.path / "config.json", json.dumps(began, indent=2))

    @property
    def resume_command(self) -> str:
        return f"uv run python -m train.run --resume {os.path.relpath(self.path)}"


def open_run(variant: str, config: Any) -> RunDir:
    """Names the run and makes its folder. Says what of the configuration is not as it was when the run began.

    The name is as `run_name` says, or made of the variant and a hash of the configuration, so that the same command
    finds its own run again. A run that goes on keeps its name, whatever day it is by then and wherever its folder was
    moved.

    Raises:
      OSError: the folder cannot be made or written; the message says which and why.
      ValueError: the processes of the run differ in their configuration, or in the folder that they see.
    """
    config_hash = hash_of(variant, config)
    run_id = run_name(config.run_id, f"{variant}-{config_hash}")
    path = Path(config.output_path or Path("runs") / run_id)
    try:
        began = _as_it_began(path)
        run = RunDir(began.get("run_id", run_id), path, variant, config_hash)
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        _say_what_changed(run, config, began)
        with tempfile.TemporaryFile(dir=run.path):
            pass
    except OSError as error:
        raise OSError(
            f"cannot write the run's folder {path}: {error}. Choose a folder you may write to with --output-path."
        ) from error
    _check_one_run(run, config)
    return run


def _check_one_run(run: RunDir, config: Any) -> None:
    """Several processes share the configuration and the folder: a checkpoint is of parts that each of them writes."""
    if together.processes() == 1:
        return
    facts = {"variant": run.variant, "run_id": run.run_id, **flat(as_dict(config))}
    advice = "Start all processes of a run with the same command, and GRUG_RUN_ID and FERRY_DATE alike."
    together.check_same("one run in several processes", facts, advice)
    file = run.path / together.from_first("a name for a file", f".seen-{uuid.uuid4().hex}")
    if together.is_first():
        file.touch()
    together.wait_for_all("process 0 writing to the run's folder")
    sees = together.from_all("seeing what process 0 wrote", file.exists())
    if together.is_first():
        file.unlink()
    if not all(sees):
        raise ValueError(
            f"{run.path.absolute()} is not one folder: process {sees.index(False)} does not see what process 0 writes"
            " there. Choose an --output-path on a disk that all of them share."
        )


def _as_it_began(path: Path) -> dict[str, Any]:
    """What `write_config` wrote into the folder; nothing where no run has begun there."""
    file = path / "config.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def _say_what_changed(run: RunDir, config: Any, began: dict[str, Any]) -> None:
    """A run may be gone on with under other knobs, but not in silence."""
    if not began:
        return
    if config.run_id and not run.run_id.startswith(config.run_id):
        say(f"warning: {run.path} is the folder of {run.run_id}, which keeps its name: not {config.run_id}.")
    if began["variant"] != run.variant:
        say(f"warning: {run.run_id} goes on as {run.variant}; it was {began['variant']} when the run began.")
    old, new = flat(_versioned(began["config"])), flat(_versioned(as_dict(config)))
    for name in sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name)):
        say(f"warning: {run.run_id} goes on with {name} = {new.get(name)}; it was {old.get(name)} when the run began.")


def run_name(given: str | None, default: str) -> str:
    """The name that is given by hand, or GRUG_RUN_ID, or the default; `-<FERRY_DATE>` follows, where it is set."""
    name, date = given or os.environ.get("GRUG_RUN_ID") or default, os.environ.get("FERRY_DATE")
    return f"{name}-{date}" if date and date not in name else name


def unversioned(part: str) -> list[str]:
    """The fields of a part of the launch configuration, such as "trainer", that make no other run."""
    return [name.removeprefix(f"{part}.") for name in UNVERSIONED if name.startswith(f"{part}.")]


def check_fit(config: Any) -> None:
    """Raises ValueError where parts of a configuration that are right by themselves do not fit each other.

    Or where the environment asks for something that is no number of steps.
    """
    store_metrics_every()
    if config.trainer.seq_len > config.model.max_seq_len:
        raise ValueError(
            f"trainer.seq_len={config.trainer.seq_len} is longer than model.max_seq_len={config.model.max_seq_len}."
            " Cut the sequences, or train with a larger max_seq_len."
        )
    if config.trainer.seq_len % config.trainer.context_axis:
        raise ValueError(
            f"trainer.context_axis={config.trainer.context_axis} does not divide trainer.seq_len="
            f"{config.trainer.seq_len}. Each of its devices holds an equal share of a sequence's positions: choose a"
            " divisor."
        )
    for name in ("num_heads", "num_kv_heads", "hidden_dim", "intermediate_dim", "vocab_size"):
        if (size := getattr(config.model, name, 0)) % config.trainer.model_axis:
            raise ValueError(
                f"trainer.model_axis={config.trainer.model_axis} does not divide model.{name}={size}. Each of its"
                " devices holds an equal share of every layer: choose a divisor."
            )
    experts = getattr(config.model, "num_experts", None)
    if (experts or 1) % config.trainer.expert_axis:
        there_are = f"model.num_experts={experts}" if experts else "one MLP, which is all that this variant has"
        raise ValueError(
            f"trainer.expert_axis={config.trainer.expert_axis} does not divide {there_are}. Each of its devices holds"
            " an equal share of a layer's experts: choose a divisor."
        )
    if config.profile.window and "://" in str(config.output_path):
        raise ValueError(
            f"--profile cannot write to output_path={config.output_path}: the profiler knows local paths only, and"
            " traces go to <output_path>/profiler. Choose a local --output-path, or leave --profile.start and"
            " --profile.steps out."
        )


def check_vocab_size(config: Any, tokens: int) -> None:
    """Raises ValueError where the tokenizer has more tokens than the model: their ids would be clamped in silence."""
    if tokens > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokens} tokens, and model.vocab_size={config.model.vocab_size}. Set the"
            f" latter to at least {tokens}, or choose a tokenizer with fewer (data.vocab_size)."
        )


def write_atomically(path: Path, text: str) -> None:
    """`path` holds the old text or the new, never half of it."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text)
    os.replace(part, path)


def hash_of(variant: str, config: Any) -> str:
    """Eight hexadecimal digits of everything in the configuration that the result depends on."""
    return hashlib.sha256(json.dumps([variant, _versioned(as_dict(config))], sort_keys=True).encode()).hexdigest()[:8]


def _versioned(config: dict[str, Any]) -> dict[str, Any]:
    """`config` without what may differ between two starts of one run."""
    kept = json.loads(json.dumps(config))
    for path in UNVERSIONED:
        *parents, name = path.split(".")
        node = kept
        for parent in parents:
            node = node[parent]
        node.pop(name, None)
    return kept


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"hidden_dim": 64}} as {"model.hidden_dim": 64}."""
    leaves: dict[str, Any] = {}
    for name, value in config.items():
        leaves |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return leaves


def as_dict(config: Any) -> dict[str, Any]:
    """The configuration as JSON's types: what `from_dict` reads."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def from_dict(default: Any, values: dict[str, Any], where: str) -> Any:
    """`default`, a dataclass, with the fields that `values` names replaced; nested dataclasses by nested dicts.

    Raises:
      ValueError: a key is no field, with those there are.
    """
    fields = {field.name for field in dataclasses.fields(default)}
    if not isinstance(values, dict) or set(values) - fields:
        unknown = sorted(set(values) - fields) if isinstance(values, dict) else values
        raise ValueError(
            f"{where}: {unknown} is no field of {type(default).__name__}. Fields: {', '.join(sorted(fields))}."
        )
    hints = typing.get_type_hints(type(default))
    replaced = {
        name: from_dict(getattr(default, name), value, f"{where}.{name}")
        if dataclasses.is_dataclass(getattr(default, name))
        else _typed(hints[name], value, f"{where}.{name}")
        for name, value in values.items()
    }
    return dataclasses.replace(default, **replaced)


def _typed(hint: Any, value: Any, where: str) -> Any:
    """JSON and YAML write 1 for 1.0 and 3e-4 as text: where a number is meant, a number comes out.

    Raises:
      ValueError: `value` is of none of the kinds that `hint` allows, where these are plain ones.
    """
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if float in kinds and type(value) in (int, str) and str not in kinds:
        with contextlib.suppress(ValueError):
            value = float(value)
    if set(kinds) <= {bool, int, float, str, types.NoneType} and type(value) not in kinds:
        raise ValueError(f"{where}: {value!r} is no {' or '.join(kind.__name__ for kind in kinds)}.")
    return value


def read_config(path: Path) -> tuple[str, dict[str, Any]]:
    """Variant and configuration of the run in folder `path`.

    Raises:
      FileNotFoundError: there is no run.
    """
    file = path / "config.json"
    if not file.is_file():
        runs = sorted(str(found.parent) for found in Path("runs").glob("*/config.json"))
        there_are = f"Runs there are: {', '.join(runs)}." if runs else "There are no runs in runs/ yet."
        raise FileNotFoundError(f"--resume {path}: no run there ({file} does not exist). {there_are}")
    saved = json.loads(file.read_text())
    return saved["variant"], saved["config"]


def say(text: str) -> None:
    """Prints for the person who started the run; once, where it has several processes."""
    if together.is_first():
        print(text, file=sys.stderr, flush=True)


def say_here(text: str) -> None:
    """As `say`, for what is true of this process: with its number, where there are several."""
    blank, name = text[: len(text) - len(text.lstrip())], f"process {together.process()}: "
    print(f"{blank}{name}{text.lstrip()}" if together.processes() > 1 else text, file=sys.stderr, flush=True)
