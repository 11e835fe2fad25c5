# SPDX-License-Identifier: Apache-2.0
"""The arrays of a checkpoint as NumPy's: no jax, no accelerator, no model, one chunk in memory at a time.

What `train/checkpoint_arrays.py` does on devices while a run starts is done here for a person who asks. The checksum
is written a second time, in NumPy: a test holds the two against each other.
"""

import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from train import checkpoint_files as files
from train.failure import first_line

Index = tuple[slice, ...]

_STRIDE = 0x9E3779B1  # as in checkpoint_arrays


@dataclass(frozen=True)
class Difference:
    """Of two arrays of one shape and dtype. Largest |a - b|, and largest |a - b| / max(|a|, |b|), over all elements."""

    elements: int
    of: int
    absolute: float
    relative: float


def verify(path: str) -> list[str]:
    """What is wrong with the checkpoint at `path`, each line with the array or file that it is about; none: nothing."""
    try:
        metadata = files.read_metadata(path)
        files.check_manifest(path, metadata["specs"])
    except (OSError, ValueError) as error:
        return [first_line(error)]
    specs, sums = metadata["specs"], metadata.get("checksums")
    return [problem for name in specs if (problem := _wrong(path, name, specs[name], sums))]


def _wrong(path: str, name: str, spec: list, sums: dict[str, int] | None) -> str | None:
    try:
        store = open_array(path, name)
        found, wanted = [list(store.shape), store.dtype.name], spec
        if spec[1].startswith("key"):  # as its words: an axis more
            found, wanted = [found[0][:-1], found[1]], [spec[0], "uint32"]
        if found != wanted:
            return f"{name}: {found[1]}{found[0]} on disk, {wanted[1]}{wanted[0]} in metadata.json"
        total = checksum(store)
    except Exception as error:  # whatever TensorStore meets in broken files
        return f"{name}: cannot be read: {first_line(error)}"
    if sums is not None and sums.get(name) != total:
        return f"{name}: not what was saved (checksum {total}, {sums.get(name)} when it was saved)"
    return None


def open_array(path: str, name: str) -> Any:
    """A TensorStore of the array `name`. Raises whatever TensorStore makes of broken files."""
    import tensorstore as ts

    base = path if "://" in path else f"file://{os.path.abspath(path)}/"
    kvstore = {"driver": "ocdbt", "base": base, "path": name.replace(".", "/")}
    return ts.open({"driver": "zarr3", "kvstore": kvstore}, open=True, read=True).result()


def blocks(store: Any) -> Iterator[tuple[Index, np.ndarray]]:
    """The chunks of `store`, each with its place."""
    chunk = store.chunk_layout.read_chunk.shape or ()  # None of a scalar
    starts = [range(0, size, step) for size, step in zip(store.shape, chunk, strict=True)]
    for start in itertools.product(*starts):
        index = tuple(slice(a, min(a + b, size)) for a, b, size in zip(start, chunk, store.shape, strict=True))
        yield index, np.asarray(store[index].read().result())


def checksum(store: Any) -> int:
    """As `checkpoint_arrays.checksums` of the array that was saved."""
    shape = tuple(store.shape)
    return sum(_checksum(block, index, shape) for index, block in blocks(store)) % 2**32


def _checksum(block: np.ndarray, index: Index, shape: tuple[int, ...]) -> int:
    """The part of an array's checksum that `block`, its elements at `index`, adds."""
    itemsize = block.dtype.itemsize
    bits = np.frombuffer(block.tobytes(), f"uint{8 * min(itemsize, 4)}").astype(np.uint32)
    starts = [part.start for part in index]
    if itemsize > 4:  # an axis more, of the words of each element
        bits, shape, starts = bits.reshape(*block.shape, -1), (*shape, itemsize // 4), [*starts, 0]
    else:
        bits = bits.reshape(block.shape)
    mixed, stride = bits, _STRIDE
    for axis in reversed(range(bits.ndim)):
        place = np.arange(starts[axis], starts[axis] + bits.shape[axis], dtype=np.uint32) * np.uint32(stride % 2**32)
        mixed = mixed + place.reshape(-1, *[1] * (bits.ndim - 1 - axis))
        stride *= shape[axis]
    mixed = mixed.reshape(-1)  # of a scalar too: NumPy warns where those overflow
    mixed = (mixed ^ (mixed >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return int(np.sum(mixed ^ (mixed >> np.uint32(16)), dtype=np.uint64))


def difference(a: Any, b: Any) -> Difference:
    """Of two stores with the same shape and dtype, whatever their chunks are; NaNs of the same bits are equal."""
    elements, absolute, relative = 0, 0.0, 0.0
    for index, left in blocks(a):
        right = np.asarray(b[index].read().result())
        bytes_of = [np.frombuffer(side.tobytes(), np.uint8).reshape(left.size, -1) for side in (left, right)]
        different = (bytes_of[0] != bytes_of[1]).any(axis=1)
        if not (count := int(np.count_nonzero(different))):
            continue
        elements += count
        x, y = (side.reshape(-1)[different].astype(np.float64) for side in (left, right))
        with np.errstate(invalid="ignore", divide="ignore"):
            apart, larger = np.abs(x - y), np.maximum(np.abs(x), np.abs(y))
            absolute = float(np.maximum(absolute, apart.max()))
            relative = float(np.maximum(relative, np.where(larger > 0, apart / larger, 0.0).max()))
    return Difference(elements, math.prod(a.shape), absolute, relative)
