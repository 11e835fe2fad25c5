# SPDX-License-Identifier: Apache-2.0
"""What a training step is made of, without Levanter and without a device: a batch of its own, and shapes alone."""

import contextlib
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from train.mesh import BATCH_AXES


class Mask(NamedTuple):
    segment_ids: tuple[Any, Any]


class Example(NamedTuple):
    """The fields of Levanter's GrugLmExample that a training step reads."""

    tokens: Any
    loss_weight: Any
    attn_mask: Mask


def abstract_batch(mesh: Mesh | AbstractMesh, batch_size: int, seq_len: int) -> Example:
    """The shapes of a batch, split over `mesh`."""
    sharding = NamedSharding(mesh, P(BATCH_AXES, None))

    def struct(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((batch_size, seq_len), dtype, sharding=sharding)

    return Example(struct(jnp.int32), struct(jnp.float32), Mask((struct(jnp.int32), struct(jnp.int32))))


def check_splits(transformer: Any, cfg: Any, mesh: Mesh) -> None:
    """Raises ValueError where an axis of `mesh` does not divide a weight of `transformer`, of configuration `cfg`."""
    with splits_explained(cfg, mesh):
        abstract_parameters(transformer, cfg, mesh.abstract_mesh)


@contextlib.contextmanager
def splits_explained(cfg: Any, mesh: Mesh) -> Iterator[None]:
    """Inside, JAX's error that `mesh` does not divide an array says which size of `cfg` that is, and what to choose."""
    try:
        yield
    except ValueError as error:
        found = re.search(r"spec (\(.*?\)) implies .* does not evenly divide the dimension size (\d+)", str(error))
        if found is None:
            raise
        axes, size = re.findall(r"\w+", found[1]), int(found[2])
        parts = math.prod(mesh.shape[axis] for axis in axes)
        names = [f"{name}={size}" for name, value in vars(cfg).items() if value == size]
        of_all = " x ".join(f"{axis} {extent}" for axis, extent in mesh.shape.items())
        raise ValueError(
            f"mesh: {' or '.join(names) or f'a weight with an axis of {size}'} does not divide over {parts} devices"
            f" ({' x '.join(axes)}; {mesh.size} devices are {of_all}). Each holds an equal share of every weight:"
            f" choose a multiple of {parts}, another number of devices, or sizes of replica_dcn, context, expert and"
            " model (--trainer.model-axis, ...) that leave another data axis."
        ) from error


def abstract_parameters(transformer: Any, cfg: Any, mesh: AbstractMesh) -> Any:
    """Shapes, dtypes and shardings of the parameters of `transformer`, a variant's class, of configuration `cfg`."""
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.eval_shape(lambda: transformer.init(cfg, key=jax.random.key(0)))
