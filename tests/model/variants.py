# SPDX-License-Identifier: Apache-2.0
"""Every variant there is, found in the folder, at a size that tests can afford."""

import dataclasses
import importlib
from pathlib import Path
from types import ModuleType
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from train import shapes
from train.mesh import AXES, BATCH_AXES
from train.shapes import Example, Mask

FOLDER = Path(__file__).parent.parent.parent / "grug_model"
VARIANTS = sorted(folder.parent.name for folder in FOLDER.glob("*/launch.py"))


def distinct(*names: str) -> list[str]:
    """One variant of all whose files of these names are the same, byte for byte: what is true of one is of all."""
    first = {tuple((FOLDER / variant / name).read_bytes() for name in names): variant for variant in reversed(VARIANTS)}
    return sorted(first.values())


# Of some variants the loop, of some the model as well, is that of another.
LOOPS = distinct("train.py")
MODELS = distinct("model.py", "train.py")
BATCH = P(BATCH_AXES, None)

TINY = {
    "vocab_size": 96,
    "hidden_dim": 32,
    "intermediate_dim": 64,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "max_seq_len": 32,
    "compute_dtype": "float32",
}
# Where TINY and the defaults would hide what a variant is about.
TINY_OF = {"local_global": {"sliding_window": 5, "global_every": 2}}


def one_device():
    """Compiles in half the time: for what does not depend on the mesh."""
    return jax.make_mesh((1,) * 5, AXES, axis_types=(AxisType.Explicit,) * 5, devices=jax.devices()[:1])


def part(variant: str, name: str) -> ModuleType:
    """`grug_model.<variant>.<name>`, name one of model, train, launch."""
    return importlib.import_module(f"grug_model.{variant}.{name}")


def tiny_config(variant: str, **changes):
    return part(variant, "model").GrugModelConfig(**(TINY | TINY_OF.get(variant, {}) | changes))


def remat_policies(variant: str) -> tuple[str, ...]:
    """Those that the variant's configuration lets one choose from."""
    return get_args(get_type_hints(part(variant, "model").GrugModelConfig)["remat"])


def tiny_trainer(**changes):
    from train.config import GrugTrainerConfig

    return dataclasses.replace(GrugTrainerConfig(steps=50, batch_size=8, seq_len=16), **changes)


def random_batch(batch_size: int = 8, seq_len: int = 16, vocab_size: int = 96, seed: int = 0) -> Example:
    """Two documents a row, placed on the current mesh."""
    tokens = jax.random.randint(jax.random.key(seed), (batch_size, seq_len), 0, vocab_size, jnp.int32)
    segments = jnp.broadcast_to(jnp.arange(seq_len) // (seq_len // 2), tokens.shape).astype(jnp.int32)
    weight = jnp.ones(tokens.shape, jnp.float32).at[:, -1].set(0)
    tokens, segments, weight = (jax.device_put(array, BATCH) for array in (tokens, segments, weight))
    return Example(tokens, weight, Mask((segments, segments)))


def abstract_batch(mesh, batch_size: int = 8, seq_len: int = 16) -> Example:
    return shapes.abstract_batch(mesh, batch_size, seq_len)
