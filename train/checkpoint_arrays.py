# SPDX-License-Identifier: Apache-2.0
"""The arrays of a checkpoint: how they are described, stored, verified and placed on a mesh."""

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train import lev, together
from train.checkpoint_layout import LAYOUT, Stored

Spec = list  # [shape, dtype], as JSON gives it back: [[4, 8], "bfloat16"]


class CheckpointMismatchError(ValueError):
    """The newest readable checkpoint holds other arrays than this run: another model or optimizer wrote it."""


def specs(arrays: dict[str, Any]) -> dict[str, Spec]:
    return {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in arrays.items()}


def check_layout(path: str, layout: int) -> None:
    """Raises CheckpointMismatchError where the checkpoint at `path` was written in another layout than `LAYOUT`."""
    if layout != LAYOUT:
        raise CheckpointMismatchError(
            f"checkpoint {path} has layout {layout} of names and shapes, and this version reads layout {LAYOUT}. It is"
            " left as it is, and is not converted. Go on with the version of this project that wrote it, or choose"
            " another output path to train from scratch."
        )


def check_specs(path: str, found: dict[str, Spec], wanted: dict[str, Spec]) -> None:
    """Raises CheckpointMismatchError where the checkpoint at `path` holds other arrays than this run."""
    names = sorted(found.keys() | wanted.keys())
    different = [name for name in names if found.get(name) != wanted.get(name)]
    if not different:
        return

    def show(spec: Spec | None) -> str:
        return f"{spec[1]}{spec[0]}" if spec else "nothing"

    lines = [f"  {name}: {show(found.get(name))} there, {show(wanted.get(name))} here" for name in different[:5]]
    raise CheckpointMismatchError(
        f"checkpoint {path} is of another model or optimizer: {len(different)} of {len(names)} arrays differ\n"
        + "\n".join(lines + ["  ..."] * (len(different) > 5))
        + "\nGo on with the configuration that wrote it, or choose another output path to train from scratch."
    )


def to_disk(stored: dict[str, Stored], *, checksums: bool) -> tuple[dict[str, jax.Array], dict[str, int] | None]:
    """What goes to disk, and its checksums where asked for: of a typed key its uint32 words, other arrays as they are.

    What is made here, the stacked blocks of a tuple, goes to the host's memory array by array: the devices never hold
    more than one of them beside the state.
    """
    arrays, sums = {}, {}
    for name, array in stored.items():
        arrays[name], sums[name] = _to_disk(array, checksum=checksums)
    return arrays, _as_ints(sums) if checksums else None


def _to_disk(stored: Stored, *, checksum: bool) -> tuple[jax.Array, jax.Array | None]:
    joined = stored.joined()
    array = jax.random.key_data(joined) if _is_key(joined) else joined
    value = _checksum(array) if checksum else None
    if not stored.is_leaf:
        on_host = array.sharding.with_memory_kind("pinned_host")
        array = jax.block_until_ready(jax.device_put(array, on_host))
    return array, value


def described(stored: dict[str, Stored], mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """What to `load`, with shardings on `mesh`."""
    return {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding_on(mesh))
        for name, array in stored.items()
    }


def load(
    path: str, wanted: dict[str, jax.ShapeDtypeStruct], mesh: Mesh, sums: dict[str, int] | None
) -> dict[str, jax.Array]:
    """The arrays of a checkpoint, with the PartitionSpecs of `wanted` on `mesh` (whole where one has none).

    Raises:
      ValueError: they are not what was saved: shape, dtype or one of the checksums `sums` differs.
      Exception: whatever TensorStore makes of broken files.
    """
    targets = {name: _target(leaf, mesh) for name, leaf in wanted.items()}
    arrays, problem = _read(path, targets, mesh)
    # The checksums are of all processes together: the one whose part could be read must not wait for them alone.
    if not together.true_on_all(f"reading the arrays of {path}", problem is None):
        raise problem or ValueError("another process cannot read its part, see its log")
    if sums is not None:
        bad = [name for name, value in checksums(arrays).items() if sums.get(name) != value]
        if bad:
            raise ValueError(
                f"{len(bad)} of {len(arrays)} arrays are not what was saved (checksum): {', '.join(bad[:3])}"
            )
    return {name: _as_key(array, wanted[name]) if _is_key(wanted[name]) else array for name, array in arrays.items()}


def _read(
    path: str, targets: dict[str, jax.ShapeDtypeStruct], mesh: Mesh
) -> tuple[dict[str, jax.Array], Exception | None]:
    """This process's parts of the arrays; or what is wrong with them."""
    try:
        # With several processes each device's part comes from the disk: in a collective, which Levanter would spread
        # what all devices hold with, the others would wait for the process that cannot read it.
        how = lev.TensorStoreReadConfig(replica_mode="one_replica" if together.processes() == 1 else "every_replica")
        with _failed_reads_end():
            arrays = lev.load_checkpoint(targets, path, mesh=mesh, read_config=how)
        on_disk, described = specs(arrays), specs(targets)
        for name in described:
            if on_disk[name] != described[name]:
                raise ValueError(f"{name} is {on_disk[name]} on disk, and metadata.json says {described[name]}")
    except Exception as problem:
        return {}, problem
    return arrays, None


@contextlib.contextmanager
def _failed_reads_end() -> Iterator[None]:
    """While it lasts, `asyncio.run`, which Levanter reads with, waits for the tasks that a failed one leaves behind.

    By itself it cancels them, and cancelling a TensorStore read (0.1.84) as it ends never returns: it waits, holding
    the interpreter's lock, for a callback that needs that lock. One damaged array would hang the start of a run.
    """
    run = asyncio.run

    async def ended(coroutine: Coroutine) -> Any:
        try:
            return await coroutine
        finally:
            await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)

    asyncio.run = lambda main, **options: run(ended(main), **options)
    try:
        yield
    finally:
        asyncio.run = run


def checksums(arrays: dict[str, jax.Array]) -> dict[str, int]:
    return _as_ints(jax.tree.map(_checksum, arrays))


def _as_ints(sums: dict[str, jax.Array]) -> dict[str, int]:
    return {name: int(value) for name, value in jax.device_get(sums).items()}


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """sum_i hash(bits(x[i]) + i * odd) mod 2**32, uint32.

    A sum does not care who adds first: every sharding, on any number of hosts, gives the same, each device reads its
    own part, and nothing is copied to the host. A CRC offers none of this. `hash` is a bijection, so one changed
    element always shows; several together escape once in 2**32. It is the finalizer of MurmurHash3 (public domain).
    """
    x = jax.device_put(x, jax.memory.Space.Device)
    x = x.astype(jnp.uint8) if x.dtype == bool else x
    bits = jax.lax.bitcast_convert_type(x, f"uint{min(8 * x.dtype.itemsize, 32)}").astype(jnp.uint32)
    mixed, stride = bits, 0x9E3779B1
    for axis in reversed(range(bits.ndim)):
        index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis, out_sharding=jax.typeof(bits).sharding)
        mixed = mixed + index * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _as_key(words: jax.Array, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    # key_impl takes keys, not their shapes: ask it of a traced one.
    names: list = []
    jax.eval_shape(lambda key: names.append(jax.random.key_impl(key)), wanted)
    return jax.random.wrap_key_data(words, impl=names[0])


def _target(leaf: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    there = leaf.sharding if isinstance(leaf.sharding, NamedSharding) else NamedSharding(mesh, PartitionSpec())
    words = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    return jax.ShapeDtypeStruct(
        words.shape, words.dtype, sharding=NamedSharding(mesh, there.spec, memory_kind=there.memory_kind)
    )
