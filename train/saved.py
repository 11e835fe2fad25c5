# SPDX-License-Identifier: Apache-2.0
"""A checkpoint opened for use, not for training on: its configuration, its data, its weights on this machine's mesh.

saved = open_saved("runs/NAME")
with jax.set_mesh(saved.mesh):
    logits = saved.params.logits(tokens, AttentionMask(causal=True))
"""

import importlib
import json
import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from train import checkpoint_files as files
from train import lev
from train.checkpoint import NoUsableCheckpointError
from train.data import PreparedData, prepare
from train.failure import first_line
from train.mesh import create_mesh, quiet_libtpu
from train.progress import phase
from train.rundir import from_dict, say

if TYPE_CHECKING:
    from jax.sharding import Mesh

# The weights that were trained, or their moving average.
Weights = Literal["current", "ema"]
_FIELDS: dict[Weights, str] = {"current": "params", "ema": "ema_params"}


@dataclass(frozen=True)
class Saved:
    """What `open_saved` found at `path`, a directory step-<n>."""

    path: str
    step: int
    variant: str
    config: Any  # the variant's launch configuration, as the run had it
    params: Any  # the variant's Transformer, arrays on `mesh`
    mesh: "Mesh"
    data: PreparedData


def open_saved(path: str | Path, *, weights: Weights = "current") -> Saved:
    """The newest checkpoint of a run, of a folder of checkpoints, or the one that `path` is.

    Only the weights are read, and held against their checksums. Any number of devices will do, whatever mesh, and
    whether stacked or unrolled blocks, wrote them.

    Raises:
      FileNotFoundError: there is no complete checkpoint.
      NoUsableCheckpointError: it is damaged. No older one is taken in its place.
      ValueError: the run kept no averages, its variant or its tokenizer is not here, its arrays are of another model.
    """
    path = newest(path)
    metadata = _metadata(path)
    variant, config = _configuration(path, metadata)
    with phase("data") as detail:
        data = prepare(config.data, detail)
    _check_tokenizer(path, metadata, data)
    import jax

    quiet_libtpu()
    # Fewer devices than the run had may not divide by its model axis.
    mesh = create_mesh(jax.device_count(), model=math.gcd(config.trainer.model_axis, jax.device_count()))
    params = load_weights(path, variant, config, mesh, weights=weights)
    return Saved(path, metadata["step"], variant, config, params, mesh, data)


def newest(path: str | Path) -> str:
    """Of a run's folder, a folder of checkpoints or a directory step-<n>: the newest complete step directory.

    Raises:
      FileNotFoundError: there is none; the message says what is there.
    """
    root = str(path).rstrip("/")
    if found := files.find_complete([root, f"{root}/checkpoints"]):
        return found[0]
    fs, plain = lev.url_to_fs(root)
    if not fs.exists(plain):
        there_is = "it does not exist"
    else:
        names = sorted(os.path.basename(name.rstrip("/")) for name in fs.ls(plain, detail=False))
        there_is = f"it holds {', '.join(names[:8]) or 'nothing'}{', ...' * (len(names) > 8)}"
    raise FileNotFoundError(
        f"no complete checkpoint at {root}: {there_is}. Name a run's folder (runs/NAME), its checkpoints folder, or"
        " one directory step-<n> that has a metadata.json."
    )


def load_weights(path: str, variant: str, config: Any, mesh: "Mesh", *, weights: Weights = "current") -> Any:
    """The weights of the checkpoint `path`, a directory step-<n>, as the variant's Transformer on `mesh`.

    Raises:
      NoUsableCheckpointError, ValueError: as `open_saved`.
    """
    import jax

    from train import checkpoint_arrays as arrays
    from train import checkpoint_layout as layout
    from train.offload import shapes_of

    metadata, field = _metadata(path), _FIELDS[weights]
    arrays.check_layout(path, metadata.get("layout", 1))
    specs = {name: spec for name, spec in metadata["specs"].items() if name.startswith(f"{field}/")}
    if not specs:
        raise ValueError(
            f"checkpoint {path} has no {weights} weights: the run kept no moving average. Train with"
            " --trainer.ema-beta, or use --weights current."
        )
    transformer = importlib.import_module(f"grug_model.{variant}.model").Transformer
    with jax.set_mesh(mesh), phase(f"loading {weights} weights of {path}"):
        try:
            shape = {field: shapes_of(partial(transformer.init, config.model, key=jax.random.key(0)))}
        except ValueError as error:
            raise ValueError(
                f"checkpoint {path}: its weights cannot be split over {mesh.shape['data']} x {mesh.shape['model']}"
                f" devices: {first_line(error)}. Let this command see fewer devices (CUDA_VISIBLE_DEVICES)."
            ) from error
        wanted = layout.stored_arrays(shape)
        arrays.check_specs(path, specs, arrays.specs(wanted))
        try:
            loaded = arrays.load(path, arrays.described(wanted, mesh), mesh, metadata.get("checksums"))
        except Exception as error:  # whatever TensorStore meets in broken files
            others = [other for other in files.find_complete([os.path.dirname(path)]) if other != path]
            raise NoUsableCheckpointError(
                f"checkpoint {path} cannot be read: {first_line(error)}. It is left as it is. Others beside it:"
                f" {', '.join(others) or 'none'}."
            ) from error
        return layout.rebuild(shape, loaded, mesh)[field]


def _metadata(path: str) -> files.Metadata:
    try:
        return files.read_metadata(path)
    except ValueError as error:
        raise NoUsableCheckpointError(f"checkpoint {path} cannot be read: {error}. It is left as it is.") from error


def _configuration(path: str, metadata: files.Metadata) -> tuple[str, Any]:
    """Variant and launch configuration of the run that wrote a checkpoint: from its own metadata.json, so that a copy
    of one directory is enough; of older ones, which say nothing, from the run's config.json."""
    if "config" in metadata:
        values, variant, where = metadata["config"], metadata["variant"], f"{path}/metadata.json"
    else:
        where = f"{os.path.dirname(os.path.dirname(path))}/config.json"
        fs, plain = lev.url_to_fs(where)
        if not fs.exists(plain):
            raise FileNotFoundError(
                f"checkpoint {path} does not hold its run's configuration, and there is no {where}. Leave it in its"
                " run's folder, or put that run's config.json there."
            )
        say(f"{path} does not hold its run's configuration: reading {where}")
        began = json.loads(fs.cat_file(plain))
        values, variant = began["config"], began["variant"]
    try:
        launch = importlib.import_module(f"grug_model.{variant}.launch")
    except ModuleNotFoundError as error:
        if not f"grug_model.{variant}.launch".startswith(error.name or "?"):
            raise
        raise ValueError(
            f"checkpoint {path} is of the variant {variant}, and there is no grug_model/{variant}/launch.py here. Bring"
            " that folder along."
        ) from error
    # What an older configuration does not name yet has the default that it had then, not a preset's.
    default = type(next(iter(launch.PRESETS.values())))()
    return variant, from_dict(default, values, where)


def _check_tokenizer(path: str, metadata: files.Metadata, data: PreparedData) -> None:
    """The tokenizer that is made where none is named depends on the Python installation, whose texts are the corpus."""
    wrote = metadata.get("tokenizer_sha256", data.tokenizer.digest)
    if wrote != data.tokenizer.digest:
        raise ValueError(
            f"checkpoint {path} was trained with the tokenizer of sha256 {wrote[:12]}, and the one here is"
            f" {data.tokenizer.digest[:12]} ({data.tokenizer_dir}): the weights mean other tokens. Use the cache"
            " directory of that run (GRUG_CACHE_DIR), or the Python version that made it."
        )
